"""A vLLM stat logger that passes on what the engine process tells its front end after every step."""

from __future__ import annotations

from collections.abc import Callable

from vllm.v1.metrics.loggers import AggregateStatLoggerBase
from vllm.v1.metrics.stats import IterationStats, SchedulerStats


class StepStats(AggregateStatLoggerBase):
    """Args:
    on_step: called with the scheduler's statistics of a step, and the front end's; these are None where the step sampled nothing.
    """

    def __init__(self, on_step: Callable[[SchedulerStats, IterationStats | None], None]) -> None:
        self._on_step = on_step

    def record(self, scheduler_stats, iteration_stats, mm_cache_stats=None, engine_idx: int = 0) -> None:
        if scheduler_stats is not None:
            self._on_step(scheduler_stats, iteration_stats)

    def log_engine_initialized(self) -> None:
        pass
