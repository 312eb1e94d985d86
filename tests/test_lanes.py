"""The lanes in which tests run: what stays together, and that no two share a core."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import lanes
import pytest

TESTS = Path(__file__).parent


def test_every_file_with_a_rule_exists():
    assert {*lanes.SCOPES, *lanes.LONG} <= {path.stem for path in (TESTS / "engine").glob("test_*.py")}


def test_a_file_stays_together_unless_said_otherwise():
    assert lanes.scope("tests/test_fit.py::test_a[x::y]") == lanes.scope("tests/test_fit.py::test_b") == "tests/test_fit.py"
    assert lanes.scope("tests/engine/test_greedy.py::test_a") == lanes.scope("tests/engine/test_acceptance.py::test_b")
    assert lanes.scope("tests/engine/test_modes.py::test_a") != lanes.scope("tests/engine/test_modes.py::test_b")


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2 and not lanes.in_lane(), reason="one core")
def test_lanes_share_no_core():
    code = "import os, lanes; os.sched_setaffinity(0, range(os.cpu_count())); lanes.keep_to_own_cores();print(*os.sched_getaffinity(0))"
    cores = []
    for lane in ("gw0", "gw1", "gw2"):
        environ = {**os.environ, "PYTEST_XDIST_WORKER": lane, "PYTEST_XDIST_WORKER_COUNT": "2"}
        cores.append(
            set(subprocess.run([sys.executable, "-c", code], cwd=TESTS, env=environ, capture_output=True, text=True).stdout.split())
        )
    assert cores[0] and cores[1] and not cores[0] & cores[1]
    assert cores[2] == cores[0], "one that replaces a crashed one"
