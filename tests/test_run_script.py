"""tests/run.sh in a repository of three tests: what it runs without flags and with --all. Nothing is installed."""

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
"""


@pytest.fixture
def repository(tmp_path) -> Path:
    for name in ("pyproject.toml", "tests/run.sh", "tests/env.sh", "tests/gpu/conftest.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "tests" / "test_some.py").write_text(TESTS)
    (tmp_path / "tests" / "gpu" / "test_cuda.py").write_text("def test_gpu(): pass\n")
    setup = tmp_path / "examples" / "setup.sh"
    setup.parent.mkdir()
    setup.write_text(f'echo "$@" > {tmp_path}/asked\necho {sys.executable}\n')
    return tmp_path


def ends(repository: Path, *flags: str) -> tuple[dict[str, str], str]:
    """(what became of each test that was not left out, what pytest printed)"""
    command = ["bash", "tests/run.sh", *flags, "-v"]
    shown = subprocess.run(command, cwd=repository, capture_output=True, text=True, timeout=120, check=True).stdout
    return dict(re.findall(r"::(test_\w+) ([A-Z]+)", shown)), shown


def test_without_flags_it_runs_what_is_neither_slow_nor_for_gpus(repository):
    assert ends(repository)[0] == {"test_usual": "PASSED"}


def test_all_is_what_this_machine_can_run(repository):
    results, shown = ends(repository, "--all", "--venv", "some/venv")
    has_gpu = torch.cuda.is_available()
    assert results == {"test_usual": "PASSED", "test_slow": "PASSED", "test_gpu": "PASSED" if has_gpu else "SKIPPED"}
    assert has_gpu or "no NVIDIA GPU that torch can use" in shown
    assert (repository / "asked").read_text() == "--venv some/venv\n"
