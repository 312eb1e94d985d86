"""Draw where a calibration says that speculation pays, and, given a sweep, how far it is off.

    python -m calib.plot --calibration CAL.json [--sweep S.csv] --out FILE.png

Upper row: predicted speed-up over batch and context at one gamma, one panel per acceptance; the black line is the toggle's boundary
(speed-up 1 + margin), hatched is outside the range of the points that the calibration was fitted on. With a sweep of that gamma, each
measured cell is a dot: filled where the measured times say speculate, hollow where they say plain.
Lower row, with a sweep: predicted over measured time - 1, by batch, for target, draft and verify steps and whole cycles; hollow where the
time looks contaminated (calib/contamination.py). These include points that the fit has seen; `calib.validate` is the judge.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from calib.accuracy import (
    DEFAULT_MARGIN,
    Pair,
    costs_in_sweep,
    cycles_with_targets,
    known_speedup,
    prediction_pairs,
)
from calib.command_line import CommandParser, number, numbers
from calib.plot_residuals import draw_residuals, log2_axis
from calib.sweep_csv import PROMPTS, Sweep, read_sweep
from calib.validate import check_same
from openrlhf_sd.calibration import Calibration, load
from openrlhf_sd.config import MAX_GAMMA, SelfSpecError
from openrlhf_sd.policy.speedup import StepCosts, geometric_acceptance_length, speedup

DEFAULT_LARGEST = (64, 4096)
"""Largest batch and context of the map when the calibration holds no fitted points to take them from."""

SMALLEST_CONTEXT = 128

DEEPEST = 2.0
"""Speed-up at which the colour ends; the boundary lies far within."""
SPEEDUP_TICKS = (0.5, 0.6, 0.7, 0.8, 0.9, 1, 1.1, 1.25, 1.5, 1.75, 2)

STYLE = {
    "font.size": 11,
    "axes.titlesize": 10.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "hatch.linewidth": 0.5,
    "figure.dpi": 110,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 2 on bad input."""
    try:
        args = _parser().parse_args(argv)
        if Path(args.out).suffix != ".png":
            raise SelfSpecError(f"--out: {args.out} does not end in .png; name a PNG file")
        calibration = load(args.calibration)
        sweep = None if args.sweep is None else read_sweep(args.sweep)
        if sweep is not None:
            check_same(calibration, sweep)
        settings = MapSettings(args.gamma, args.acceptance, args.margin, args.prompts, args.max_batch, args.max_seq)
        draw(calibration, sweep, args.out, settings)
    except SelfSpecError as error:
        print(f"calib.plot: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(
            f"calib.plot: --out: {args.out} cannot be written ({error.strerror}); name a file in a folder of yours",
            file=sys.stderr,
        )
        return 2
    print(f"wrote {args.out}")
    return 0


@dataclass(frozen=True)
class MapSettings:
    gamma: int = 7
    acceptances: Sequence[float] = (0.8, 0.9, 0.95)
    margin: float = DEFAULT_MARGIN
    prompts: str | None = None
    """None: as in the sweep, or distinct without one."""

    max_batch: int | None = None
    max_context: int | None = None
    """None: the largest fitted or measured."""


def draw(calibration: Calibration, sweep: Sweep | None, out: str | Path, settings: MapSettings) -> None:
    """Write the PNG. Residuals are taken under the sweep's own conditions. Raises OSError."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    pairs = [] if sweep is None else prediction_pairs(calibration.cost_model, sweep)
    prompts = settings.prompts or ("distinct" if sweep is None else sweep.prompts)
    costs = calibration.cost_model.under(prompts)
    if sweep is not None and prompts == sweep.prompts:
        costs = costs_in_sweep(calibration.cost_model, sweep, settings.gamma)  # what its dots were measured in
    fitted = [point[:2] for point in calibration.provenance.fitted_points]
    with matplotlib.rc_context(STYLE):
        height = 4.6 if sweep is None else 8.4
        figure = Figure(figsize=(max(3.9 * len(settings.acceptances), 9.5) + 1.3, height), layout="constrained")
        FigureCanvasAgg(figure)
        title = f"{calibration.model}, drafter {calibration.quant}, TP {calibration.tensor_parallel_size}, {calibration.device}"
        figure.suptitle(f"{title} ({calibration.kind}, {prompts} prompts)", fontsize=12.5)
        parts = [figure] if sweep is None else figure.subfigures(2, 1, height_ratios=(4.4, 3.6))
        _draw_maps(parts[0], costs, fitted, pairs, settings)
        if sweep is not None:
            draw_residuals(parts[1], pairs, sweep)
        figure.savefig(out, format="png")


def _draw_maps(part, costs: StepCosts, fitted: list[tuple[int, int]], pairs: list[Pair], settings: MapSettings) -> None:
    """`fitted`: (batch, context) of the points that the calibration has seen."""
    from matplotlib.colors import LogNorm

    gamma, acceptances, margin = settings.gamma, settings.acceptances, settings.margin
    cells = fitted + [(pair.batch, pair.context) for pair in pairs] or [DEFAULT_LARGEST]
    first_context = min(SMALLEST_CONTEXT, *(context for _, context in cells))
    last_context = settings.max_context or max(2 * first_context, *(context for _, context in cells))
    batches = _whole_numbers(1, settings.max_batch or max(2, *(batch for batch, _ in cells)), 400)
    contexts = _whole_numbers(first_context, last_context, 200)
    axes = part.subplots(1, len(acceptances), sharey=True, squeeze=False)[0]
    part.supylabel("context [tokens per request]", fontsize=11)
    gains = [
        speedup(costs, batches[None, :], contexts[:, None], gamma, geometric_acceptance_length(acceptance, gamma))
        for acceptance in acceptances
    ]
    # White is no gain and no loss, twice as fast as deep as half as fast; one scale for all panels, so that they can be compared.
    extent = min(DEEPEST, max(1.25, *(float(max(gain.max(), 1 / gain.min())) for gain in gains)))
    for axis, acceptance, gain in zip(axes, acceptances, gains, strict=True):
        norm = LogNorm(1 / extent, extent)
        image = axis.pcolormesh(batches, contexts, gain, cmap="RdBu", norm=norm, shading="gouraud", rasterized=True)
        if gain.min() < 1 + margin < gain.max():
            axis.contour(batches, contexts, gain, levels=[1 + margin], colors="black", linewidths=2)
        _hatch_outside(axis, fitted, batches, contexts)
        _draw_measured(axis, pairs, gamma, acceptance, margin)
        axis.set_title(f"acceptance {acceptance:g}, gamma {gamma}: {gain.min():.2f} to {gain.max():.2f}")
        axis.set_xlabel("batch [decoding requests]")
        log2_axis(axis, "x", batches)
        log2_axis(axis, "y", contexts)
    bar = part.colorbar(image, ax=axes, label="predicted speed-up over plain decoding", pad=0.01, extend="both")
    ticks = [ratio for ratio in SPEEDUP_TICKS if 1 / extent <= ratio <= extent]
    bar.set_ticks(ticks, labels=[f"{ratio:g}" for ratio in ticks])
    bar.ax.minorticks_off()
    bar.ax.axhline(1 + margin, color="black", linewidth=2)
    _draw_key(part, margin, has_fitted=bool(fitted), has_measured=any(pair.gamma == gamma for pair in pairs))


def _draw_key(part, margin: float, has_fitted: bool, has_measured: bool) -> None:
    """What line, hatch and dots mean, below the maps."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    keys = [Line2D([], [], color="black", linewidth=2, label=f"on/off boundary: speed-up {1 + margin:g}")]
    if has_fitted:
        keys.append(Patch(fill=False, hatch="////", edgecolor="#777777", linewidth=0, label="outside the fitted range"))
    if has_measured:
        dot = {"ls": "", "marker": "o", "mec": "black"}
        keys.append(Line2D([], [], mfc="black", **dot, label="measured: speculate"))
        keys.append(Line2D([], [], mfc="white", **dot, label="measured: plain"))
    part.legend(handles=keys, loc="outside lower center", ncols=len(keys), frameon=False, fontsize=10)


