"""What the engines of a run settle among them at the end of a weight sync: they share one policy, so they shall have the same weights and
one view of its acceptance."""

from __future__ import annotations

import asyncio
from typing import Any

TIMEOUT_S = 600
"""How long an engine waits for the others at the end of a weight broadcast, which they all take part in."""


class RolloutPool:
    """A Ray actor. Every engine adds its counts once per rollout and gets the sum when all have."""

    def __init__(self, num_engines: int) -> None:
        self._num_engines = num_engines
        self._rollouts: dict[int, _Sum] = {}
        self._last_agreed: tuple[int, str] = (0, "")

    async def add(self, rollout: int, counts: tuple[int, ...]) -> tuple[int, ...]:
        """Raises RuntimeError when an engine is missing after TIMEOUT_S."""
        pooled = self._rollouts.setdefault(rollout, _Sum(len(counts)))
        pooled.add(counts)
        if pooled.num_added == self._num_engines:
            pooled.is_complete.set()
            del self._rollouts[rollout]
        try:
            await asyncio.wait_for(pooled.is_complete.wait(), TIMEOUT_S)
        except TimeoutError:
            raise RuntimeError(
                f"self-speculation: {pooled.num_added} of {self._num_engines} engines ended rollout {rollout} within {TIMEOUT_S} s of "
                "the first; the others are stuck or dead"
            ) from None
        return tuple(pooled.counts)

    async def agree(self, sync: int, fingerprint: str) -> None:
        """Every engine tells which weights it got in a sync. Raises RuntimeError where they differ."""
        last_sync, last_fingerprint = self._last_agreed
        if sync == last_sync and fingerprint != last_fingerprint:
            raise RuntimeError(
                f"self-speculation: weight sync {sync} delivered different weights to different engines (fingerprints {last_fingerprint} "
                f"and {fingerprint}); the run must not go on"
            )
        self._last_agreed = (sync, fingerprint)


class _Sum:
    def __init__(self, num_counts: int) -> None:
        self.counts = [0] * num_counts
        self.num_added = 0
        self.is_complete = asyncio.Event()

    def add(self, counts: tuple[int, ...]) -> None:
        self.counts = [total + count for total, count in zip(self.counts, counts)]
        self.num_added += 1


def start_pool(num_engines: int) -> Any:
    """Handle of a new pool actor, which needs no CPU of its own."""
    import ray

    return ray.remote(num_cpus=0)(RolloutPool).remote(num_engines)
