"""Round-to-nearest quantization of one policy weight into the checkpoint tensors that compressed-tensors layers load.

Formulas are those of compressed-tensors 0.17 (`quantization/utils/helpers.py: calculate_qparams`, `forward.py: quantize`; a test
holds them equal): symmetric, scale = max|w| over the group / ((2**bits - 1) / 2), q = clamp(round(w / scale)). Written out here
because the library's observers and packers take several times longer than the memory traffic they need, and this runs after every
weight broadcast.
"""

from __future__ import annotations

from typing import Any

import torch

Tensors = list[tuple[str, torch.Tensor]]

_CHUNK_BYTES = {"cpu": 1 << 20, "cuda": 128 << 20}
"""Work on about this many bytes of fp32 weight at a time. CPU: intermediates stay in the L2 cache. CUDA: with the KV cache in place there
may be no room for several fp32 copies of a large model's weight (1 GB each for a 72B model's MLP); launches still cost nothing."""


def compressed_tensors_config(quant: str, group_size: int) -> dict[str, Any] | None:
    """The `quantization_config` a compressed-tensors checkpoint of this scheme would carry; None for an unquantized copy."""
    if quant == "none":
        return None
    weights: dict[str, Any] = {"type": "int", "symmetric": True, "dynamic": False}
    if quant == "w4":
        quant_format = "pack-quantized"
        weights |= {"num_bits": 4, "strategy": "group", "group_size": group_size}
        input_activations = None
    else:
        quant_format = "int-quantized"
        weights |= {"num_bits": 8, "strategy": "channel"}
        input_activations = {"num_bits": 8, "type": "int", "symmetric": True, "dynamic": True, "strategy": "token"}
    return {
        "quant_method": "compressed-tensors",
        "format": quant_format,
        "ignore": ["re:.*lm_head"],
        "config_groups": {"decoder_linears": {"targets": ["Linear"], "weights": weights, "input_activations": input_activations}},
    }


def is_decoder_weight(name: str) -> bool:
    """Whether a Hugging Face parameter belongs to a decoder layer; embeddings, the final norm and the head are shared instead."""
    return name.startswith("model.layers.")


def checkpoint_tensors(name: str, weight: torch.Tensor, quant: str, group_size: int) -> Tensors:
    """One policy parameter as the drafter's checkpoint names it: a linear's (out, in) weight quantized, the rest unchanged."""
    is_linear = weight.dim() == 2 and name.endswith(".weight")
    if quant == "none" or not is_linear:
        return [(name, weight)]
    stem = name.removesuffix("weight")
    if quant == "w4":
        packed, scale = quantize_w4(weight, group_size)
        shape = torch.tensor(weight.shape, dtype=torch.int64)
        return [(f"{stem}weight_packed", packed), (f"{stem}weight_scale", scale), (f"{stem}weight_shape", shape)]
    values, scale = quantize_w8(weight)
    return [(f"{stem}weight", values), (f"{stem}weight_scale", scale)]


def quantize_w4(weight: torch.Tensor, group_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, in) floats -> (out, in/8) int32 of eight offset-binary nibbles, low first, and (out, in/group) scales.

    The scale is rounded to the weight's dtype before it divides, so that what the kernel multiplies by is what was divided by.
    """
    num_rows, num_cols = weight.shape
    packed = torch.empty(num_rows, num_cols // 8, dtype=torch.int32, device=weight.device)
    scale = torch.empty(num_rows, num_cols // group_size, dtype=weight.dtype, device=weight.device)
    for rows in _row_chunks(weight):
        grouped = weight[rows].float().view(-1, num_cols // group_size, group_size)
        rounded = _scale(grouped, bits=4).to(weight.dtype)
        scale[rows] = rounded.squeeze(-1)
        values = grouped.div_(rounded.float()).round_().clamp_(-8, 7).to(torch.int8).view(-1, num_cols)
        # Two values at a time, little-endian: the even one gives the low nibble. Flipping bit 3 turns two's complement into
        # offset binary.
        pairs = values.view(torch.int16)
        nibbles = ((pairs & 0x0F) | ((pairs >> 4) & 0xF0)) ^ 0x88
        packed[rows] = nibbles.to(torch.int8).view(torch.int32)
    return packed, scale


def quantize_w8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, in) floats -> (out, in) int8 and (out, 1) float32 scales, one per output channel."""
    values = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    scale = torch.empty(weight.shape[0], 1, dtype=torch.float32, device=weight.device)
    for rows in _row_chunks(weight):
        chunk = weight[rows].float()
        scale[rows] = _scale(chunk, bits=8)
        values[rows] = chunk.div_(scale[rows]).round_().clamp_(-128, 127).to(torch.int8)
    return values, scale


def _scale(values: torch.Tensor, bits: int) -> torch.Tensor:
    """Symmetric scale over the last dimension, kept; an all-zero group gets the smallest scale instead of a division by zero."""
    half_range = (2**bits - 1) / 2
    return values.abs().amax(dim=-1, keepdim=True).div_(half_range).clamp_(min=torch.finfo(torch.bfloat16).tiny)


def _row_chunks(weight: torch.Tensor) -> list[slice]:
    step = max(1, _CHUNK_BYTES[weight.device.type] // (weight.shape[1] * 4))
    return [slice(start, start + step) for start in range(0, weight.shape[0], step)]
