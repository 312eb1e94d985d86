"""The quickstart after installation: build, warm start, GRPO vanilla and with --self-spec, comparison; prints what each stage took.

    python examples/quickstart/run.py --out DIR [--steps 15] [--seed 0] [--arms vanilla,auto] [flags for all training runs]

All arms get the same OpenRLHF flags, those of examples/settings/quickstart.toml; only `--self-spec*` and the run folders
differ. Stages that are done are not repeated, so an interrupted quickstart goes on where it was; a finished one is refused
rather than overwritten.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "launcher"))  # scripts run by path: only their own folder is importable
import prepare  # noqa: E402
from cli import Parser, exit_code, positive_int  # noqa: E402
from command import parse_flags  # noqa: E402
from compare_arms import compare_command, parse_arms, planned_run, run_all  # noqa: E402
from experiment import ARMS, load  # noqa: E402
from stages import run_stage, set_environment  # noqa: E402

from openrlhf_sd.config import SelfSpecError  # noqa: E402
from openrlhf_sd.path_names import check_names  # noqa: E402

DEFAULT_ARMS = "vanilla,auto"


def main(argv: Sequence[str] | None = None) -> int:
    return exit_code("quickstart", lambda: run(argv))


def run(argv: Sequence[str] | None) -> int:
    experiment = load("quickstart")
    parser = Parser(__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for the model, the data, the runs and the page")
    parser.add_argument("--steps", type=positive_int, default=experiment.steps, help="GRPO steps of each arm (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the model, the data and the training (default: %(default)s)")
    parser.add_argument("--arms", default=DEFAULT_ARMS, help=f"of {','.join(ARMS)} (default: {DEFAULT_ARMS})")
    args, more_flags = parser.parse_known_args(argv)
    arms, overrides, out = parse_arms(args.arms), parse_flags(more_flags), args.out.resolve()
    check_names(out, "--out")
    if (out / "comparison").exists():
        raise SelfSpecError(f"--out: {out} holds a finished quickstart; give another folder")
    runs = [planned_run(experiment, arm, args.seed, out / arm, overrides, steps=args.steps) for arm in arms]
    set_environment(experiment)
    out.mkdir(parents=True, exist_ok=True)

    [num_prompts] = runs[0].flags["--data.max_samples"]
    seconds = prepare.prepare_data(out / "data", int(num_prompts), args.seed)
    seconds |= prepare.prepare_model(out / "warm_start", args.seed)
    seconds |= run_all(runs)
    seconds["comparison"] = run_stage("comparison", compare_command(runs, out))

    print("\nseconds per stage: " + ", ".join(f"{name} {value:.0f}" for name, value in seconds.items()))
    print(f"in all {sum(seconds.values()):.0f} s after installation; the page: {out / 'comparison' / 'report.html'}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
