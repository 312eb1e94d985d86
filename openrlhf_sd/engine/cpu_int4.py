"""The linears of a `w4` drafter on CPU: vLLM's W4A8 kernel where there are VNNI instructions, else PyTorch's W4A16 kernel.

Both stream half a byte per weight and unpack it in registers. vLLM 0.29.0 by itself takes neither without AMX, but
`CPUWNA16LinearKernel`, which unpacks into memory first and takes longer than bf16 does.
"""

from __future__ import annotations

import torch
from vllm import _custom_ops as ops
from vllm import envs
from vllm.model_executor.kernels.linear import _POSSIBLE_KERNELS
from vllm.model_executor.kernels.linear.mixed_precision.cpu import CPUWNA16LinearKernel
from vllm.model_executor.kernels.linear.mixed_precision.MPLinearKernel import MPLinearKernel, MPLinearLayerConfig
from vllm.platforms import PlatformEnum
from vllm.scalar_type import scalar_types
from vllm.utils.torch_utils import direct_register_custom_op

from openrlhf_sd.config import GROUP_SIZES

CHUNK_ROWS = 256
"""Output channels repacked at a time, a multiple of both layouts' blocks (PyTorch's: 64, 32 or 16 by instruction set)."""

BLOCK_ROWS = 32
"""Output channels in a block of vLLM's W4A8 layout; groups of inputs are its other side."""

ZERO_POINT = 8
"""Of a checkpoint's offset-binary nibbles."""

TILE_TOKENS = 4
"""Up to so many tokens the W4A8 kernel reads a weight once."""

MAX_TILED_TOKENS = 32
"""More tokens than these are faster in one call than by the tile."""


def install() -> None:
    """Before vLLM's kernel in this process's order of choice. Idempotent."""
    kernels = _POSSIBLE_KERNELS[PlatformEnum.CPU]
    if TorchInt4LinearKernel not in kernels:
        place = kernels.index(CPUWNA16LinearKernel)
        kernels[place:place] = [VnniInt4LinearKernel, TorchInt4LinearKernel]


