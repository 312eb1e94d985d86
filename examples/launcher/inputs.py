"""Models and data: what is missing, and what the launcher makes itself."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from command import Flags
from experiment import EXAMPLES, Experiment

from openrlhf_sd.config import SelfSpecError
from openrlhf_sd.preflight import DATA_SUFFIXES

MODEL_FLAG = "--actor.model_name_or_path"
PROMPTS_FLAG = "--data.prompt_dataset"
FILE_FLAGS = (PROMPTS_FLAG, "--eval.dataset", "--reward.remote_url")


def missing_inputs(experiment: Experiment, flags: Flags) -> dict[str, str]:
    """Flag -> one sentence, for each model folder and file that is not there. Names of hubs and URLs are taken on trust."""
    missing = {}
    [model] = flags[MODEL_FLAG]
    if Path(model).is_absolute() and not Path(model).is_dir():
        missing[MODEL_FLAG] = f"no folder {model}; put the model there, or give --model-dir another folder or a hub name"
    for name in FILE_FLAGS:
        for file in (Path(part) for value in flags.get(name, []) for part in value.split(",")):
            if file.suffix in (*DATA_SUFFIXES, ".py") and not file.is_file():
                missing[name] = f"no file {file}{_how_to_make(experiment, name, file)}"
    return missing


def named_by_user(overrides: Flags, model_dir: str | None, data_dir: str | None) -> set[str]:
    """The flags whose values are the user's own."""
    return set(overrides) | ({MODEL_FLAG} if model_dir else set()) | ({PROMPTS_FLAG} if data_dir else set())


def made_here(experiment: Experiment, named: set[str]) -> set[str]:
    """The flags whose folder or file the launcher makes: the quickstart's own model and prompts, never in a place that the user `named`."""
    return {MODEL_FLAG, PROMPTS_FLAG} - named if experiment.name == "quickstart" else set()


def make_inputs(experiment: Experiment, flags: Flags, named: set[str]) -> None:
    """Make what is missing and ours to make.

    Raises:
        SystemExit: that failed; it has said why.
        SelfSpecError: something else is missing.
    """
    wanted: list[str] = []
    for name in sorted(made_here(experiment, named)):
        [path] = flags[name]
        if name == MODEL_FLAG:
            wanted += ["--warm-start", path]
        else:
            wanted += ["--data", str(Path(path).parent), "--num-prompts", *flags["--data.max_samples"]]
    if wanted:
        prepare = [sys.executable, str(EXAMPLES / "quickstart" / "prepare.py"), *wanted]
        if code := subprocess.run(prepare, check=False).returncode:
            raise SystemExit(code)
    for name, sentence in missing_inputs(experiment, flags).items():
        raise SelfSpecError(f"{name}: {sentence}")


def _how_to_make(experiment: Experiment, name: str, file: Path) -> str:
    if experiment.make_data is None or not name.endswith("dataset"):
        return ""
    return f"; make it with {experiment.make_data} --out {file.parent}, or give --data-dir another folder"
