"""Which scheme and group size a drafter gets: what depends on the model, told from a config.json alone."""

from __future__ import annotations

import dataclasses
from typing import Any

from openrlhf_sd.config import GROUP_SIZES, SelfSpecConfig, SelfSpecError
from openrlhf_sd.provenance import lacks_bf16


def default_quant(on_gpu: bool) -> str:
    """CPU: by measurement (docs/measurements.md, "Speed of the engine alone"). GPU: the paper's scheme; not measured by us yet."""
    return "w8a8" if not on_gpu and lacks_bf16() else "w4"


def resolve_scheme(config: SelfSpecConfig, in_features: tuple[int, ...], on_gpu: bool) -> SelfSpecConfig:
    """Fill in scheme and group size.

    Args:
        in_features: input widths of the quantized linears per tensor-parallel rank, see `linear_input_widths`.
        on_gpu: where the engine is; without a GPU it is this machine.

    Raises:
        SelfSpecError: the group size does not fit the model, or none does.
    """
    group_size = config.group_size
    quant = config.quant or (default_quant(on_gpu) if group_size is None else "w4")  # only w4 has groups
    if quant == "w4":
        if group_size is None:
            group_size = default_group_size(in_features)
        check_group_size(group_size, in_features)
    return dataclasses.replace(config, quant=quant, group_size=group_size)


def default_group_size(in_features: tuple[int, ...]) -> int:
    """The largest of `GROUP_SIZES` that divides every input width.

    Raises:
        SelfSpecError: none does.
    """
    for group in GROUP_SIZES:
        if all(width % group == 0 for width in in_features):
            return group
    raise SelfSpecError(
        f"--self-spec.quant: w4 needs linear input widths that are multiples of 32, this model has {sorted(set(in_features))}; "
        "use --self-spec.quant w8a8"
    )


def check_group_size(group_size: int, in_features: tuple[int, ...]) -> None:
    """Raises SelfSpecError if an explicit group size does not divide a quantized linear's input width."""
    for width in in_features:
        if width % group_size:
            raise SelfSpecError(
                f"--self-spec.group_size: {group_size} does not divide the input width {width} of a quantized linear; "
                f"use {default_group_size(in_features)} or leave it out"
            )


def check_capability(quant: str, capability: tuple[int, int] | None) -> None:
    """Raises SelfSpecError if vLLM has no kernel of the scheme for a GPU of this compute capability; None where there is no GPU."""
    # vLLM 0.29.0, csrc/quantization/w8a8/cutlass: "Int8 not supported on SM100", nor on any later one.
    if quant == "w8a8" and capability is not None and capability[0] >= 10:
        raise SelfSpecError(
            f"--self-spec.quant: vLLM has no int8 kernel for GPUs of compute capability {capability[0]}.{capability[1]} (Blackwell), and "
            "w8a8 needs one; use w4"
        )


def linear_input_widths(hf_config: Any, tensor_parallel_size: int = 1) -> tuple[int, ...]:
    """Input widths of the quantized decoder linears of a dense model, per tensor-parallel rank (row-parallel ones are cut).

    `hf_config` is anything with the attributes of a Hugging Face text config.
    """
    head_dim = getattr(hf_config, "head_dim", None) or hf_config.hidden_size // hf_config.num_attention_heads
    return (
        hf_config.hidden_size,
        hf_config.num_attention_heads * head_dim // tensor_parallel_size,
        hf_config.intermediate_size // tensor_parallel_size,
    )
