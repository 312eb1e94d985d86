"""Decisions of the policies, worked out by hand."""

from __future__ import annotations

import pytest

from openrlhf_sd.config import SelfSpecConfig
from openrlhf_sd.policy.controller import RolloutAcceptance, StepObservation, make_controller


def gammas(controller, decodes: list[int]) -> list[int]:
    return [controller.next_gamma(StepObservation(num_decodes=n)) for n in decodes]


def finished(rate: float, num_drafts: int = 100, gamma: int = 10) -> RolloutAcceptance:
    drafted = num_drafts * gamma
    return RolloutAcceptance(num_drafts, drafted, round(drafted * rate))


def test_fixed_always_drafts():
    assert gammas(make_controller(SelfSpecConfig(mode="fixed", gamma=3)), [0, 1, 500]) == [3, 3, 3]


def test_fixed_gamma_0_never_drafts():
    assert gammas(make_controller(SelfSpecConfig(mode="fixed", gamma=0)), [1, 64]) == [0, 0]


def test_toggle_fires_once_and_stays_on_until_the_rollout_ends():
    controller = make_controller(SelfSpecConfig(mode="toggle", gamma=4, toggle_batch=8))
    assert gammas(controller, [20, 12, 8, 20, 3]) == [0, 0, 4, 4, 4]
    controller.end_rollout(finished(0.9))
    assert gammas(controller, [20, 8]) == [0, 4]


def test_toggle_waits_for_the_ramp_up():
    # 5 decoding requests while the prompts are still being prefilled are no tail.
    controller = make_controller(SelfSpecConfig(mode="toggle", gamma=4, toggle_batch=8, ramp_up=16))
    assert gammas(controller, [5, 8, 17, 9, 8]) == [0, 0, 0, 0, 4]


def test_toggle_is_not_fired_by_an_empty_batch():
    assert gammas(make_controller(SelfSpecConfig(mode="toggle", gamma=4, toggle_batch=8)), [0, 20]) == [0, 0]


def ladder_after(rates: list[float], start: int = 5) -> int:
    config = SelfSpecConfig(mode="adaptive", gamma=start, ladder=(3, 5, 7), toggle_batch=64)
    controller = make_controller(config)
    for rate in rates:
        controller.end_rollout(finished(rate))
    return gammas(controller, [1])[0]


@pytest.mark.parametrize(
    ("rates", "gamma"),
    [
        ([0.95], 5),  # patience 2: once is not enough
        ([0.95, 0.94], 7),
        ([0.95, 0.90, 0.95], 5),  # interrupted: the count starts over
        ([0.95] * 6, 7),  # the top rung is the top
        ([0.85, 0.80], 3),
        ([0.80] * 6, 3),
        ([0.95, 0.95, 0.80, 0.80], 5),
        ([0.95, 0.95, 0.95], 7),  # after a move the count starts over
    ],
)
def test_ladder(rates, gamma):
    assert ladder_after(rates) == gamma


def test_a_rollout_without_drafts_moves_nothing():
    config = SelfSpecConfig(mode="adaptive", gamma=5, ladder=(3, 5, 7), toggle_batch=64)
    controller = make_controller(config)
    controller.end_rollout(finished(0.95))
    controller.end_rollout(RolloutAcceptance(0, 0, 0))
    controller.end_rollout(finished(0.95))
    assert gammas(controller, [1]) == [7]
