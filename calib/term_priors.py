"""Where the fit starts, and how far few measurements may carry a term from there.

Two starting points, in round numbers: a GPU of the A100's class and a CPU of two cores. A sweep's own speed rescales them before the fit,
so they matter as proportions: how much of a step is launches, how sharp a roofline is. These one model's sweep cannot tell apart (bytes
and launches per layer grow together in it), and a transfer to another model rests on them.
"""

from __future__ import annotations

from dataclasses import dataclass

from openrlhf_sd.policy.cost_model import Terms
from openrlhf_sd.policy.kernel_seconds import MARLIN_PASS_ROWS

GPU_UNITS = {
    "A100": 108, "A800": 108, "A40": 84, "A10": 72, "A30": 56, "A6000": 84, "3090": 82, "4090": 128, "5090": 170, "L40": 142, "L4": 58,
    "H100": 132, "H800": 132, "H200": 132, "H20": 78, "GH200": 132, "B200": 148, "B100": 148, "V100": 80, "T4": 40,
}  # fmt: skip
"""Streaming multiprocessors by what a device's name contains (the data sheets' numbers; of several matches the longest holds)."""

NOT_MARLIN = ("H100", "H800", "H200", "H20", "GH200", "B100", "B200")
"""vLLM runs w4 through Marlin, except on these (Machete and its successors)."""

PUBLISHED_DEVICE = "NVIDIA A100-SXM4-80GB"
"""The published sweeps name no device; this is theirs."""


@dataclass(frozen=True)
class TermPrior:
    """Spreads are standard deviations of the term's logarithm (of its excess over 1, for an exponent)."""

    start: float
    spread: float
    """Without another model's fit, after rescaling."""
    spread_on_same_machine: float
    """Around another model's fit on the same machine."""


HELD = 1e-6
"""Spread of a term that is not fitted."""

GPU_PRIORS = {
    "stream_bytes_per_s": TermPrior(1.67e12, 0.1, 0.03),
    "gemm_flops_per_s": TermPrior(2.6e14, 0.5, 0.05),
    "wide_tile_gain": TermPrior(1.2, 0.1, 0.03),
    "roofline_exponent": TermPrior(3.6, 0.5, 0.2),
    "gemm_switch_s_per_byte": TermPrior(1e-15, 1.0, 1.0),
    "switch_half_rows": TermPrior(1e-3, HELD, HELD),
    "attention_tile_s": TermPrior(2.26e-8, 0.7, 0.05),
    "attention_pair_cost": TermPrior(0.65, 0.2, 0.05),
    "cascade_layer_s": TermPrior(2.9e-5, 0.7, 0.1),
    "layer_s": TermPrior(1.8e-5, 0.3, 0.2),
    "target_fixed_s": TermPrior(5e-4, 0.7, 0.3),
    "verify_fixed_s": TermPrior(2e-4, 1.0, 0.5),
    "target_request_s": TermPrior(1.2e-5, 0.7, 0.3),
    "verify_request_s": TermPrior(2.9e-5, 0.7, 0.2),
    "activation_passes": TermPrior(2.0, 0.5, 0.2),
    "draft_bytes_per_stream_byte": TermPrior(1.0, 0.1, 0.03),
    "draft_flops_per_s": TermPrior(1.6e14, 0.15, 0.05),
    "draft_exponent": TermPrior(1.7, 0.1, 0.1),
    "draft_switch_s_per_byte": TermPrior(5e-14, 1.0, 0.5),
    "draft_layer_s": TermPrior(5.5e-5, 0.3, 0.1),
    "draft_pass_layer_s": TermPrior(3e-5, 0.7, 0.3),
    "draft_fixed_s": TermPrior(1e-4, 0.7, 0.5),
    "draft_request_s": TermPrior(1.2e-5, 0.7, 0.3),
}

CPU_PRIORS = {
    "stream_bytes_per_s": TermPrior(2e10, 0.5, 0.1),
    "gemm_flops_per_s": TermPrior(2e11, 1.0, 0.2),
    "wide_tile_gain": TermPrior(1.0, HELD, HELD),
    "roofline_exponent": TermPrior(3.0, 0.7, 0.3),
    "gemm_switch_s_per_byte": TermPrior(5e-12, 2.0, 0.3),
    "switch_half_rows": TermPrior(1.0, 1.0, 0.3),
    "attention_tile_s": TermPrior(5e-6, 1.0, 0.2),
    "attention_pair_cost": TermPrior(1.0, HELD, HELD),
    "cascade_layer_s": TermPrior(1e-9, HELD, HELD),
    "layer_s": TermPrior(5e-5, 0.7, 0.3),
    "target_fixed_s": TermPrior(2e-3, 1.0, 0.5),
    "verify_fixed_s": TermPrior(2e-3, 1.0, 0.5),
    "target_request_s": TermPrior(1e-4, 1.0, 0.5),
    "verify_request_s": TermPrior(1e-4, 1.0, 0.5),
    "activation_passes": TermPrior(1.0, 0.7, 0.3),
    "draft_bytes_per_stream_byte": TermPrior(0.5, 1.0, 0.1),
    "draft_flops_per_s": TermPrior(2e11, 1.0, 0.2),
    "draft_exponent": TermPrior(2.0, 0.7, 0.3),
    "draft_switch_s_per_byte": TermPrior(1e-12, 2.0, 0.3),
    "draft_layer_s": TermPrior(5e-5, 0.7, 0.3),
    "draft_pass_layer_s": TermPrior(1e-9, HELD, HELD),
    "draft_fixed_s": TermPrior(1e-3, 1.0, 0.5),
    "draft_request_s": TermPrior(1e-4, 1.0, 0.5),
}
"""Terms of waves and graphs mean nothing here and are held still."""

RATES = ("stream_bytes_per_s", "gemm_flops_per_s", "draft_flops_per_s")
RATIOS = (
    "switch_half_rows",
    "wide_tile_gain",
    "roofline_exponent",
    "attention_pair_cost",
    "activation_passes",
    "draft_bytes_per_stream_byte",
    "draft_exponent",
)
"""Every other prior is in seconds, and is rescaled with the machine's speed as rates are."""


def compute_units(device: str | None) -> int:
    """Streaming multiprocessors of a GPU by name; 0, which means no stairs, for a CPU or an unknown device."""
    name = device or PUBLISHED_DEVICE
    is_gpu = any(word in name for word in ("NVIDIA", "GeForce", "Tesla", "RTX"))
    matches = [model for model in GPU_UNITS if model in name]
    return GPU_UNITS[max(matches, key=len)] if is_gpu and matches else 0


def draft_pass_rows(device: str | None, quant: str) -> int:
    """Rows of one pass of the drafter's kernel, 0 where it has no passes."""
    name = device or PUBLISHED_DEVICE
    return MARLIN_PASS_ROWS if quant == "w4" and compute_units(name) and not any(gpu in name for gpu in NOT_MARLIN) else 0


def priors(units: float) -> dict[str, TermPrior]:
    return GPU_PRIORS if units else CPU_PRIORS


def starting_terms(device: str | None, quant: str = "w4", speed: float = 1.0) -> Terms:
    """The priors' centres on a machine `speed` times as fast as that they were written down for."""
    assert speed > 0
    units = compute_units(device)
    values = {}
    for name, prior in priors(units).items():
        values[name] = prior.start * speed if name in RATES else prior.start if name in RATIOS else prior.start / speed
    return Terms(compute_units=units, draft_pass_rows=draft_pass_rows(device, quant), cascade_min_context=256.0, **values)
