"""CUDA graphs hold the addresses of the drafter's parameters: a weight sync must leave every one where it is. Shown on the CPU with the
bias treatment of vLLM's Marlin kernel, which needs no GPU itself."""

from __future__ import annotations

import pytest
import torch
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.utils.marlin_utils import marlin_permute_bias
from vllm.model_executor.model_loader.reload import record_metadata_for_reloading
from vllm.model_executor.model_loader.weight_utils import default_weight_loader

from openrlhf_sd.engine.drafter_weights import DrafterWeights

WIDTH = 64


class MarlinLike(UnquantizedLinearMethod):
    """What `MarlinLinearKernel.process_weights_after_loading` does: a repacked weight is a new parameter, the bias a new tensor in the
    old one."""

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        layer.weight = torch.nn.Parameter(layer.weight.data.t().contiguous(), requires_grad=False)
        layer.bias.data = marlin_permute_bias(layer.bias)


class Drafter(torch.nn.Module):
    def __init__(self, num_layers: int) -> None:
        super().__init__()
        layers = (torch.nn.ModuleDict({"proj": torch.nn.Linear(WIDTH, WIDTH)}) for _ in range(num_layers))
        self.model = torch.nn.ModuleDict({"layers": torch.nn.ModuleList(layers)})
        self.requires_grad_(False)
        record_metadata_for_reloading(self)
        for layer in self.model.layers:
            layer["proj"].quant_method = MarlinLike()
            layer["proj"].quant_method.process_weights_after_loading(layer["proj"])

    def load_weights(self, weights) -> None:
        for name, weight in weights:
            parameter = self.get_parameter(name)
            getattr(parameter, "weight_loader", default_weight_loader)(parameter, weight)


@pytest.mark.parametrize("num_syncs", [1, 3])
def test_a_sync_moves_no_parameter(num_syncs):
    drafter = Drafter(num_layers=2)
    weights = DrafterWeights(drafter, model_config=None, quant="none", group_size=128, finish_kernels=lambda: None)
    # Held as a graph holds them: not the parameters, the memory.
    before = {name: parameter.data for name, parameter in drafter.named_parameters()}
    for sync in range(num_syncs):
        torch.manual_seed(sync)
        sent = {
            f"model.layers.{layer}.proj.{name}": torch.randn(shape)
            for layer in range(2)
            for name, shape in (("weight", (WIDTH, WIDTH)), ("bias", (WIDTH,)))
        }
        for name, weight in sent.items():
            weights.feed(name, weight)
        weights.finish()
        after = dict(drafter.named_parameters())
        assert {name: parameter.data_ptr() for name, parameter in after.items()} == {name: data.data_ptr() for name, data in before.items()}
        for name, weight in sent.items():
            assert torch.equal(before[name], weight.t() if name.endswith("weight") else marlin_permute_bias(weight))
