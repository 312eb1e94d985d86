"""Stages of a longer job, each a process of its own, and whether a training run has been done already."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from command import Flags, parse_flags, to_argv
from experiment import Experiment

from openrlhf_sd.config import SelfSpecError
from openrlhf_sd.provenance import SECRET_FLAGS

LAUNCH = (sys.executable, "-m", "openrlhf_sd.launch")


class StageFailed(SystemExit):
    """Ends the program with exit code 1 and one line."""


def set_environment(experiment: Experiment) -> None:
    """For this process and all that it starts."""
    os.environ |= experiment.environment
    if experiment.gpus == 0:
        # Ray exports 1 into its own environment; left over from elsewhere it would slow everything down.
        os.environ.pop("OMP_NUM_THREADS", None)


def run_stage(name: str, command: Sequence[str]) -> float:
    """Seconds it took. Its output is the user's progress display, so it is not captured.

    Raises:
        StageFailed: it ended with another exit code than 0.
    """
    print(f"\n=== {name} ===", flush=True)
    started = time.perf_counter()
    code = _wait_for(subprocess.Popen(command))
    seconds = time.perf_counter() - started
    if code:
        raise StageFailed(f"{name}: failed (exit code {code}); see its output above; the same command goes on from here")
    print(f"=== {name}: {seconds:.0f} s ===", flush=True)
    return seconds


def train(name: str, run_dir: Path, flags: Flags) -> float:
    """Train one arm from its start. What an earlier attempt left in the run folder is moved aside, never deleted: it may hold days of
    checkpoints, or be somebody else's."""
    if run_dir.exists():
        aside = next(path for k in itertools.count(1) if not (path := run_dir.with_name(f"{run_dir.name}.unfinished-{k}")).exists())
        run_dir.rename(aside)
        print(f"{name}: did not finish before; that attempt is kept as {aside}, and it starts over", flush=True)
    return run_stage(name, [*LAUNCH, *to_argv(flags)])


def is_finished(run_dir: Path, flags: Flags) -> bool:
    """Whether the run folder holds a finished run of these flags.

    Raises:
        SelfSpecError: of other flags.
    """
    path = run_dir / "provenance.json"
    record = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if record.get("status") != "finished":
        return False
    before, now = (_without_secrets(recorded) for recorded in (parse_flags(record["argv"]), flags))
    if differing := [name for name in {**before, **now} if before.get(name) != now.get(name)]:
        raise SelfSpecError(f"{differing[0]}: {run_dir} holds a run with another value; give --out another folder")
    return True


def _without_secrets(flags: Flags) -> Flags:
    return {name: values for name, values in flags.items() if name.removeprefix("--") not in SECRET_FLAGS}


def _wait_for(process: subprocess.Popen) -> int:
    """Exit code. An interrupted stage ends Ray and the engines itself, which takes seconds, so it is waited for too."""
    ours = signal.signal(signal.SIGTERM, lambda signum, frame: process.terminate())
    interrupted = False
    try:
        while process.returncode is None:
            try:
                process.wait()
            except KeyboardInterrupt:  # the stage, in the same terminal, has got it as well
                interrupted = True
    finally:
        signal.signal(signal.SIGTERM, ours)
    if interrupted:
        raise KeyboardInterrupt
    return process.returncode
