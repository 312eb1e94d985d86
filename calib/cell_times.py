"""From the timed steps of a cell to its times. Pure."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple


class TimedStep(NamedTuple):
    """One engine step: verified `gamma_verified` drafts of each request, then drafted `gamma_drafted`. See `calib/sweep_plan.py`."""

    step_s: float
    gamma_verified: int
    gamma_drafted: int
    mean_context: float


@dataclass(frozen=True)
class GammaTimes:
    """Seconds at one gamma; medians. None for a draft step that is lost in the noise of the steps it is the difference of."""

    draft_step_s: float | None
    verify_step_s: float
    cycle_s: float
    cycle_spread: float
    """Interquartile range over median."""

    num_cycles: int


@dataclass(frozen=True)
class CellTimes:
    mean_context: float
    target_step_s: float
    target_step_sd_s: float
    by_gamma: dict[int, GammaTimes]


def cell_times(plain: Sequence[TimedStep], self_spec: Sequence[TimedStep], gammas: Sequence[int]) -> CellTimes:
    """Each kind of step is there at least once (cycles: twice); the scripts of `calib/sweep_plan.py` see to it."""
    seconds: dict[tuple[int, int], list[float]] = defaultdict(list)
    for step in self_spec:
        seconds[step.gamma_verified, step.gamma_drafted].append(step.step_s)
    target_step_sd_s = statistics.median(seconds[0, 0])
    return CellTimes(
        mean_context=statistics.fmean(step.mean_context for step in (*plain, *self_spec)),
        target_step_s=statistics.median(step.step_s for step in plain),
        target_step_sd_s=target_step_sd_s,
        by_gamma={gamma: _gamma_times(gamma, target_step_sd_s, seconds) for gamma in gammas},
    )


def _gamma_times(gamma: int, target_step_sd_s: float, seconds: dict[tuple[int, int], list[float]]) -> GammaTimes:
    draft_step_s = (statistics.median(seconds[0, gamma]) - target_step_sd_s) / gamma
    cycles = seconds[gamma, gamma]
    low, median, high = statistics.quantiles(cycles, n=4, method="inclusive")
    return GammaTimes(
        draft_step_s=draft_step_s if draft_step_s > 0 else None,
        verify_step_s=statistics.median(seconds[gamma, 0]),
        cycle_s=median,
        cycle_spread=(high - low) / median,
        num_cycles=len(cycles),
    )
