"""`calib.sweep` on real engines: interrupted, continued, and its parts add up."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from calib.sweep_csv import read_rows

ROOT = Path(__file__).parents[2]
GAMMAS = (1, 3)
BATCHES = (1, 3)
CONTEXT = 48


def command(model: Path, out: Path) -> list[str]:
    flags = ["--model", str(model), "--out", str(out), "--quant", "w8a8", "--seqs", str(CONTEXT)]
    flags += ["--batches", ",".join(map(str, BATCHES)), "--gammas", ",".join(map(str, GAMMAS))]
    return [sys.executable, "-m", "calib.sweep", *flags]


@pytest.mark.whole_machine
def test_sweep_is_interrupted_and_continued(tied_policy, tmp_path, measured):
    out = tmp_path / "sweep.csv"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    first = subprocess.Popen(command(tied_policy, out), cwd=ROOT, **pipes)
    deadline = time.monotonic() + 300
    while not out.exists() and first.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    engines = psutil.Process(first.pid).children(recursive=True)
    first.send_signal(signal.SIGINT)
    _, complaints = first.communicate(timeout=120)
    assert first.returncode == 130, complaints
    assert complaints.endswith("calib.sweep: interrupted; the same command continues where it was\n")
    assert len(engines) >= 4 and not psutil.wait_procs(engines, timeout=10)[1]
    before = out.read_text()
    num_before = len(read_rows(out))
    assert 1 <= num_before < len(BATCHES) * (1 + len(GAMMAS))

    started = time.monotonic()
    second = subprocess.run(command(tied_policy, out), cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert second.returncode == 0, second.stderr
    assert f"{num_before} of 6 points are there already" in second.stdout
    assert out.read_text().startswith(before)
    rows = {(row.batch, row.gamma): row for row in read_rows(out)}
    assert set(rows) == {(batch, gamma) for batch in BATCHES for gamma in (0, *GAMMAS)}
    assert {row.context for row in rows.values()} == {CONTEXT}
    for batch in BATCHES:
        plain = rows[batch, 0]
        # Other work on the machine may hit one of the two engines only.
        assert 1 / 3 < plain.target_step_sd_s / plain.target_step_s < 3
        for gamma in GAMMAS:
            row = rows[batch, gamma]
            measured(
                f"calib.sweep, 2M parameters, batch {batch}, gamma {gamma}: draft {1000 * row.draft_step_s:.2f} ms, "
                f"verify {1000 * row.verify_step_s:.2f}, "
                f"cycle {1000 * row.cycle_s:.2f} ({row.num_cycles} timed, spread {row.cycle_spread:.0%})"
            )
            # The drafter has the policy's layers, and a step of this size is mostly overhead that both have.
            assert 0.1 < row.draft_step_s / row.verify_step_s < 1.5
            assert row.num_cycles >= 10
    measured(f"calib.sweep continued and finished in {time.monotonic() - started:.0f} s")

    third = subprocess.run(command(tied_policy, out), cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert third.returncode == 0 and "6 of 6 points are there already" in third.stdout
    assert list(tmp_path.glob("sweep.csv.*")) == [], "logs of engines that ended well"


@pytest.mark.whole_machine
def test_engine_that_cannot_start_is_one_error_with_its_cause(tied_policy, tmp_path):
    model = tmp_path / "without_weights"
    model.mkdir()
    (model / "config.json").write_text((tied_policy / "config.json").read_text())
    finished = subprocess.run(command(model, tmp_path / "s.csv"), cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert finished.returncode == 2
    assert finished.stderr.startswith("calib.sweep: the plain engine could not start: ")
    assert "Cannot find any model weights" in finished.stderr and "whole log: " in finished.stderr
    assert not (tmp_path / "s.csv").exists()
