"""What happens to a real run when a part of it dies, is interrupted or cannot write: it ends, says why, and leaves nothing behind."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from training import STEPS, command, make_task

from openrlhf_sd.metrics import read_rows

pytestmark = pytest.mark.slow

ENDS_WITHIN_S = 300
"""On one core a training takes two and a half minutes."""


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return make_task(tmp_path_factory.mktemp("task"))


class Run:
    """A training under way, with every process it ever had."""

    def __init__(self, run_dir: Path, policy: Path, data: Path, *flags: object, steps: int = STEPS) -> None:
        self.run_dir = run_dir
        self.log = run_dir.parent / f"{run_dir.name}.log"
        self._seen: dict[int, psutil.Process] = {}
        self.ray_folders: set[str] = set()
        with open(self.log, "wb") as log:
            line = command(run_dir, policy, data, "--self-spec", "fixed", *flags, steps=steps)
            self.process = psutil.Popen(line, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)

    def command_lines(self) -> dict[psutil.Process, str]:
        """Of every descendant that lives."""
        with contextlib.suppress(psutil.NoSuchProcess):
            for process in self.process.children(recursive=True):
                self._seen[process.pid] = process
        lines = {}
        for process in self._seen.values():
            with contextlib.suppress(psutil.NoSuchProcess):
                lines[process] = " ".join(process.cmdline())
        self.ray_folders |= {folder for line in lines.values() for folder in re.findall(r"/tmp/ray-\w+", line)}
        return lines

    def named(self, title: str) -> list[psutil.Process]:
        return [process for process, line in self.command_lines().items() if title in line]

    def wait_until(self, happens: Callable[[], object], what: str, within_s: float = 400) -> None:
        deadline = time.monotonic() + within_s
        while not happens():
            assert self.process.is_running() and self.process.status() != psutil.STATUS_ZOMBIE, self.output()[-4000:]
            assert time.monotonic() < deadline, f"{what}: not within {within_s} s\n{self.output()[-4000:]}"
            time.sleep(0.1)
            self.command_lines()

    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def ended(self) -> int:
        self.command_lines()
        return self.process.wait(timeout=ENDS_WITHIN_S)

    def survivors(self) -> list[str]:
        _, alive = psutil.wait_procs(list(self._seen.values()), timeout=5)
        return [f"{process.pid} {process.name()}" for process in alive]

    def kill(self) -> None:
        for process in [*self._seen.values(), self.process]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


@contextlib.contextmanager
def running(*args: object, **kwargs: object) -> Iterator[Run]:
    run = Run(*args, **kwargs)
    try:
        yield run
    finally:
        run.kill()


def unused_shared_memory() -> set[str]:
    """Of this machine, whoever made it: what no process has mapped."""
    mapped = set()
    for maps in Path("/proc").glob("[0-9]*/maps"):
        with contextlib.suppress(OSError):  # a process that has ended, or another user's
            mapped |= set(re.findall(r"/dev/shm/\S+", maps.read_text()))
    return set(map(str, Path("/dev/shm").glob("*"))) - mapped


def status(run_dir: Path) -> str:
    return json.loads((run_dir / "provenance.json").read_text())["status"]


STAGES: dict[str, Callable[[Run], object]] = {
    "Ray starts": lambda run: run.named("gcs_server"),
    "the engine loads": lambda run: run.named("VLLM::EngineCore"),
    "a rollout is generated": lambda run: "Generate samples:" in run.output(),
    "the policy is trained": lambda run: "Train epoch" in run.output(),
}


@pytest.mark.parametrize("stage", STAGES)
def test_ctrl_c_ends_everything(stage, warm_policy, data, tmp_path):
    before = unused_shared_memory()
    with running(tmp_path / "run", warm_policy, data) as run:
        run.wait_until(lambda: STAGES[stage](run), stage)
        os.killpg(run.process.pid, signal.SIGINT)  # a terminal sends it to every process of the group
        assert run.ended() == 130
        assert run.survivors() == []
        assert "openrlhf-sd: interrupted" in run.output().splitlines()[-1]
        assert status(run.run_dir) == "failed"
    deadline = time.monotonic() + 30
    while unused_shared_memory() - before and time.monotonic() < deadline:
        time.sleep(0.2)  # another test's process may be about to map or remove its own
    assert not unused_shared_memory() - before
    assert run.ray_folders and not any(Path(folder).exists() for folder in run.ray_folders)


@pytest.mark.parametrize("victim", ["VLLM::EngineCore", "VLLM::Worker", "ray::RolloutRayActor"])
def test_a_killed_process_ends_the_run(victim, measured, warm_policy, data, tmp_path):
    with running(tmp_path / "run", warm_policy, data) as run:
        run.wait_until(lambda: "Generate samples:" in run.output(), "a rollout")
        [process] = run.named(victim)
        started = time.monotonic()
        process.kill()
        assert run.ended() == 1
        measured(f"{victim} killed in a rollout: the run ended after {time.monotonic() - started:.0f} s")
        assert run.survivors() == []
        assert status(run.run_dir) == "failed"


def test_records_that_cannot_be_written_do_not_stop_the_training(warm_policy, data, tmp_path):
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "metrics.jsonl").symlink_to("/dev/full")
    with running(run_dir, warm_policy, data, steps=2) as run:
        assert run.ended() == 0
        output = run.output()
        assert "RECORDS INCOMPLETE" in output and "2 rows wait" in output
        assert status(run_dir) == "finished"


def test_two_runs_share_a_machine(warm_policy, data, tmp_path):
    with running(tmp_path / "a", warm_policy, data, steps=2) as a, running(tmp_path / "b", warm_policy, data, steps=2) as b:
        assert (a.process.wait(timeout=500), b.process.wait(timeout=500)) == (0, 0), a.output()[-3000:] + b.output()[-3000:]
    for run in (a, b):
        rows, num_unreadable = read_rows(run.run_dir / "metrics.jsonl")
        assert ([row["rollout"] for row in rows], num_unreadable) == ([0, 1], 0)
