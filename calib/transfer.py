"""A calibration for a model that was never measured, from another model's on the same machine.

    python -m calib.transfer --calibration A.json --model-config DIR_OR_JSON --out C.json [--model NAME]

Bandwidths, kernel efficiencies, launch and request costs belong to the machine and are kept; bytes, FLOPs, matrix shapes, layers and
heads are counted anew from the config. Same drafter scheme and tensor-parallel size. docs/calibration.md says how far off it is.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence

from calib.command_line import CommandParser
from calib.model_config import model_name, read_model_config
from openrlhf_sd.calibration import Calibration, load
from openrlhf_sd.config import SelfSpecError
from openrlhf_sd.policy.model_constants import model_constants


def main(argv: Sequence[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        args = _parser().parse_args(argv)
        name = args.model or model_name(args.model_config)
        calibration = transfer(load(args.calibration), read_model_config(args.model_config), name, argv)
        calibration.save(args.out)
    except (SelfSpecError, OSError) as error:
        print(f"calib.transfer: {error}", file=sys.stderr)
        return 2
    print(f"{args.out}: {calibration.describe()}; predicts for {calibration.cost_model.prompts} prompts")
    return 0


def transfer(source: Calibration, config: dict, name: str, argv: Sequence[str]) -> Calibration:
    """`source` for the model of `config`. Raises SelfSpecError when the config is of no dense decoder that its ranks can share."""
    constants = model_constants(config, source.tensor_parallel_size)
    # Of this model nothing was measured, so validation may score every point of its sweep.
    provenance = dataclasses.replace(source.provenance, argv=tuple(argv), fitted_points={})
    return dataclasses.replace(
        source,
        kind="transferred",
        model=name,
        cost_model=dataclasses.replace(source.cost_model, constants=constants),
        provenance=provenance,
    )


def _parser() -> CommandParser:
    parser = CommandParser("calib.transfer", __doc__)
    parser.add_argument("--calibration", required=True, metavar="A.json", help="of a model measured on this machine")
    parser.add_argument("--model-config", required=True, metavar="DIR_OR_JSON", help="the new model's config.json or its folder")
    parser.add_argument("--out", required=True, metavar="C.json")
    parser.add_argument("--model", metavar="NAME", help="what to call it; default: its folder's or config file's name")
    return parser


if __name__ == "__main__":
    sys.exit(main())
