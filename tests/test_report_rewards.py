"""A reward difference is between trainings: steps of one run make no interval."""

from __future__ import annotations

import random

import pytest
from scipy.stats import ttest_ind, ttest_rel

from openrlhf_sd.report_rewards import reward_difference


def runs(mean: float, count: int, seed: int) -> list[list[float]]:
    """Rewards of 8 steps each, that differ more from run to run than from step to step."""
    random.seed(seed)
    luck = [random.gauss(mean, 0.1) for _ in range(count)]
    return [[random.gauss(level, 0.01) for _ in range(8)] for level in luck]


def means(group: list[list[float]]) -> list[float]:
    return [sum(run) / len(run) for run in group]


@pytest.mark.parametrize("num_pairs", [1, 2])
def test_few_pairs_make_no_claim_however_many_steps_they_have(num_pairs):
    found = reward_difference([([[0.9] * 100], [[0.1] * 99 + [0.2]])] * num_pairs)
    assert found.value == pytest.approx(0.8, abs=0.01)
    assert (found.low, found.high) == (None, None)
    assert found.verdict.startswith("no interval from ")


def test_pairs_of_equal_seed_make_a_paired_interval():
    arm, base = runs(0.5, 5, 1), runs(0.8, 5, 2)
    found = reward_difference([([run], [other]) for run, other in zip(arm, base)])
    expected = ttest_rel(means(arm), means(base)).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
    assert found.verdict == "lower (5 pairs of runs)"
    assert (found.n, found.n_baseline, len(found.by_pair)) == (5, 5, 5)


def test_runs_without_a_common_seed_make_welchs():
    arm, base = runs(0.8, 4, 3), runs(0.79, 6, 4)
    found = reward_difference([(arm, base)])
    expected = ttest_ind(means(arm), means(base), equal_var=False).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
    assert found.verdict.startswith("no difference detected at 4 and 6 runs; one under about ")


def test_a_pair_without_rewards_is_left_out():
    assert reward_difference([([[]], [[0.5]])]).verdict == "missing"
    assert reward_difference([([[]], [[0.5]]), ([[0.5]], [[0.25]])]).value == 0.25
