"""The quickstart's warm-started model and its prompts, each made if it is not there:

    python examples/quickstart/prepare.py [--warm-start DIR] [--data DIR] [--num-prompts 640] [--seed 0]

The untrained model lies in `model` beside the warm-started one. A folder appears whole or not at all, so an interrupted
preparation goes on where it was.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "launcher"))  # scripts run by path: only their own folder is importable
from cli import Parser, exit_code, positive_int  # noqa: E402
from stages import run_stage  # noqa: E402

from openrlhf_sd.config import SelfSpecError  # noqa: E402

PROMPTS = "prompts.jsonl"
USUAL_PROMPTS = 640
"""Of 40 steps."""


def main(argv: Sequence[str] | None = None) -> int:
    return exit_code("quickstart", lambda: run(argv))


def run(argv: Sequence[str] | None) -> int:
    parser = Parser(__doc__)
    parser.add_argument("--warm-start", type=Path, metavar="DIR", help="folder of the warm-started model")
    parser.add_argument("--data", type=Path, metavar="DIR", help=f"folder of {PROMPTS}")
    parser.add_argument(
        "--num-prompts", type=positive_int, default=USUAL_PROMPTS, metavar="N", help="that --data has to have (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of both (default: 0)")
    args = parser.parse_args(argv)
    if args.data is not None:
        prepare_data(args.data, args.num_prompts, args.seed)
    if args.warm_start is not None:
        prepare_model(args.warm_start, args.seed)
    return 0


def prepare_data(folder: Path, num_prompts: int, seed: int) -> dict[str, float]:
    """Prompts for a run, more than it needs: a longer run of the same folder then has them too, and those drawn first are the same.
    Seconds by stage.

    Raises:
        SelfSpecError: the folder is something else, or holds too few.
    """
    if folder.exists():
        if not (folder / PROMPTS).is_file():
            raise SelfSpecError(f"--data: {folder} is there and has no {PROMPTS}; give another folder")
        if (found := num_lines(folder / PROMPTS)) < num_prompts:
            raise SelfSpecError(
                f"--data: {folder} holds {found} prompts and the run needs {num_prompts}; give fewer steps or another folder"
            )
    return make(folder, "data", "task.py", "--train", str(max(num_prompts, USUAL_PROMPTS)), "--seed", str(seed))


def prepare_model(warm_start: Path, seed: int) -> dict[str, float]:
    """Seconds by stage."""
    if warm_start.exists():
        return {}
    model = warm_start.parent / "model"
    built = make(model, "model", "build_model.py", "--seed", str(seed))
    return built | make(warm_start, "warm start", "warm_start.py", "--model", str(model), "--seed", str(seed))


def make(folder: Path, name: str, script: str, *flags: str) -> dict[str, float]:
    """Run one of this folder's scripts unless its output is there. Seconds by stage."""
    if folder.exists():
        return {}
    unfinished = folder.with_name(f"{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    seconds = run_stage(name, [sys.executable, str(HERE / script), "--out", str(unfinished), *flags])
    unfinished.rename(folder)
    return {name: seconds}


def num_lines(path: Path) -> int:
    with path.open() as lines:
        return sum(1 for _ in lines)


if __name__ == "__main__":
    raise SystemExit(main())
