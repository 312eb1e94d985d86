"""Score a calibration on measured times that its fit has not seen.

    python -m calib.validate --calibration CAL.json --sweep S.csv --json

Mean absolute percentage error and R2 of target, draft and verify steps and of whole cycles, and how often the toggle decides as the
measured times would have it (speed-up >= 1 + margin, acceptance 0.80 to 0.97 in steps of 0.01), over all points and near the boundary.
Points of the sweep that the calibration was fitted on are left out and counted; `--in-sample` scores them too. The measured target step
of such a point still serves the decisions of its cell's other points. Everything is given twice, with and without the times that look
contaminated (calib/contamination.py); the verdict is on those without, or with `--all-times` on all.

Exit code 0: all thresholds kept. 1: one is missed, or any error, with one line that says which.
"""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from calib.accuracy import DEFAULT_MARGIN, SCORED_KINDS, prediction_pairs, score, toggle_accuracy
from calib.command_line import CommandParser, number
from calib.contamination import contaminated
from calib.sweep_csv import Sweep, point_digests, read_sweep
from openrlhf_sd.calibration import Calibration, load
from openrlhf_sd.config import SelfSpecError

DEFAULT_MAX_MAPE = {"target": 0.08, "draft": 0.12, "verify": 0.12, "cycle": 0.08}
"""A cycle within 8% is what a transferred calibration is held to; its parts may err against each other by half as much again."""

DEFAULT_MIN_R2 = 0.9
DEFAULT_MIN_TOGGLE_ACCURACY = 0.93


def main(argv: Sequence[str] | None = None) -> int:
    try:
        args = _parser().parse_args(argv)
        report = validate(load(args.calibration), read_sweep(args.sweep), args.margin, args.in_sample)
        report["judged"] = "all times" if args.all_times else "without contaminated"
        report["failures"] = failures(report if args.all_times else report["without_contaminated"], vars(args))
        report["passed"] = not report["failures"]
    except SelfSpecError as error:
        print(f"calib.validate: {error}", file=sys.stderr)
        return 1
    print(json.dumps(report, indent=1) if args.json else _as_text(report))
    for failure in report["failures"]:
        print(f"calib.validate: {failure}", file=sys.stderr)
    return 0 if report["passed"] else 1


def validate(calibration: Calibration, sweep: Sweep, margin: float = DEFAULT_MARGIN, in_sample: bool = False) -> dict[str, Any]:
    """The printed document without its verdict.

    Raises:
        SelfSpecError: the sweep is of another model, device or drafter; or the fit has seen every point of it and not `in_sample`.
    """
    check_same(calibration, sweep)
    digests = point_digests(sweep.timings)
    seen = {point for point, digest in digests.items() if calibration.provenance.fitted_points.get(point) == digest}
    if len(seen) == len(digests) and not in_sample:
        raise SelfSpecError(
            f"{sweep.path}: the calibration was fitted on all of its {len(seen)} points; "
            "give a sweep with other points, or --in-sample to score these"
        )
    left_out = set() if in_sample else seen
    bad = contaminated(sweep.timings, sweep.distinct_prompts)
    clean = dataclasses.replace(sweep, timings=tuple(timing for timing in sweep.timings if timing not in bad))
    return {
        "calibration": calibration.describe(),
        "sweep": {"file": Path(sweep.path).name, "sha256": sweep.sha256, "model": sweep.model, "device": sweep.device},
        "prompts": sweep.prompts,
        "in_sample": in_sample,
        "num_points_scored": len(digests) - len(left_out),
        "num_points_fitted_on": len(seen),
        "num_points_left_out": len(left_out),
        "margin": margin,
        **_score_held_out(calibration, sweep, left_out, margin),
        "without_contaminated": {
            "num_contaminated_times": sum(timing.point not in left_out and timing.kind in SCORED_KINDS for timing in bad),
            **_score_held_out(calibration, clean, left_out, margin),
        },
    }


def _score_held_out(calibration: Calibration, sweep: Sweep, left_out: set[tuple[int, int, int]], margin: float) -> dict[str, Any]:
    pairs = prediction_pairs(calibration.cost_model, sweep)
    held_out = [pair for pair in pairs if pair.point not in left_out]
    known_targets = [pair for pair in pairs if pair.kind == "target"]
    held_out_cycles = [pair for pair in held_out if pair.kind == "cycle"]
    scores = score(held_out, margin)
    toggle = toggle_accuracy(known_targets + held_out_cycles, margin)
    return {
        "scores": {
            kind: {"mape": scores.mape[kind], "r2": scores.r_squared[kind], "num_scored": scores.num_scored[kind]} for kind in scores.mape
        },
        "toggle": dataclasses.asdict(toggle),
    }


def check_same(calibration: Calibration, sweep: Sweep) -> None:
    """Raises SelfSpecError when the sweep says that it is of another model, device or drafter; the published format says the model only."""
    there = {
        "model": calibration.model,
        "device": calibration.device,
        "quant": calibration.quant,
        "tensor_parallel_size": calibration.tensor_parallel_size,
    }
    for name, expected in there.items():
        found = getattr(sweep, name)
        # A transferred calibration was never with the model itself; its name is that of a folder or file.
        same = _alike if name == "model" and calibration.kind == "transferred" else str.__eq__
        if found is not None and not same(str(found), str(expected)):
            raise SelfSpecError(
                f"{sweep.path}: {name} is {found!r}, the calibration is for {expected!r}; give the sweep that belongs to it"
            )


