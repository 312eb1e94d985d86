"""Every test of this folder carries the marker `gpu` and is skipped where there is no NVIDIA GPU; see examples/gpu_check.sh."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
# The helpers of the CPU engine tests serve here too.
sys.path.insert(0, str(HERE.parent / "engine"))


@pytest.hookimpl(tryfirst=True)  # before pytest's own selection by marker
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(HERE):
            item.add_marker(pytest.mark.gpu)


@pytest.hookimpl(tryfirst=True)  # before fixtures, which would start engines
def pytest_runtest_setup() -> None:
    import torch

    if not torch.cuda.is_available():
        pytest.skip("no NVIDIA GPU that torch can use")
