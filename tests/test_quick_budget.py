"""The quick sweep's plan on machines of all speeds."""

import pytest

from calib import sweep_plan
from calib.few_shot import few_shot_points
from calib.quick_budget import MIN_CELLS, MIN_CONTEXT, StepEstimate, within_budget
from calib.sweep_plan import Cell

CPU_PLAN = sweep_plan.quick_cells(
    few_shot_points(sweep_plan.CPU_BATCHES, sweep_plan.CPU_CONTEXTS, sweep_plan.QUICK_CPU_GAMMAS), sweep_plan.QUICK_CPU_GAMMAS
)


def slow_machine(ms_per_token):
    """A step of one request, then in proportion to its tokens: no memory-bound region at all."""
    return StepEstimate({1: ms_per_token / 1000, 32: 32 * ms_per_token / 1000})


def test_seconds_between_measured_steps_are_on_a_line_and_beyond_in_proportion():
    estimate = StepEstimate({2: 0.010, 8: 0.016, 16: 0.032})
    assert estimate.step_s(1) == 0.010
    assert estimate.step_s(5) == pytest.approx(0.013)
    assert estimate.step_s(64) == pytest.approx(0.128)


def test_seconds_of_a_cell():
    # One token 1 ms, two 1 ms, ever after 0.5 ms a token. Batch 2, gamma 1, two rounds: a block has 2 + 3 + 2 plain steps' worth of 1 ms
    # and 3 verify steps of 4 tokens, 2 ms: 13 ms. Context 34 may grow by 17, a block adds 8 and the first step 1: both rounds in one bout;
    # prompts of 2 x 34 tokens on two engines: 2 x 34 ms.
    estimate = StepEstimate({1: 0.001, 2: 0.001, 4: 0.002})
    assert estimate.cell_s(Cell(batch=2, context=34, gammas=(1,), min_rounds=2)) == pytest.approx(2 * 0.013 + 0.068)


def test_a_fast_machine_keeps_its_plan():
    assert within_budget(CPU_PLAN, 75.0, slow_machine(ms_per_token=0.02)) == CPU_PLAN


@pytest.mark.parametrize("ms_per_token", [1, 5, 13, 40])
def test_a_slow_machine_gets_a_plan_it_can_pay(ms_per_token):
    estimate = slow_machine(ms_per_token)
    plan = within_budget(CPU_PLAN, 75.0, estimate)
    assert sum(map(estimate.cell_s, plan)) <= 75.0
    assert len(plan) >= MIN_CELLS and len({cell.batch for cell in plan}) >= 2
    assert all(cell.context >= MIN_CONTEXT for cell in plan)
    places = [(cell.batch, cell.context) for cell in plan]
    assert len(set(places)) == len(places)


def test_an_impossible_budget_keeps_the_fewest_cells_that_can_be_fitted():
    plan = within_budget(CPU_PLAN, 1.0, slow_machine(ms_per_token=1000))
    assert len(plan) == MIN_CELLS and all(len(cell.gammas) == 1 and cell.context == MIN_CONTEXT for cell in plan)
