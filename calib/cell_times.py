"""From the timed steps of a cell to its times. Pure.

A draft step is what a cycle takes beyond its verify step, so the parts always add up to the cycle. Not what the first drafting step takes
beyond a plain one: in asynchronous scheduling (CUDA) an engine process fetches a step's output after it has launched the next step, and
while a plain step runs the host may not get through launching draft steps. The plain step then looks longer by what is left of that, and
the first drafting step shorter.
"""

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
    """Seconds at one gamma; medians. None for a draft step that is lost in the noise of what it is the difference of."""

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
    return CellTimes(
        mean_context=statistics.fmean(step.mean_context for step in (*plain, *self_spec)),
        target_step_s=statistics.median(step.step_s for step in plain),
        target_step_sd_s=statistics.median(seconds[0, 0]),
        by_gamma={gamma: _gamma_times(gamma, seconds) for gamma in gammas},
    )


def _gamma_times(gamma: int, seconds: dict[tuple[int, int], list[float]]) -> GammaTimes:
    cycles = seconds[gamma, gamma]
    low, median, high = statistics.quantiles(cycles, n=4, method="inclusive")
    verify_step_s = statistics.median(seconds[gamma, 0])
    draft_step_s = (median - verify_step_s) / gamma
    return GammaTimes(
        draft_step_s=draft_step_s if draft_step_s > 0 else None,
        verify_step_s=verify_step_s,
        cycle_s=median,
        cycle_spread=(high - low) / median,
        num_cycles=len(cycles),
    )
