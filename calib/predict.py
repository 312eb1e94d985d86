"""Predict step times and the decision at one point from a calibration.

python -m calib.predict --calibration CAL.json --batch 16 --seq 2048 --gamma 7 --acceptance 0.9 --json
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from typing import Any

from calib.accuracy import DEFAULT_MARGIN
from calib.command_line import CommandParser, number
from calib.sweep_csv import PROMPTS
from openrlhf_sd.calibration import Calibration, load
from openrlhf_sd.config import MAX_GAMMA, SelfSpecError
from openrlhf_sd.policy.speedup import cycle_s, geometric_acceptance_length, speedup


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 2 on bad input."""
    try:
        args = _parser().parse_args(argv)
        prediction = predict(load(args.calibration), args.prompts, args.batch, args.seq, args.gamma, args.acceptance, args.margin)
    except SelfSpecError as error:
        print(f"calib.predict: {error}", file=sys.stderr)
        return 2
    print(json.dumps(prediction, indent=1) if args.json else _as_text(prediction))
    return 0


def predict(
    calibration: Calibration,
    prompts: str,
    batch: int,
    context: int,
    gamma: int,
    acceptance: float,
    margin: float = DEFAULT_MARGIN,
) -> dict[str, Any]:
    """The printed document; times in seconds. `decision` is "speculate" at a speed-up of at least 1 + margin, else "plain"."""
    costs = calibration.cost_model.under(prompts)
    length = geometric_acceptance_length(acceptance, gamma)
    gain = float(speedup(costs, batch, context, gamma, length))
    return {
        "calibration": calibration.describe(),
        "prompts": prompts,
        "batch": batch,
        "seq": context,
        "gamma": gamma,
        "acceptance": acceptance,
        "margin": margin,
        "target_step_s": float(costs.target_step_s(batch, context)),
        "draft_step_s": float(costs.draft_step_s(batch, context)),
        "verify_step_s": float(costs.verify_step_s(batch, context, gamma)),
        "cycle_s": float(cycle_s(costs, batch, context, gamma)),
        "mean_acceptance_length": length,
        "speedup": gain,
        "decision": "speculate" if gain >= 1 + margin else "plain",
    }


def _as_text(prediction: dict[str, Any]) -> str:
    at_boundary = f"speculate from {1 + prediction['margin']:.2f} on"
    return "\n".join(
        [
            f"calibration              {prediction['calibration']}",
            f"target decode step       {1000 * prediction['target_step_s']:8.3f} ms",
            f"draft step               {1000 * prediction['draft_step_s']:8.3f} ms",
            f"verify step              {1000 * prediction['verify_step_s']:8.3f} ms",
            f"cycle of {prediction['gamma']:2d} draft steps   {1000 * prediction['cycle_s']:8.3f} ms",
            f"tokens per cycle         {prediction['mean_acceptance_length']:8.3f}",
            f"speed-up                 {prediction['speedup']:8.3f}",
            f"decision                 {prediction['decision']} ({at_boundary})",
        ]
    )


def _parser() -> CommandParser:
    parser = CommandParser("calib.predict", __doc__)
    parser.add_argument("--calibration", required=True, metavar="CAL.json", help="written by calib.fit or calib.transfer")
    parser.add_argument("--batch", required=True, type=number(int, 1, math.inf), metavar="N", help="decoding requests")
    parser.add_argument("--seq", required=True, type=number(int, 1, math.inf), metavar="N", help="mean tokens in context")
    parser.add_argument("--gamma", required=True, type=number(int, 1, MAX_GAMMA), metavar="N", help="draft tokens per request and cycle")
    parser.add_argument(
        "--acceptance", required=True, type=number(float, 0, 1), metavar="A", help="probability that a draft token is accepted"
    )
    parser.add_argument(
        "--margin",
        type=number(float, 0, math.inf),
        default=DEFAULT_MARGIN,
        metavar="M",
        help="speculate at a speed-up of at least 1 + M (default: %(default)s)",
    )
    parser.add_argument(
        "--prompts",
        choices=PROMPTS,
        default="distinct",
        help="identical: all requests share one prefix-cached prompt (default: %(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document, times in seconds")
    return parser


if __name__ == "__main__":
    sys.exit(main())
