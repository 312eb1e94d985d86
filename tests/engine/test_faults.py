"""What happens to a real run when a part of it dies, is interrupted or cannot write: it ends, says why, and leaves nothing behind."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from run_under_way import Run, running, status
from training import make_task

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return make_task(tmp_path_factory.mktemp("task"))


def unused_shared_memory() -> set[str]:
    """Of this machine, whoever made it: what no process has mapped."""
    mapped = set()
    for maps in Path("/proc").glob("[0-9]*/maps"):
        with contextlib.suppress(OSError):  # a process that has ended, or another user's
            mapped |= set(re.findall(r"/dev/shm/\S+", maps.read_text()))
    return set(map(str, Path("/dev/shm").glob("*"))) - mapped


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


def test_a_run_that_is_ended_while_it_measures_this_machine_leaves_no_engine(warm_policy, data, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))  # no calibration is kept there
    with running(tmp_path / "run", warm_policy, data, mode="auto") as run:
        run.wait_until(lambda: run.named("calib.timing_engine"), "an engine of the sweep")
        run.process.terminate()  # the launcher alone, as a scheduler may; Ctrl-C of a terminal reaches the sweep by itself
        assert run.ended() == 130
        assert run.survivors() == []
        assert "openrlhf-sd: interrupted" in run.output().splitlines()[-1]


def test_a_policy_of_no_numbers_ends_the_run(warm_policy, data, tmp_path):
    """A step of this size leaves nothing finite; the trainer itself would go on, and the engines sample from NaN."""
    with running(tmp_path / "run", warm_policy, data, "--actor.adam.lr", "1e60") as run:
        assert run.ended() == 1
        assert run.survivors() == []
        assert "parameters arrived with NaN or infinity, the first model." in run.output()
        assert status(run.run_dir) == "failed"


def test_an_engine_that_cannot_start_ends_the_run(warm_policy, data, tmp_path, monkeypatch):
    """OpenRLHF would wait for it to join the trainer's process group."""
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "zero")
    with running(tmp_path / "run", warm_policy, data) as run:
        assert run.ended() == 1
        assert run.survivors() == []
        output = run.output()
        assert "openrlhf-sd: error: a rollout engine could not start (RuntimeError: Engine core" in output.splitlines()[-1]
        assert "ValueError: invalid literal for int() with base 10: 'zero'" in output
        assert status(run.run_dir) == "failed"


@pytest.mark.parametrize("victim", ["VLLM::EngineCore", "ray::RolloutRayActor"])
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
