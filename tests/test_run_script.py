"""tests/run.sh in a repository of a few tests: what it runs without flags and with --all. Nothing is installed."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
TESTS = """\
import pytest

def test_usual(): pass

@pytest.mark.slow
def test_slow(): pass

@pytest.mark.whole_machine
def test_timing(): pass

@pytest.mark.slow
def test_shows(measured): measured("so much")
"""


@pytest.fixture
def repository(tmp_path) -> Path:
    for name in ("pyproject.toml", "tests/run.sh", "tests/env.sh", "tests/conftest.py", "tests/lanes.py", "tests/gpu/conftest.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "tests" / "test_some.py").write_text(TESTS)
    (tmp_path / "tests" / "gpu" / "test_cuda.py").write_text("def test_gpu(): pass\n")
    setup = tmp_path / "examples" / "setup.sh"
    setup.parent.mkdir()
    setup.write_text(f'echo "$@" > {tmp_path}/asked\necho {sys.executable}\n')
    return tmp_path


def run(repository: Path, *flags: str) -> tuple[int, dict[str, str], str]:
    """(exit code, what became of each test that was not left out, what pytest printed)"""
    command = ["bash", "tests/run.sh", *flags, "-v"]
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True, timeout=120)
    # In lanes a line begins with the outcome, else it ends with it.
    found = re.findall(r"(?:([A-Z]+) )?tests/\S+::(test_\w+)(?: ([A-Z]+))?", done.stdout)
    return done.returncode, {name: before or after for before, name, after in found if before or after}, done.stdout


def test_without_flags_it_runs_what_is_neither_slow_nor_for_gpus(repository):
    assert run(repository)[:2] == (0, {"test_usual": "PASSED"})


def test_all_is_what_this_machine_can_run(repository):
    code, results, shown = run(repository, "--all", "--venv", "some/venv")
    has_gpu = torch.cuda.is_available()
    passed = dict.fromkeys(("test_usual", "test_slow", "test_timing", "test_shows"), "PASSED")
    assert (code, results) == (0, {**passed, "test_gpu": "PASSED" if has_gpu else "SKIPPED"})
    assert has_gpu or "no NVIDIA GPU that torch can use" in shown
    assert shown.count("so much") == 1, "measured in a lane, shown at the end"
    assert (repository / "asked").read_text() == "--venv some/venv\n"


@pytest.mark.parametrize("marker", ["slow", "whole_machine"])
def test_a_failure_in_either_part_of_all_is_a_failure(repository, marker):
    (repository / "tests" / "test_broken.py").write_text(f"import pytest\n@pytest.mark.{marker}\ndef test_broken(): assert False\n")
    code, results, _ = run(repository, "--all", "-n", "0")
    assert code == 1 and results["test_broken"] == "FAILED" and results["test_slow"] == "PASSED"


def test_arguments_that_select_tests_of_one_part_only(repository):
    assert run(repository, "--all", "-n", "0", "-k", "test_timing")[:2] == (0, {"test_timing": "PASSED"})
    assert run(repository, "--all", "-n", "0", "-k", "test_slow")[:2] == (0, {"test_slow": "PASSED"})
    assert run(repository, "--all", "-n", "0", "-k", "test_nothing")[0] == 5
