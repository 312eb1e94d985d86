"""Two engines that are both up, plain vLLM and the self-speculating one, measured in turns until a cell has its medians."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence

from calib import sweep_plan
from calib.cell_times import CellTimes, TimedStep, cell_times
from calib.sweep_plan import Cell
from calib.timing_engine import TimingEngine
from openrlhf_sd.config import SelfSpecError

MAX_ROUNDS = 40
"""Of fast models: more rounds would not narrow a median below what the machine drifts."""

SETTLE_S = 0.03
"""vLLM's CPU worker polls this long for its next call (`cpu/worker.py`), on the core that the other engine is
measured on."""

MAX_CONTEXT_ERROR = 0.2

WARM_UP_CONTEXT = 16


class TakingTurns:
    """Measures cells on two engines that are both up."""

    def __init__(self, plain: TimingEngine, self_spec: TimingEngine, cell_s: float) -> None:
        self._plain = plain
        self._self_spec = self_spec
        self._cell_s = cell_s
        self._growth_share = 1.0
        """What a script really adds to a request, over what it would add if every draft were accepted."""

    def warm_up(self, cells: Sequence[Cell]) -> dict[int, float]:
        """First calls compile; once more at another batch, because the first shape is taken for a constant. At a short context, because
        only the batch matters for that.

        Returns roughly the seconds of a step by the tokens it computes.
        """
        seconds = {}
        for pick in (min, max):
            cell = pick(cells, key=lambda cell: cell.batch)
            cell = dataclasses.replace(cell, context=min(cell.context, WARM_UP_CONTEXT))
            plain, self_spec = self._turn(cell, sweep_plan.next_script(cell, sweep_plan.blocks(cell.gammas)), None)
            seconds[cell.batch] = statistics.median(step.step_s for step in plain)
            for gamma in {step.gamma_verified for step in self_spec if step.gamma_verified and not step.gamma_drafted}:
                verify_s = statistics.median(step.step_s for step in self_spec if (step.gamma_verified, step.gamma_drafted) == (gamma, 0))
                seconds[cell.batch * (gamma + 1)] = verify_s
        return seconds

    def measure(self, cell: Cell, report: Callable[[float], None]) -> CellTimes:
        """Turns until the cell has had its time and its rounds. `report` is told the share of the cell that is done.

        Raises:
            SelfSpecError: the engine fails, or the context could not be held.
        """
        started = time.perf_counter()
        gammas = sweep_plan.blocks(cell.gammas)
        plain: list[TimedStep] = []
        self_spec: list[TimedStep] = []
        num_blocks = 0
        share = 0.0
        while share < 1:
            script = sweep_plan.next_script(cell, gammas)
            more_plain, more_self_spec = self._turn(cell, script, _mean_context(plain, self_spec))
            plain += more_plain
            self_spec += more_self_spec
            num_blocks += sweep_plan.num_blocks(script)
            num_rounds = num_blocks / len(cell.gammas)
            in_time = max((time.perf_counter() - started) / self._cell_s, num_rounds / MAX_ROUNDS)
            share = min(num_rounds / cell.min_rounds, in_time)
            report(min(share, 1.0))
        times = cell_times(plain, self_spec, cell.gammas)
        if abs(times.mean_context - cell.context) > max(MAX_CONTEXT_ERROR * cell.context, 2):
            raise SelfSpecError(
                f"calib.sweep: batch {cell.batch} was measured at context {times.mean_context:.0f} instead of {cell.context}; "
                "give larger --seqs or smaller --gammas"
            )
        return times

    def _turn(self, cell: Cell, script: list[int], context_so_far: float | None) -> tuple[list[TimedStep], list[TimedStep]]:
        expected_growth = self._growth_share * sweep_plan.max_growth(script)
        time.sleep(SETTLE_S)
        self_spec = self._self_spec.measure(sweep_plan.bout(cell, script, expected_growth, context_so_far))
        self._growth_share = _growth_share(self_spec)
        plain_script = [0] * (len(script) // 2 + 1)
        time.sleep(SETTLE_S)
        plain = self._plain.measure(sweep_plan.bout(cell, plain_script, len(plain_script), context_so_far))
        return plain, self_spec


def _mean_context(plain: Sequence[TimedStep], self_spec: Sequence[TimedStep]) -> float | None:
    steps = (*plain, *self_spec)
    return sum(step.mean_context for step in steps) / len(steps) if steps else None


def _growth_share(steps: Sequence[TimedStep]) -> float:
    most = sum(step.gamma_verified + 1 for step in steps[:-1])
    return (steps[-1].mean_context - steps[0].mean_context) / most
