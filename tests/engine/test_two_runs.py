"""Two trainings at the same time, one of which cannot write what it records."""

from __future__ import annotations

import pytest
from run_under_way import Run, running, status
from training import make_task

from openrlhf_sd.metrics import read_rows

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def two_runs(warm_policy, tmp_path_factory) -> tuple[Run, Run]:
    """The second one cannot write."""
    data = make_task(tmp_path_factory.mktemp("task"))
    folder = tmp_path_factory.mktemp("two")
    (folder / "full").mkdir()
    (folder / "full" / "metrics.jsonl").symlink_to("/dev/full")
    with running(folder / "whole", warm_policy, data, steps=2) as whole, running(folder / "full", warm_policy, data, steps=2) as full:
        exits = whole.process.wait(timeout=500), full.process.wait(timeout=500)
        assert exits == (0, 0), whole.output()[-3000:] + full.output()[-3000:]
    return whole, full


def test_two_runs_share_a_machine(two_runs):
    rows, num_unreadable = read_rows(two_runs[0].run_dir / "metrics.jsonl")
    assert ([row["rollout"] for row in rows], num_unreadable) == ([0, 1], 0)


def test_records_that_cannot_be_written_do_not_stop_the_training(two_runs):
    output = two_runs[1].output()
    assert "RECORDS INCOMPLETE" in output and "2 rows wait" in output
    assert status(two_runs[1].run_dir) == "finished"
