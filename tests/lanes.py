"""Tests in lanes: pytest-xdist's workers, each with its own share of the cores, so that no engine's threads wait for another's.

Most of an engine test is one process importing vLLM; two lanes take hardly more than half the time of one.
"""

from __future__ import annotations

import os
from collections.abc import MutableMapping
from pathlib import PurePosixPath

import pytest
from xdist.scheduler import LoadScopeScheduling

SHARED_ENGINES = "engines of the warm-started policy"
SCOPES: dict[str, str | None] = {
    **dict.fromkeys(("test_acceptance", "test_greedy", "test_identical_drafter", "test_same_reward"), SHARED_ENGINES),
    # Every test here starts an engine or a training of its own.
    **dict.fromkeys(("test_collapse", "test_faults", "test_load", "test_modes", "test_prefix_caching", "test_weight_sync")),
}
"""By the name of a test file: tests of one name stay in one lane, None is for tests that may go anywhere. Else a file stays together."""


def in_lane() -> bool:
    return "PYTEST_XDIST_WORKER" in os.environ


def keep_to_own_cores(environ: MutableMapping[str, str] = os.environ) -> None:
    """Call before torch starts its threads. With fewer cores than lanes they share."""
    num_lanes = int(environ["PYTEST_XDIST_WORKER_COUNT"])
    lane = int(environ["PYTEST_XDIST_WORKER"].removeprefix("gw")) % num_lanes  # one that replaces a crashed one counts on
    cores = sorted(os.sched_getaffinity(0))
    share = len(cores) // num_lanes
    if share:
        os.sched_setaffinity(0, cores[lane * share : (lane + 1) * share])


def scope(nodeid: str) -> str:
    """What a test stays in one lane with."""
    path = nodeid.split("::")[0]
    return SCOPES.get(PurePosixPath(path).stem, path) or nodeid


class Lanes(LoadScopeScheduling):
    """In the order of collection; a lane takes the next scope when it is nearly done with its last one."""

    def __init__(self, config, log) -> None:
        super().__init__(config, log)
        config.option.loadscopereorder = False

    def _split_scope(self, nodeid: str) -> str:
        return scope(nodeid)


LONG = ("test_distribution", "test_grpo_end_to_end")
"""Files of six to ten minutes, in an order in which the second needs the warm start and the first does not."""


def longest_first(items: list[pytest.Item]) -> None:
    """Engines and trainings first, so that small tests fill the lanes at the end; while one lane makes the warm start, none needs it."""
    items.sort(
        key=lambda item: (
            "engine" not in item.path.parts and item.get_closest_marker("slow") is None,
            scope(item.nodeid) != SHARED_ENGINES,
            LONG.index(item.path.stem) if item.path.stem in LONG else len(LONG),
            "warm_policy" in getattr(item, "fixturenames", ()),
        )
    )
