"""One arm of one experiment.

    bash examples/run.sh MODEL ARM [--dry-run] [--model-dir DIR] [--data-dir DIR] [--steps N] [OVERRIDES]

OVERRIDES are flags of OpenRLHF or of `--self-spec.`; they replace what examples/settings says. Records go to
runs/MODEL/ARM, or to the folder `--self-spec.run_dir` names. Exit codes are those of `openrlhf-sd`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

import stages
from checks import check_flags, check_machine
from cli import Parser, exit_code, report_checked
from command import arm_flags, parse_flags, shown, to_argv
from experiment import ARMS, MODELS, load
from inputs import make_inputs, named_by_user

PROG = "run.sh"


def main(argv: Sequence[str] | None = None) -> int:
    return exit_code(PROG, lambda: run(argv))


def run(argv: Sequence[str] | None) -> int:
    """Becomes `openrlhf-sd` when all is there. Raises SelfSpecError before anything has started."""
    parser = Parser(__doc__)
    parser.add_argument("model", metavar="MODEL", help=", ".join(MODELS))
    parser.add_argument("arm", metavar="ARM", help=", ".join(ARMS))
    parser.add_shared_flags()
    args, override_tokens = parser.parse_known_args(argv)
    experiment, overrides = load(args.model), parse_flags(override_tokens)
    run_dir = Path("runs", args.model, args.arm)
    flags = arm_flags(experiment, args.arm, run_dir, args.model_dir, args.data_dir, args.steps, overrides)
    named = named_by_user(overrides, args.model_dir, args.data_dir)
    check_flags(experiment, flags)
    if args.dry_run:
        print(shown(flags, experiment.environment), flush=True)
        report_checked(PROG, experiment, flags, named)
        return 0
    check_machine(experiment)
    stages.set_environment(experiment)
    make_inputs(experiment, flags, named)
    sys.stdout.flush()
    os.execv(sys.executable, [*stages.LAUNCH, *to_argv(flags)])


if __name__ == "__main__":
    sys.exit(main())
