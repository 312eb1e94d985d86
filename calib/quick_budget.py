"""A quick sweep that stays quick on a slow machine: a plan's seconds estimated from its warm-up, and cheaper plans. Pure."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence

from calib import sweep_plan
from calib.sweep_plan import Cell

MIN_CONTEXT = 16
MIN_ROUNDS = 2
"""Slow steps are long ones, and the longer a step the less of it is noise."""

MIN_CELLS = 4
"""What a step costs per token, at two batches at least, and at two contexts."""


class StepEstimate:
    """Args:
    step_seconds: seconds of a step by the tokens it computes. Between them a straight line, beyond the last in proportion.
    """

    def __init__(self, step_seconds: Mapping[int, float]) -> None:
        self._points = sorted(step_seconds.items())

    def step_s(self, num_tokens: float) -> float:
        first_tokens, first_s = self._points[0]
        last_tokens, last_s = self._points[-1]
        if num_tokens <= first_tokens:
            return first_s
        if num_tokens >= last_tokens:
            return last_s * num_tokens / last_tokens
        (left, left_s), (right, right_s) = next(pair for pair in itertools.pairwise(self._points) if pair[0][0] <= num_tokens <= pair[1][0])
        return left_s + (right_s - left_s) * (num_tokens - left) / (right - left)

    def cell_s(self, cell: Cell) -> float:
        """Seconds to measure a cell on both engines; a draft step is taken to cost what a plain one costs, which is too much."""
        plain_s = self.step_s(cell.batch)
        blocks_s = cell.min_rounds * sum(
            (2 + 3 * gamma + len(sweep_plan.block(gamma)) // 2) * plain_s + 3 * self.step_s(cell.batch * (gamma + 1))
            for gamma in cell.gammas
        )
        blocks_per_bout = sweep_plan.num_blocks(sweep_plan.next_script(cell, sweep_plan.blocks(cell.gammas)))
        num_bouts = math.ceil(cell.min_rounds * len(cell.gammas) / blocks_per_bout)
        return blocks_s + num_bouts * 2 * self.step_s(cell.batch * cell.context)


def within_budget(cells: Sequence[Cell], budget_s: float, estimate: StepEstimate) -> list[Cell]:
    """The plan, its dearest cell made cheaper again and again until the whole fits: first a shorter context, which a cost model
    extrapolates best, then fewer rounds, then one gamma instead of two, then without the cell. MIN_CELLS stay whatever they cost.

    A cell keeps its place in the order.
    """
    plan: list[Cell] = list(cells)
    final: set[Cell] = set()
    while sum(map(estimate.cell_s, plan)) > budget_s and len(final) < len(plan):
        dearest = max((cell for cell in plan if cell not in final), key=estimate.cell_s)
        place = plan.index(dearest)
        cheaper = _cheaper(dearest)
        if cheaper is not None:
            plan[place : place + 1] = [] if any(_same_place(cheaper, cell) for cell in plan if cell is not dearest) else [cheaper]
        elif len(plan) > MIN_CELLS:
            del plan[place]
        else:
            final.add(dearest)
    return plan


def _cheaper(cell: Cell) -> Cell | None:
    if cell.context > MIN_CONTEXT:
        return dataclasses.replace(cell, context=max(MIN_CONTEXT, cell.context // 2))
    if cell.min_rounds > MIN_ROUNDS:
        return dataclasses.replace(cell, min_rounds=MIN_ROUNDS)
    if len(cell.gammas) > 1:
        return dataclasses.replace(cell, gammas=cell.gammas[:1])
    return None


def _same_place(one: Cell, other: Cell) -> bool:
    return (one.batch, one.context) == (other.batch, other.context)