def _whole_numbers(first: int, last: int, at_most: int) -> np.ndarray:
    """Evenly spaced on a log scale. Whole, because a batch is padded in steps: there is no batch of 16.3."""
    return np.unique(np.round(np.geomspace(first, last, at_most)).astype(int))


def _hatch_outside(axis, fitted: list[tuple[int, int]], batches, contexts) -> None:
    """Hatch what lies beyond the smallest and largest batch and context fitted."""
    from matplotlib.patches import Rectangle

    if not fitted:
        return
    last_batch, last_context = batches[-1], contexts[-1]
    (low_batch, high_batch), (low_context, high_context) = ((min(values), max(values)) for values in zip(*fitted, strict=True))
    boxes = [
        (batches[0], contexts[0], low_batch, last_context),
        (high_batch, contexts[0], last_batch, last_context),
        (max(low_batch, batches[0]), contexts[0], min(high_batch, last_batch), low_context),
        (max(low_batch, batches[0]), high_context, min(high_batch, last_batch), last_context),
    ]
    for left, bottom, right, top in boxes:
        if right > left and top > bottom:
            box = Rectangle((left, bottom), right - left, top - bottom)
            box.set(fill=False, hatch="////", edgecolor="#777777", linewidth=0)
            axis.add_patch(box)


def _draw_measured(axis, pairs: list[Pair], gamma: int, acceptance: float, margin: float) -> None:
    """A dot per measured cell, filled where the measured times say speculate."""
    for target, cycle in cycles_with_targets(pairs):
        if cycle.gamma == gamma:
            on = known_speedup(target.measured_s, cycle.measured_s, gamma, acceptance) >= 1 + margin
            face = "black" if on else "white"
            axis.plot(cycle.batch, cycle.context, "o", ms=5.5, mfc=face, mec="black", mew=1, clip_on=False, zorder=3)


def _parser() -> CommandParser:
    parser = CommandParser("calib.plot", __doc__)
    parser.add_argument("--calibration", required=True, metavar="CAL.json", help="written by calib.fit or calib.transfer")
    parser.add_argument("--out", required=True, metavar="FILE.png", help="the figure")
    parser.add_argument("--sweep", metavar="S.csv", help="measured times of the same model: dots and residuals")
    parser.add_argument(
        "--gamma",
        type=number(int, 1, MAX_GAMMA),
        default=MapSettings.gamma,
        metavar="N",
        help="draft tokens per cycle (default: %(default)s)",
    )
    parser.add_argument(
        "--acceptance",
        type=numbers(float, 0, 1),
        default=MapSettings.acceptances,
        metavar="A,A",
        help="one map for each (default: 0.8,0.9,0.95)",
    )
    parser.add_argument(
        "--margin",
        type=number(float, 0, math.inf),
        default=MapSettings.margin,
        metavar="M",
        help="the boundary is at a speed-up of 1 + M (default: %(default)s)",
    )
    parser.add_argument("--prompts", choices=PROMPTS, help="regime of the map (default: the sweep's; distinct without a sweep)")
    parser.add_argument(
        "--max-batch", type=number(int, 2, math.inf), metavar="N", help="of the map (default: the largest fitted or measured)"
    )
    parser.add_argument("--max-seq", type=number(int, 2 * SMALLEST_CONTEXT, math.inf), metavar="N", help="likewise")
    return parser


if __name__ == "__main__":
    sys.exit(main())
