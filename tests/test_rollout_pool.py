"""Acceptance pooled over engines."""

from __future__ import annotations

import asyncio

import pytest

from openrlhf_sd import rollout_pool
from openrlhf_sd.rollout_pool import RolloutPool


def test_every_engine_gets_the_sum_of_all():
    async def two_rollouts():
        pool = RolloutPool(num_engines=2)
        first = await asyncio.gather(pool.add(0, (10, 30, 20)), pool.add(0, (1, 3, 3)))
        # The faster engine may be a rollout ahead before the slower one has asked.
        second = await asyncio.gather(pool.add(1, (0, 0, 0)), pool.add(1, (5, 15, 10)))
        return first, second

    assert asyncio.run(two_rollouts()) == ([(11, 33, 23)] * 2, [(5, 15, 10)] * 2)


def test_a_missing_engine_is_an_error_that_says_so(monkeypatch):
    monkeypatch.setattr(rollout_pool, "TIMEOUT_S", 0.01)
    with pytest.raises(RuntimeError, match="1 of 2 engines ended rollout 3"):
        asyncio.run(RolloutPool(num_engines=2).add(3, (1, 1, 1)))


def test_engines_that_got_different_weights_are_an_error():
    async def settle(*fingerprints):
        pool = RolloutPool(num_engines=2)
        for sync, fingerprint in fingerprints:
            await pool.agree(sync, fingerprint)

    asyncio.run(settle((1, "aa"), (1, "aa"), (2, "bb"), (2, "bb")))
    with pytest.raises(RuntimeError, match=r"weight sync 2 delivered different weights to different engines \(fingerprints bb and cc\)"):
        asyncio.run(settle((1, "aa"), (1, "aa"), (2, "bb"), (2, "cc")))
