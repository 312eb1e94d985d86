"""PyTorch's int8 kernel computes what the quantized checkpoint says, and vLLM chooses it where there are no VNNI instructions."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from vllm.model_executor.kernels.linear import _POSSIBLE_INT8_KERNELS, choose_scaled_mm_linear_kernel
from vllm.model_executor.kernels.linear.scaled_mm.cpu import CPUInt8ScaledMMLinearKernel
from vllm.model_executor.kernels.linear.scaled_mm.ScaledMMLinearKernel import Int8ScaledMMLinearLayerConfig

from openrlhf_sd.engine import cpu_int8, quantize

CHANNELS = Int8ScaledMMLinearLayerConfig(is_static_input_scheme=False, is_channelwise=True, input_symmetric=True)
NAMES = ["weight", "weight_scale", "input_scale", "input_zero_point", "azp_adj"]


def linear(weight: torch.Tensor) -> tuple[cpu_int8.TorchInt8LinearKernel, torch.nn.Module]:
    layer = torch.nn.Module()
    for name, tensor in zip(NAMES, quantize.quantize_w8(weight)):
        layer.register_parameter(name, torch.nn.Parameter(tensor, requires_grad=False))
    kernel = cpu_int8.TorchInt8LinearKernel(CHANNELS, NAMES)
    kernel.process_weights_after_loading(layer)
    return kernel, layer


@pytest.mark.parametrize("num_tokens", [1, 3, 40])
@pytest.mark.parametrize("shape", [(17, 64), (96, 80), (320, 256)])
def test_it_computes_with_the_quantized_weights(shape, num_tokens):
    weight, bias, x = (torch.randn(*size).bfloat16() for size in (shape, shape[:1], (num_tokens, shape[1])))
    kernel, layer = linear(weight)
    values, scale = quantize.quantize_w8(weight)
    wanted = x.float() @ (values.float() * scale).t()
    for some_bias in (None, bias):
        output = kernel.apply_weights(layer, x, some_bias)
        assert output.dtype == torch.bfloat16
        difference = output.float() - (wanted if some_bias is None else wanted + bias.float())
        assert difference.norm() / wanted.norm() < 2**-7  # two roundings to bf16


def test_weights_changed_in_place_are_computed_with():
    """As vLLM's layerwise reload changes them: new tensors are processed, then copied to where the old ones were."""
    kernel, layer = linear(torch.randn(32, 64).bfloat16())
    weight = torch.randn(32, 64).bfloat16() * 3
    for name, tensor in zip(NAMES, quantize.quantize_w8(weight)):
        getattr(layer, name).data.copy_(tensor)
    x = torch.randn(2, 64).bfloat16()
    wanted = x.float() @ weight.float().t()
    assert (kernel.apply_weights(layer, x).float() - wanted).norm() / wanted.norm() < 0.02


def test_leading_dimensions_are_kept():
    kernel, layer = linear(torch.randn(32, 64).bfloat16())
    assert kernel.apply_weights(layer, torch.randn(2, 3, 64).bfloat16()).shape == (2, 3, 32)


def test_widths_that_it_would_read_beyond_are_left_to_vllm(monkeypatch):
    asked = []
    monkeypatch.setattr(CPUInt8ScaledMMLinearKernel, "process_weights_after_loading", lambda self, layer: asked.append(layer))
    linear(torch.randn(32, 72).bfloat16())
    assert len(asked) == 1


@pytest.mark.parametrize("change", [{"is_static_input_scheme": True}, {"is_channelwise": False}, {"input_symmetric": False}])
def test_other_schemes_are_left_to_vllm(change):
    possible, reason = cpu_int8.TorchInt8LinearKernel.can_implement(dataclasses.replace(CHANNELS, **change))
    assert not possible and reason


@pytest.mark.skipif(torch.cuda.is_available(), reason="vLLM chooses by the platform, which is CUDA here")
@pytest.mark.parametrize(("has_vnni", "chosen"), [(True, CPUInt8ScaledMMLinearKernel), (False, cpu_int8.TorchInt8LinearKernel)])
def test_vllm_chooses_it_without_vnni_only(monkeypatch, has_vnni, chosen):
    cpu_int8.install()
    cpu_int8.install()
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: has_vnni)
    assert choose_scaled_mm_linear_kernel(CHANNELS, _POSSIBLE_INT8_KERNELS) is chosen
