"""Keeps the drafter's quantized decoder layers equal to round-to-nearest of the policy, tensor by tensor as a sync delivers them.

The tensors go through vLLM's own layerwise reload (`vllm/model_executor/model_loader/reload/layerwise.py`): its loaders do the fusing,
tensor-parallel slicing and kernel repacking, and copy into the existing storage, so that pointers captured in CUDA graphs stay valid.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from vllm.config import ModelConfig
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from openrlhf_sd.engine.quantize import Tensors, checkpoint_tensors, is_decoder_weight
from openrlhf_sd.engine.weight_checks import ReceivedWeights
from openrlhf_sd.reload_warnings import not_missing, without_parameters


class DrafterWeights:
    """One drafter and the policy version it was made from.

    Args:
        draft_model: the drafter as vLLM's model class, with embeddings, final norm and head shared with the policy.
        model_config: vLLM's config of the draft model.
        quant, group_size: scheme, see `quantize.py`.
        finish_kernels: waits for what a kernel does with loaded weights in the background.
    """

    def __init__(
        self,
        draft_model: torch.nn.Module,
        model_config: ModelConfig,
        quant: str,
        group_size: int,
        finish_kernels: Callable[[], None],
    ) -> None:
        self._model = draft_model
        # Only the decoder layers are reloaded: the shared modules hang in the same tree, but belong to the policy's own reload.
        self._layers = draft_model.model.layers
        self._never_sent = without_parameters(self._layers)
        self._model_config = model_config
        self._quant = quant
        self._group_size = group_size
        self._finish_kernels = finish_kernels
        self._is_open = False
        self._storages: dict[str, torch.Tensor] = {}
        self._pending: Tensors = []
        self._pending_layer: str | None = None
        self._num_policy_params = 0
        self._sources = ReceivedWeights()
        self.requantize_s: float | None = None
        """Seconds spent on the last whole re-quantization, without waiting for tensors to arrive."""
        self._spent_s = 0.0

    @property
    def is_whole(self) -> bool:
        """False between the first tensor of a sync and its end: the layers are then partly on the meta device."""
        return not self._is_open

    @torch.no_grad()
    def feed(self, name: str, weight: torch.Tensor) -> None:
        """Take one policy parameter under its Hugging Face name; full (unsharded) shape, on the device of the model."""
        if not is_decoder_weight(name):
            return
        started = time.perf_counter()
        if not self._is_open:
            self._storages = {parameter_name: parameter.data for parameter_name, parameter in self._layers.named_parameters()}
            initialize_layerwise_reload(self._layers)
            self._is_open = True
            self._spent_s = 0.0
        layer = name.split(".")[2]  # model.layers.N.*
        if layer != self._pending_layer:
            self._load_pending()
            self._pending_layer = layer
        # What passes unquantized (norms, biases) is kept until its layer is complete, but a tensor that came by CUDA IPC is the
        # trainer's memory, valid during this call only.
        for tensor_name, tensor in checkpoint_tensors(name, weight, self._quant, self._group_size):
            self._pending.append((tensor_name, tensor.clone() if tensor is weight else tensor))
        self._sources.add(name, weight)
        self._spent_s += time.perf_counter() - started

    @torch.no_grad()
    def finish(self) -> dict[str, int]:
        """End of a sync: repack what is left and bring the layers back to runnable form.

        Returns:
            name -> checksum of every parameter the drafter was just made of.

        Raises:
            RuntimeError: the sync did not deliver every decoder parameter.
        """
        started = time.perf_counter()
        self._load_pending()
        if self._is_open:
            with not_missing(self._never_sent):
                finalize_layerwise_reload(self._layers, self._model_config)
            self._move_back()
            self._finish_kernels()
        self._is_open = False
        self.requantize_s = self._spent_s + time.perf_counter() - started
        # Counted per sync: one that delivers nothing under these names must not pass for the one before it.
        sources, self._sources = self._sources.checksums(), ReceivedWeights()
        num_delivered = len(sources)
        if self._num_policy_params and num_delivered != self._num_policy_params:
            raise RuntimeError(
                f"self-speculation: the weight sync delivered {num_delivered} of {self._num_policy_params} decoder "
                "parameters, so the drafter would be older than the policy; send every parameter, the last one with "
                "empty_cache=True"
            )
        self._num_policy_params = num_delivered
        return sources

    def _move_back(self) -> None:
        """Into the storage of before the reload, whose address the CUDA graphs hold, with what the reload has put elsewhere.

        That is a bias under Marlin: the reload leaves biases where they are (`reload/meta.py: SKIP_TENSORS`), and Marlin's repacking
        then permutes them into a new tensor (`kernels/linear/mixed_precision/marlin.py`). Without a graph nobody would notice, and in
        one the drafter computes with freed memory.
        """
        for name, parameter in self._layers.named_parameters():
            storage = self._storages[name]
            if parameter.data_ptr() != storage.data_ptr():
                parameter.data = storage.copy_(parameter.data)
        self._storages = {}

    def _load_pending(self) -> None:
        """Hand a whole decoder layer to vLLM's loader: each call of it walks the module tree, which a call per tensor makes a fifth of
        the time."""
        if self._pending:
            self._model.load_weights(self._pending)
        self._pending = []
