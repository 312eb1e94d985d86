"""The README's quickstart and its comparison, whole, with as few steps and arms as they take: installed, trained, compared."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from run_folders import Page

from openrlhf_sd import simulator
from openrlhf_sd.metrics import read_rows

pytestmark = pytest.mark.whole_machine

ROOT = Path(__file__).parents[2]
STEPS = 2  # the first one is left out of all times


def run_script(words: str, out: Path, arms: str, *more: str) -> subprocess.CompletedProcess[str]:
    """Runs the documented words, made short, in the environment of this test, which examples/setup.sh must have made."""
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    setup = ["bash", "examples/setup.sh", "--dry-run"]
    planned = subprocess.run(setup, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    if "up to date" not in planned.stderr:
        pytest.skip(f"would install into {sys.prefix}; bash tests/run.sh --all installs first")
    command = [*words.split(), "--steps", str(STEPS), "--out", str(out), "--arms", arms, *more]
    finished = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1800)
    assert finished.returncode == 0, finished.stdout[-6000:] + finished.stderr[-3000:]
    return finished


def assert_compared(out: Path, arms: dict[str, str]) -> None:
    """`arms` are run folders, and the arm of each."""
    for name in arms:
        assert len(read_rows(out / name / "metrics.jsonl")[0]) == STEPS
    compared = json.loads((out / "comparison" / "report.json").read_text())["arms"]
    assert [arm["arm"] for arm in compared] == list(arms.values())
    page = Page((out / "comparison" / "report.html").read_text()).text
    assert all(arm["label"] in page for arm in compared)


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory) -> tuple[Path, str]:
    """Its folder, and what it printed."""
    out = tmp_path_factory.mktemp("quickstart")
    return out, run_script("bash examples/quickstart.sh", out, "vanilla,auto").stdout


def test_quickstart(quickstart):
    out, printed = quickstart
    assert_compared(out, {"vanilla": "vanilla", "auto": "auto"})
    assert f"the page: {out / 'comparison' / 'report.html'}" in printed


def test_the_quickstart_is_replayed(measured, quickstart, capsys):
    """How well depends on what else the machine does: printed, not promised."""
    run_dir = quickstart[0] / "auto"
    arguments = ["--trace", str(run_dir / "metrics.jsonl"), "--calibration", str(run_dir / "calibration.json"), "--json"]
    assert simulator.main(arguments) == 0
    [replay] = json.loads(capsys.readouterr().out)["replay"].values()
    assert [row["rollout"] for row in replay["rollouts"]] == list(range(STEPS))
    measured(f"replay of auto, predicted against measured engine steps: {replay['overall_engine_error']:+.0%}")


def test_comparison_of_the_quickstart(quickstart, tmp_path):
    """On the quickstart's own policy and data, which it would make again otherwise."""
    made, _ = quickstart
    inputs = ("--model-dir", str(made / "warm_start"), "--data-dir", str(made / "data"))
    run_script("bash examples/compare.sh quickstart", tmp_path, "vanilla,fixed", "--seeds", "1", *inputs)
    assert_compared(tmp_path, {"vanilla-seed1": "vanilla", "fixed-seed1": "fixed"})
