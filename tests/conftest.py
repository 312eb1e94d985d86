"""What tests measure is shown at the end of every run, not only in those that fail."""

from __future__ import annotations

import signal
from collections.abc import Callable

import pytest

# A shell starts what it sends to the background with SIGINT ignored, and so do all its children: tests that interrupt one
# would wait in vain.
signal.signal(signal.SIGINT, signal.default_int_handler)

_LINES: list[str] = []


@pytest.fixture
def measured() -> Callable[[str], None]:
    """Takes one line of the section "measured"."""
    return _LINES.append


def pytest_terminal_summary(terminalreporter) -> None:
    if _LINES:
        terminalreporter.section("measured")
        for line in _LINES:
            terminalreporter.write_line(line)