class TorchInt4LinearKernel(MPLinearKernel):
    """Symmetric int4 weights in groups, activations as they come."""

    @classmethod
    def get_min_capability(cls) -> int:
        return -1  # no GPU

    @classmethod
    def can_implement(cls, c: MPLinearLayerConfig) -> tuple[bool, str | None]:
        if c.weight_type != scalar_types.uint4b8 or c.zero_points or c.has_g_idx:
            return False, "only symmetric int4 weights in their own order"
        if c.group_size not in GROUP_SIZES:
            return False, f"groups of {c.group_size} inputs; it knows {GROUP_SIZES}"
        if c.partition_weight_shape[1] % 16:
            return False, f"{c.partition_weight_shape[1]} output channels are not a multiple of 16"
        return True, None

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """From a compressed-tensors checkpoint's (out, in/8) int32 and (out, in/group) scales."""
        packed, scale, _, _ = self._get_weight_params(layer)
        packed.data = repack_for_torch(packed.data)
        # Weight = (nibble - 8) * scale + zero.
        groups = scale.data.t()
        scale.data = torch.stack((groups, torch.zeros_like(groups)), dim=-1).contiguous()

    def apply_weights(self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        packed, scale, _, _ = self._get_weight_params(layer)
        tokens = x.reshape(-1, x.shape[-1])
        return _shaped(torch.ops.aten._weight_int4pack_mm_for_cpu(tokens, packed, self.config.group_size, scale), x, bias)


class VnniInt4LinearKernel(TorchInt4LinearKernel):
    """As above, with activations rounded to int8 per token on the way in. VLLM_CPU_INT4_W4A8=0 turns it off, as it does in vLLM."""

    @classmethod
    def can_implement(cls, c: MPLinearLayerConfig) -> tuple[bool, str | None]:
        if not torch.cpu._is_vnni_supported() or not hasattr(torch.ops._C, "int4_scaled_mm_cpu"):
            return False, "no AVX-512 VNNI instructions"
        if not envs.VLLM_CPU_INT4_W4A8:
            return False, "VLLM_CPU_INT4_W4A8 is 0"
        if c.partition_weight_shape[1] % BLOCK_ROWS or c.act_type != torch.bfloat16:
            return False, f"not bf16, or {c.partition_weight_shape[1]} output channels, which are not a multiple of {BLOCK_ROWS}"
        return super().can_implement(c)

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        packed, scale, _, _ = self._get_weight_params(layer)
        packed.data = repack_for_vnni(packed.data, self.config.group_size)
        num_rows, num_groups = scale.shape
        scale.data = scale.data.float().view(num_rows // BLOCK_ROWS, BLOCK_ROWS, num_groups).transpose(1, 2).contiguous()
        self._zero_points = torch.full(scale.shape, ZERO_POINT, dtype=torch.int8)

    def apply_weights(self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        packed, scale, _, _ = self._get_weight_params(layer)
        tokens = x.reshape(-1, x.shape[-1])
        return _shaped(torch.ops.openrlhf_sd.int4_linear(tokens, packed, self._zero_points, scale), x, bias)


def _int4_linear(tokens: torch.Tensor, packed: torch.Tensor, zero_points: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """(tokens, in) -> (tokens, out). An operator, because torch.compile would keep the number of tiles it has traced."""
    tiles = tokens.split(TILE_TOKENS) if TILE_TOKENS < len(tokens) <= MAX_TILED_TOKENS else [tokens]
    outputs = [ops.int4_scaled_mm_cpu(tile, packed, zero_points, scale, None) for tile in tiles]
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def _int4_linear_fake(tokens: torch.Tensor, packed: torch.Tensor, zero_points: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return tokens.new_empty(tokens.shape[0], scale.shape[0] * BLOCK_ROWS)


_operators = torch.library.Library("openrlhf_sd", "FRAGMENT")  # they live as long as this does
direct_register_custom_op("int4_linear", _int4_linear, fake_impl=_int4_linear_fake, target_lib=_operators, dispatch_key="CPU")


def _shaped(output: torch.Tensor, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    if bias is not None:
        output += bias
    return output.view(*x.shape[:-1], output.shape[-1])


def repack_for_torch(packed: torch.Tensor) -> torch.Tensor:
    """(out, in/8) int32 of eight nibbles, low first -> (out, in/2) uint8 in the layout that PyTorch has for this machine."""
    num_rows, num_words = packed.shape
    repacked = torch.empty(num_rows, num_words * 4, dtype=torch.uint8)
    for start in range(0, num_rows, CHUNK_ROWS):
        rows = slice(start, start + CHUNK_ROWS)
        repacked[rows] = torch.ops.aten._convert_weight_to_int4pack_for_cpu(_nibbles(packed[rows]).int(), 1)
    return repacked


def repack_for_vnni(packed: torch.Tensor, group_size: int) -> torch.Tensor:
    """(out, in/8) int32 of eight nibbles, low first -> (out/32, in/group, 16 * group + 128) uint8, as
    `ops.convert_weight_packed_scale_zp` makes it (a test holds them equal), which takes ten times longer.

    A block has, for every four inputs, two times 32 bytes: of eight channels in the low nibble and of the next eight in the high one.
    Behind them is an int32 per channel, the sum of its weights without scale.
    """
    num_rows, num_words = packed.shape
    num_groups = num_words * 8 // group_size
    num_weight_bytes = BLOCK_ROWS * group_size // 2
    repacked = torch.empty(num_rows // BLOCK_ROWS, num_groups, num_weight_bytes + BLOCK_ROWS * 4, dtype=torch.uint8)
    for start in range(0, num_rows, CHUNK_ROWS):
        nibbles = _nibbles(packed[start : start + CHUNK_ROWS])
        block = repacked[start // BLOCK_ROWS : (start + CHUNK_ROWS) // BLOCK_ROWS]
        num_blocks = len(block)
        halves = nibbles.view(num_blocks, 2, 2, 8, -1)
        fours = (halves[:, :, 0] | (halves[:, :, 1] << 4)).view(torch.int32)  # of inputs: (block, half, channel, in/4)
        weights = fours.view(num_blocks, 2, 8, num_groups, -1).permute(0, 3, 4, 1, 2)
        block[..., :num_weight_bytes] = weights.reshape(num_blocks, num_groups, -1).view(torch.uint8)
        sums = nibbles.view(num_blocks, BLOCK_ROWS, num_groups, group_size).sum(dim=-1, dtype=torch.int32) - ZERO_POINT * group_size
        block[..., num_weight_bytes:] = sums.transpose(1, 2).contiguous().view(torch.uint8)
    return repacked


def _nibbles(packed: torch.Tensor) -> torch.Tensor:
    """(rows, in/8) int32 -> (rows, in) uint8."""
    pairs = packed.contiguous().view(torch.uint8)
    return torch.stack((pairs & 0x0F, pairs >> 4), dim=-1).view(len(pairs), -1)