def _alike(one: str, other: str) -> bool:
    """llama-3.1-8b and Llama-3.1-8B-Instruct: the same letters and digits as far as the shorter name goes."""
    one, other = ("".join(filter(str.isalnum, name.casefold())) for name in (one, other))
    return min(len(one), len(other)) > 0 and (one.startswith(other) or other.startswith(one))


def failures(scored: dict[str, Any], thresholds: dict[str, Any]) -> list[str]:
    """One line for every threshold missed. A kind of time with nothing to score is passed over; decisions there must be.

    Args:
        scored: the whole report, or its part "without_contaminated".
    """
    missed = []
    for kind, scores in scored["scores"].items():
        most, least = thresholds[f"max_{kind}_mape"], thresholds["min_r2"]
        if scores["mape"] > most:
            missed.append(f"{kind}: MAPE {scores['mape']:.2%} is above --max-{kind}-mape {most:.2%}")
        if scores["r2"] is not None and scores["r2"] < least:
            missed.append(f"{kind}: R2 {scores['r2']:.4f} is below --min-r2 {least}")
    share, least = scored["toggle"]["overall"], thresholds["min_toggle_accuracy"]
    if share is None or share < least:
        shown = "could not be judged: no cycle with a target step" if share is None else f"{share:.2%} is below"
        missed.append(f"toggle: sign accuracy {shown} --min-toggle-accuracy {least:.2%}")
    return missed


def _as_text(report: dict[str, Any]) -> str:
    clean = report["without_contaminated"]
    seen = f"{report['num_points_left_out']} left out: the calibration was fitted on them"
    if report["in_sample"]:
        seen = f"IN SAMPLE: the calibration was fitted on {report['num_points_fitted_on']} of them"
    rows = [f"{'':15}{'all times':^25}{'without contaminated':>25}", f"{'':12}" + 2 * f"{'MAPE':>9}{'R2':>9}{'times':>7}"]
    for kind, scores in report["scores"].items():
        rows.append(f"{kind:12}{_columns(scores)}{_columns(clean['scores'].get(kind))}")
    for name, key in (("decisions", "overall"), ("near", "near_boundary")):
        count = f"num_{'decisions' if key == 'overall' else key}"
        cells = "".join(f"{_share(part['toggle'][key]):>9}{'':9}{part['toggle'][count]:>7}" for part in (report, clean))
        rows.append(f"{name:12}{cells}")
    return "\n".join(
        [
            f"calibration  {report['calibration']}",
            f"sweep        {report['sweep']['file']}, {report['prompts']} prompts, {clean['num_contaminated_times']} times contaminated",
            f"points       {report['num_points_scored']} scored; {seen}",
            "",
            *rows,
            "",
            f"decisions: share decided as the measured times would have it, speed-up {1 + report['margin']:g} or not; near: those near it",
            f"verdict: {'within' if report['passed'] else 'OUTSIDE'} the thresholds ({report['judged']})",
        ]
    )


def _columns(scores: dict[str, Any] | None) -> str:
    if scores is None:
        return f"{'-':>9}{'-':>9}{0:>7}"
    r2 = "-" if scores["r2"] is None else f"{scores['r2']:.4f}"
    return f"{scores['mape']:>9.2%}{r2:>9}{scores['num_scored']:>7}"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.2%}"


def _parser() -> CommandParser:
    parser = CommandParser("calib.validate", __doc__)
    parser.add_argument("--calibration", required=True, metavar="CAL.json", help="written by calib.fit or calib.transfer")
    parser.add_argument("--sweep", required=True, metavar="S.csv", help="measured times of the same model, either format")
    parser.add_argument("--in-sample", action="store_true", help="score points that the calibration was fitted on, too")
    parser.add_argument("--all-times", action="store_true", help="judge by all times, also those that look contaminated")
    parser.add_argument(
        "--margin",
        type=number(float, 0, math.inf),
        default=DEFAULT_MARGIN,
        metavar="M",
        help="the toggle speculates at a speed-up of at least 1 + M (default: %(default)s)",
    )
    for kind, most in DEFAULT_MAX_MAPE.items():
        parser.add_argument(
            f"--max-{kind}-mape",
            type=number(float, 0, math.inf),
            default=most,
            metavar="X",
            help=f"threshold for {kind} times (default: %(default)s, that is {100 * most:.0f}%%)",
        )
    parser.add_argument(
        "--min-r2",
        type=number(float, -math.inf, 1),
        default=DEFAULT_MIN_R2,
        metavar="X",
        help="threshold for each of these times (default: %(default)s)",
    )
    parser.add_argument(
        "--min-toggle-accuracy",
        type=number(float, 0, 1),
        default=DEFAULT_MIN_TOGGLE_ACCURACY,
        metavar="X",
        help="threshold for the share of right decisions over all points (default: %(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document; shares are 0..1")
    return parser


if __name__ == "__main__":
    sys.exit(main())
