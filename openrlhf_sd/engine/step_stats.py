"""A vLLM stat logger that passes on, per engine step, the drafts verified in it."""

from __future__ import annotations

from collections.abc import Callable

from vllm.v1.metrics.loggers import AggregateStatLoggerBase
from vllm.v1.spec_decode.metrics import SpecDecodingStats


class StepStats(AggregateStatLoggerBase):
    def __init__(self, on_step: Callable[[SpecDecodingStats | None], None]) -> None:
        self._on_step = on_step

    def record(self, scheduler_stats, iteration_stats, mm_cache_stats=None, engine_idx: int = 0) -> None:
        if scheduler_stats is not None:
            self._on_step(scheduler_stats.spec_decoding_stats)

    def log_engine_initialized(self) -> None:
        pass
