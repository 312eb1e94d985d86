"""What a running engine learns of its step times, from a trusted calibration and from none."""

from __future__ import annotations

import json
import random

import pytest
from step_world import CpuLike, GpuLike

from openrlhf_sd.policy.live_costs import LiveCosts
from openrlhf_sd.policy.rough_costs import RoughCosts
from openrlhf_sd.policy.speedup import cycle_s
from openrlhf_sd.policy.step_belief import CALIBRATED, ROUGH

CONTEXT = 200.0


class Stairs(GpuLike):
    """Steps of 7 requests take 10% longer, those of 8 as long as said: the edge of a padded graph."""

    def target_step_s(self, batch, context):
        return super().target_step_s(batch, context) * (1.1 if batch == 7 else 1.0)

    def verify_step_s(self, batch, context, gamma):
        return super().verify_step_s(batch, context, gamma) * (1.1 if batch == 7 else 1.0)


def calibrated(prior=None) -> LiveCosts:
    return LiveCosts(prior or GpuLike(), CALIBRATED, 11)


def uncalibrated() -> LiveCosts:
    return LiveCosts(RoughCosts(), ROUGH, 11)


def measure(costs: LiveCosts, truth, batch: int, gamma: int, num_steps: int, noise: float = 0.0, seed: int = 0) -> None:
    draw = random.Random(seed)
    for _ in range(num_steps):
        costs.observe(batch, CONTEXT, gamma, gamma, cycle_s(truth, batch, CONTEXT, gamma) * (1 + draw.gauss(0, noise)))


def error(costs: LiveCosts, truth, batch: int, gamma: int) -> float:
    return costs.cycles_s(batch, CONTEXT)[gamma] / cycle_s(truth, batch, CONTEXT, gamma) - 1


def test_before_any_step_it_says_what_the_calibration_says():
    costs = calibrated()
    assert all(abs(error(costs, GpuLike(), batch, gamma)) < 0.01 for batch in (1, 3, 64, 256) for gamma in (0, 1, 11))


def test_a_step_that_takes_longer_is_believed_within_ten_steps():
    truth = Stairs()
    costs = calibrated()
    measure(costs, truth, 7, 3, 10, noise=0.03)
    assert abs(error(costs, truth, 7, 3)) < 0.04
    # All gammas share it. So may other batch sizes, by about half, until they are measured; then all are known.
    assert abs(error(costs, truth, 7, 5)) < 0.05
    assert 0.03 < error(costs, truth, 64, 3) < 0.07
    measure(costs, truth, 64, 3, 10, noise=0.03)
    measure(costs, truth, 8, 3, 10, noise=0.03)
    assert all(abs(error(costs, truth, batch, 3)) < 0.04 for batch in (7, 8, 64))


def test_what_was_measured_at_a_batch_size_is_there_a_rollout_later():
    truth = Stairs()
    costs = calibrated()
    measure(costs, truth, 7, 3, 30)
    for batch in (128, 64, 32, 16, 8):
        measure(costs, truth, batch, 0, 1000)
    assert abs(error(costs, truth, 7, 3)) < 0.05


def test_slow_drafts_at_a_large_batch_do_not_condemn_small_ones():
    class SlowWhenLarge(GpuLike):
        def draft_step_s(self, batch, context):
            return super().draft_step_s(batch, context) * (4.0 if batch > 32 else 1.0)

    truth = SlowWhenLarge()
    costs = uncalibrated()
    for batch in (4, 64):
        measure(costs, truth, batch, 0, 10)
    measure(costs, truth, 4, 3, 10)
    measure(costs, truth, 64, 3, 200)
    assert abs(error(costs, truth, 4, 3)) < 0.05
    assert abs(error(costs, truth, 64, 3)) < 0.05


@pytest.mark.parametrize("is_calibrated", [True, False])
def test_plain_steps_that_get_slower_leave_cycles_where_they_were_measured(is_calibrated):
    costs = calibrated() if is_calibrated else uncalibrated()
    for batch in (8, 16):
        measure(costs, GpuLike(), batch, 0, 10)
        measure(costs, GpuLike(), batch, 3, 30)
    for batch in (8, 16):
        measure(costs, GpuLike(scale=2.0), batch, 0, 30)
    assert abs(error(costs, GpuLike(scale=2.0), 8, 0)) < 0.03
    assert abs(error(costs, GpuLike(), 8, 3)) < 0.1


