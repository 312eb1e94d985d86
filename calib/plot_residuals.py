"""The lower row of `calib.plot`: how far predictions are off, by batch and gamma, one panel per kind of time."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from calib.accuracy import SCORED_KINDS, Pair, score
from calib.contamination import contaminated
from calib.sweep_csv import Sweep

KIND_TITLES = {"target": "target decode step", "draft": "draft step", "verify": "verify step", "cycle": "whole cycle"}
GAMMA_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
GAMMA_MARKERS = ("o", "s", "^", "D", "v", "P", "X")

OFF_SCALE = 1.6
"""The residuals' scale ends at this many times the error that 95% of the trusted times stay below; the others are drawn at its edge."""


def draw_residuals(part, pairs: list[Pair], sweep: Sweep) -> None:
    """Fill the (sub)figure `part`; hollow marks are times that look contaminated."""
    from matplotlib.lines import Line2D
    from matplotlib.ticker import PercentFormatter

    kinds = [kind for kind in SCORED_KINDS if any(pair.kind == kind for pair in pairs)]
    gammas = sorted({pair.gamma for pair in pairs if pair.kind != "target"})
    looks = {gamma: (GAMMA_COLOURS[i % 7], GAMMA_MARKERS[i % 7]) for i, gamma in enumerate(gammas)} | {0: ("#555555", "o")}
    bad = _contaminated_pairs(pairs, sweep)
    trusted = [abs(_error(pair)) for pair in pairs if pair not in bad] or [0.0]
    limit = max(0.02, float(OFF_SCALE * np.quantile(trusted, 0.95)))
    axes = part.subplots(1, len(kinds), sharey=True, squeeze=False)[0]
    part.suptitle(f"residuals on {Path(sweep.path).name}, points of the fit included", fontsize=11.5)
    axes[0].set(ylabel="predicted / measured - 1", ylim=(-limit, limit))
    axes[0].yaxis.set_major_formatter(PercentFormatter(1, symbol=" %"))
    for axis, kind in zip(axes, kinds, strict=True):
        of_kind = [pair for pair in pairs if pair.kind == kind]
        axis.axhline(0, color="black", linewidth=1)
        for pair in of_kind:
            colour, marker = looks[pair.gamma]
            # Gammas side by side, or the later would hide the earlier.
            shift = 2 ** (0.14 * (gammas.index(pair.gamma) - (len(gammas) - 1) / 2)) if pair.gamma else 1
            shown = min(limit, max(-limit, _error(pair)))
            face = "none" if pair in bad else colour
            axis.plot(pair.batch * shift, shown, marker, ms=4.5, mec=colour, mfc=face, clip_on=False)
        axis.set_title("\n".join(_residual_title(kind, of_kind, bad, limit)))
        axis.set_xlabel("batch [decoding requests]")
        axis.grid(axis="y", color="#dddddd", linewidth=0.6)
        axis.set_axisbelow(True)
        log2_axis(axis, "x", np.array([pair.batch for pair in of_kind]), pad=1.3)
    handles = [Line2D([], [], ls="", marker=looks[g][1], color=looks[g][0], label=f"gamma {g}") for g in gammas]
    if bad:
        handles.append(Line2D([], [], ls="", marker="o", mec="#555555", mfc="none", label="contaminated"))
    axes[-1].legend(handles=handles, fontsize=9, frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))


def _contaminated_pairs(pairs: list[Pair], sweep: Sweep) -> set[Pair]:
    """Those of contaminated times, and cycles derived from one."""
    bad = {(timing.kind, *timing.point) for timing in contaminated(sweep.timings, sweep.distinct_prompts)}
    whole = {timing.point for timing in sweep.timings if timing.kind == "cycle"}
    points = {key[1:] for key in bad if key[0] in ("draft", "verify")} - whole
    return {pair for pair in pairs if (pair.kind, *pair.point) in bad or (pair.kind == "cycle" and pair.point in points)}


def _residual_title(kind: str, pairs: list[Pair], bad: set[Pair], limit: float) -> list[str]:
    trusted = [pair for pair in pairs if pair not in bad]
    lines = [KIND_TITLES[kind], f"MAPE {score(pairs).mape[kind]:.1%}"]
    if trusted and len(trusted) < len(pairs):
        lines[1] += f", clean {score(trusted).mape[kind]:.1%}"
    num_off_scale = sum(abs(_error(pair)) > limit for pair in pairs)
    return [*lines, f"({num_off_scale} off scale, at the edge)" if num_off_scale else ""]


def _error(pair: Pair) -> float:
    return pair.predicted_s / pair.measured_s - 1


def log2_axis(axis, which: str, values: np.ndarray, pad: float = 1.0) -> None:
    """Log scale with ticks at powers of two, written as numbers."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    low, high = values.min(), max(values.max(), values.min() + 1)
    powers = [2**power for power in range(21) if low <= 2**power <= high]
    while len(powers) > 8:
        powers = powers[::2]
    getattr(axis, f"set_{which}scale")("log", base=2)
    getattr(axis, f"set_{which}lim")(low / pad, high * pad)
    scale = getattr(axis, f"{which}axis")
    scale.set_major_locator(FixedLocator(powers))
    scale.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}" if value < 1024 else f"{value / 1024:g}k"))
    scale.set_minor_locator(NullLocator())
