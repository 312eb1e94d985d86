"""Arms of one experiment in turns, over several seeds, then the page that compares them.

    bash examples/compare.sh MODEL [--arms vanilla,fixed,adaptive,auto] [--seeds 1,2] [--out DIR] [--dry-run]
                             [--model-dir DIR] [--data-dir DIR] [--steps N] [OVERRIDES]

OVERRIDES go to every arm, those of `--self-spec.` to all but vanilla. Runs are OUT/ARM-seedN and the page is
OUT/comparison/report.html. Interrupted, the same command goes on: finished runs are not repeated, an unfinished one
starts over. A run that fails ends it with the run's name, and nothing is compared.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import stages
from checks import check_flags, check_machine
from cli import Parser, exit_code, report_checked
from command import Flags, arm_flags, parse_flags, shown
from experiment import ARMS, MODELS, Experiment, check_choice, load
from inputs import make_inputs, named_by_user

from openrlhf_sd.config import SelfSpecError
from openrlhf_sd.flags import PREFIX, RUN_DIR_FLAG
from openrlhf_sd.path_names import check_names

PROG = "compare.sh"
DEFAULT_ARMS = "vanilla,fixed,adaptive,auto"
DEFAULT_SEEDS = "1,2"
SEED_FLAG = "--train.seed"


@dataclass(frozen=True)
class Run:
    """One training run of a comparison. Its folder is called as it is."""

    name: str
    folder: Path
    flags: Flags


def main(argv: Sequence[str] | None = None) -> int:
    return exit_code(PROG, lambda: run(argv))


def run(argv: Sequence[str] | None) -> int:
    """Raises SelfSpecError before anything has started."""
    parser = Parser(__doc__)
    parser.add_argument("model", metavar="MODEL", help=", ".join(MODELS))
    parser.add_argument("--arms", default=DEFAULT_ARMS, help=f"of {','.join(ARMS)} (default: {DEFAULT_ARMS})")
    parser.add_argument("--seeds", default=DEFAULT_SEEDS, help=f"values of {SEED_FLAG} (default: {DEFAULT_SEEDS})")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder for runs and page (default: runs/MODEL-compared)")
    parser.add_shared_flags()
    args, override_tokens = parser.parse_known_args(argv)
    experiment, overrides = load(args.model), parse_flags(override_tokens)
    check_names(args.out or "", "--out")
    out = (args.out or Path("runs", f"{args.model}-compared")).absolute()
    runs = [
        planned_run(experiment, arm, seed, out / f"{arm}-seed{seed}", overrides, args.model_dir, args.data_dir, args.steps)
        for arm, seed in in_turns(parse_arms(args.arms), parse_seeds(args.seeds))
    ]
    named = named_by_user(overrides, args.model_dir, args.data_dir)
    if args.dry_run:
        for each in runs:
            print(f"# {each.name}\n{shown(each.flags, experiment.environment)}\n", flush=True)
        report_checked(PROG, experiment, runs[0].flags, named)
        return 0
    check_machine(experiment)
    stages.set_environment(experiment)
    make_inputs(experiment, runs[0].flags, named)
    run_all(runs)
    stages.run_stage("comparison", compare_command(runs, out))
    return 0


def planned_run(
    experiment: Experiment,
    arm: str,
    seed: int,
    folder: Path,
    overrides: Flags,
    model_dir: str | None = None,
    data_dir: str | None = None,
    steps: int | None = None,
) -> Run:
    """One run, its flags checked.

    Args:
        overrides: for all arms; those of `--self-spec.` mean nothing to vanilla and are left out there.

    Raises:
        SelfSpecError: from the checks, or an override of what tells runs apart.
    """
    for flag, instead in ((RUN_DIR_FLAG, "--out"), (SEED_FLAG, "another seed")):
        if flag in overrides:
            raise SelfSpecError(f"{flag}: is each run's own here; give {instead} instead")
    own = {name: values for name, values in overrides.items() if arm != "vanilla" or not name.startswith(PREFIX)}
    flags = arm_flags(experiment, arm, folder, model_dir, data_dir, steps, own | {SEED_FLAG: [str(seed)]})
    check_flags(experiment, flags)
    return Run(folder.name, folder, flags)


def run_all(runs: Sequence[Run], train: Callable[[str, Path, Flags], float] = stages.train) -> dict[str, float]:
    """Train, in their order, the runs that are not finished. Seconds by name.

    Raises:
        SelfSpecError: a folder holds a finished run of other flags; nothing has been started.
        StageFailed: from `train`, with the name of the run; those after it are not started.
    """
    waiting = [each for each in runs if not stages.is_finished(each.folder, each.flags)]
    return {each.name: train(each.name, each.folder, each.flags) for each in waiting}


def in_turns(arms: Sequence[str], seeds: Sequence[int]) -> list[tuple[str, int]]:
    """(arm, seed) in the order of running: every other seed backwards, so that a machine that slows down or heats up
    favours no arm."""
    return [(arm, seed) for i, seed in enumerate(seeds) for arm in (arms if i % 2 == 0 else arms[::-1])]


def compare_command(runs: Sequence[Run], out: Path) -> list[str]:
    return [*stages.LAUNCH, "compare", *(str(each.folder) for each in runs), "--out", str(out / "comparison")]


def parse_arms(text: str) -> list[str]:
    arms = text.split(",")
    for arm in arms:
        check_choice("--arms", arm, ARMS)
    _check_unique("--arms", arms)
    return arms


def parse_seeds(text: str) -> list[int]:
    seeds = text.split(",")
    if not all(seed.isdecimal() for seed in seeds):
        raise SelfSpecError(f"--seeds: {text!r} is not a list like 1,2,3")
    _check_unique("--seeds", seeds)
    return [int(seed) for seed in seeds]


def _check_unique(flag: str, values: Sequence[str]) -> None:
    if len(set(values)) < len(values):
        raise SelfSpecError(f"{flag}: {','.join(values)} names one of them twice")


if __name__ == "__main__":
    sys.exit(main())