@pytest.mark.parametrize("gamma", [0, 3])
def test_one_stall_is_no_step_time(gamma):
    costs = calibrated()
    measure(costs, GpuLike(), 8, gamma, 20, noise=0.03)
    costs.observe(8, CONTEXT, gamma, gamma, 5.0)
    measure(costs, GpuLike(), 8, gamma, 2)
    assert abs(error(costs, GpuLike(), 8, gamma)) < 0.06


def test_a_stall_in_the_very_first_cycle_is_forgotten():
    """A kernel that is compiled when first needed."""
    costs = uncalibrated()
    measure(costs, GpuLike(), 8, 0, 5)
    costs.observe(8, CONTEXT, 3, 3, 2.0)
    measure(costs, GpuLike(), 8, 3, 10)
    assert abs(error(costs, GpuLike(), 8, 3)) < 0.1


@pytest.mark.parametrize("truth", [GpuLike(), GpuLike(scale=40.0), CpuLike()])
def test_without_a_calibration_a_few_cycles_tell_of_neighbouring_batches_and_gammas(truth):
    costs = uncalibrated()
    assert not costs.can_decide
    for batch in (16, 8, 4):
        measure(costs, truth, batch, 0, 10, noise=0.03)
    assert costs.can_decide
    for gamma in (2, 5):
        measure(costs, truth, 8, gamma, 10, noise=0.03)
    assert abs(error(costs, truth, 8, 3)) < 0.05 and abs(error(costs, truth, 8, 9)) < 0.12
    assert abs(error(costs, truth, 6, 3)) < 0.15


@pytest.mark.parametrize("odd", [0.01, 0.1, 10.0, 100.0])
@pytest.mark.parametrize("when", [0, 1, 2])
def test_one_odd_step_at_the_start_is_no_measure_of_all_others(odd, when):
    """A kernel compiled on the way, or an output that was fetched late and the next one at once."""
    costs = uncalibrated()
    for number in range(8):
        costs.observe(32, CONTEXT, 0, 0, GpuLike().target_step_s(32, CONTEXT) * (odd if number == when else 1.0))
    measure(costs, GpuLike(), 32, 3, 5)
    assert abs(error(costs, GpuLike(), 32, 0)) < 0.01 and abs(error(costs, GpuLike(), 32, 3)) < 0.05
    measure(costs, GpuLike(), 32, 0, 20)
    assert abs(error(costs, GpuLike(), 32, 3)) < 0.05


def test_a_late_output_and_the_early_one_after_it_outweigh_each_other():
    costs = calibrated()
    for number in range(200):
        step_s = GpuLike().target_step_s(32, CONTEXT) * {4: 9.0, 5: 0.05}.get(number % 10, 1.0)
        costs.observe(32, CONTEXT, 0, 0, step_s)
    assert abs(error(costs, GpuLike(), 32, 0)) < 0.02


def test_belief_is_surer_the_nearer_it_was_measured():
    costs = uncalibrated()
    measure(costs, GpuLike(), 8, 0, 10)
    before = costs.sigma(8, 3)
    measure(costs, GpuLike(), 8, 3, 10)
    assert costs.sigma(8, 3) < costs.sigma(16, 3) < costs.sigma(128, 3) < before


def test_a_long_run_neither_forgets_nor_blows_up():
    costs = calibrated()
    first = costs.sigma(4, 3)
    measure(costs, Stairs(), 7, 3, 20)
    measure(costs, GpuLike(), 100, 0, 100_000, noise=0.03)
    assert costs.sigma(4, 3) <= first * 1.001
    assert abs(error(costs, GpuLike(), 4, 3)) < 0.1


def test_the_curves_go_through_json_and_back():
    costs = uncalibrated()
    for batch in (8, 4):
        measure(costs, GpuLike(), batch, 0, 20)
        measure(costs, GpuLike(), batch, 3, 20)
    restored = uncalibrated()
    restored.restore(json.loads(json.dumps(costs.state())))
    assert restored.state() == costs.state()
    assert abs(error(restored, GpuLike(), 4, 3)) < 0.05


def test_ratios_learned_without_a_calibration_are_not_taken_for_seconds():
    with pytest.raises(ValueError, match="without a calibration"):
        calibrated().restore(uncalibrated().state())
