"""What tests measure is shown at the end of every run, not only in those that fail; and how they are spread over lanes."""

from __future__ import annotations

import gc
import signal
from collections.abc import Callable

import lanes
import pytest

from openrlhf_sd import garbage

# A shell starts what it sends to the background with SIGINT ignored, and so do all its children: tests that interrupt one
# would wait in vain.
signal.signal(signal.SIGINT, signal.default_int_handler)

if lanes.in_lane():
    lanes.keep_to_own_cores()

# Collecting imports torch, transformers and vLLM; the search for garbage goes on when that is done.
gc.disable()
garbage.end_without_search()

MEASURED = "measured"
_LINES: dict[str, list[str]] = {}
"""By test, in this order at the end: lanes finish as they like."""


@pytest.fixture
def measured(request) -> Callable[[str], None]:
    """Takes one line of the section "measured"."""
    return lambda line: request.node.user_properties.append((MEASURED, line))


def pytest_runtest_logreport(report) -> None:
    lines = [line for name, line in report.user_properties if name == MEASURED]
    if lines:  # those of setup and call come again with each later phase
        _LINES[report.nodeid] = lines


def pytest_terminal_summary(terminalreporter) -> None:
    if _LINES:
        terminalreporter.section(MEASURED)
        for nodeid in sorted(_LINES):
            for line in _LINES[nodeid]:
                terminalreporter.write_line(line)


def pytest_collection_finish() -> None:
    gc.enable()


def pytest_xdist_make_scheduler(config, log):
    return lanes.Lanes(config, log)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items) -> None:
    """In one lane tests without an engine come first: they say most for their time."""
    if lanes.in_lane():
        lanes.longest_first(items)
    else:
        items.sort(key=lambda item: "engine" in item.path.parts)
