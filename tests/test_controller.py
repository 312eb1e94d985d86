"""Decisions of the paper's policies, worked out by hand."""

from __future__ import annotations

import json

import pytest

from openrlhf_sd.config import SelfSpecConfig
from openrlhf_sd.policy.controller import make_controller
from openrlhf_sd.policy.observation import RolloutAcceptance, StepObservation


class LinearCosts:
    """A plain step takes 1 s up to 8 requests and 1 s per 8 beyond; a draft step half of it; verifying costs like a plain step of as
    many tokens."""

    def target_step_s(self, batch, context):
        return max(1.0, batch / 8)

    def draft_step_s(self, batch, context):
        return 0.5 * self.target_step_s(batch, context)

    def verify_step_s(self, batch, context, gamma):
        return self.target_step_s(batch * (gamma + 1), context)


def controller_of(**settings):
    return make_controller(SelfSpecConfig(**settings), LinearCosts())


def gammas(controller, decodes: list[int]) -> list[int]:
    return [controller.next_gamma(StepObservation(num_decodes=n, mean_context=100.0)) for n in decodes]


def finished(rate: float, num_drafts: int = 100, gamma: int = 10) -> RolloutAcceptance:
    drafted = num_drafts * gamma
    return RolloutAcceptance(num_drafts, drafted, round(drafted * rate))


def test_fixed_always_drafts():
    assert gammas(controller_of(mode="fixed", gamma=3), [0, 1, 500]) == [3, 3, 3]


def test_fixed_gamma_0_never_drafts():
    assert gammas(controller_of(mode="fixed", gamma=0), [1, 64]) == [0, 0]


def test_toggle_fires_once_and_stays_on_until_the_rollout_ends():
    # gamma 3, expected length at first 0.8 * 3 = 2.4. At 8 requests: T 1, D 0.5, V(32 tokens) 4: 2.4 / 5.5 < 1.
    # At 2 requests: V(8 tokens) 1: 2.4 / (1.5 + 1) = 0.96 < 1.05. Nothing pays until the length is known to be 3.5.
    controller = controller_of(mode="toggle", gamma=3, ramp_up=4)
    assert gammas(controller, [20, 8, 2, 1]) == [0, 0, 0, 0]
    controller.end_rollout(RolloutAcceptance(num_drafts=100, num_draft_tokens=300, num_accepted_tokens=250))  # length 3.5
    # At 3 requests V(12 tokens) = 1.5: 3.5 / 3 = 1.17 >= 1.05, at 4 V(16) = 2: 3.5 / 3.5 = 1.
    assert gammas(controller, [20, 4, 3, 20, 1]) == [0, 0, 3, 3, 3]
    controller.end_rollout(RolloutAcceptance(num_drafts=100, num_draft_tokens=300, num_accepted_tokens=250))
    assert gammas(controller, [20, 4]) == [0, 0]


def test_toggle_needs_the_margin():
    # Length 3.5 at 3 requests: 1.167.
    for margin, expected in ((0.16, 3), (0.17, 0)):
        controller = controller_of(mode="toggle", gamma=3, ramp_up=4, margin=margin)
        controller.end_rollout(RolloutAcceptance(100, 300, 250))
        assert gammas(controller, [20, 3]) == [0, expected]


def test_toggle_waits_for_the_ramp_up():
    # 1 decoding request while the prompts are still being prefilled is no tail.
    controller = controller_of(mode="toggle", gamma=3, ramp_up=16)
    controller.end_rollout(RolloutAcceptance(100, 300, 250))
    assert gammas(controller, [1, 2, 16, 17, 9, 2]) == [0, 0, 0, 0, 0, 3]


def test_toggle_does_not_fire_on_an_engine_without_decodes():
    controller = controller_of(mode="toggle", gamma=3, ramp_up=4)
    controller.end_rollout(RolloutAcceptance(100, 300, 250))
    assert gammas(controller, [20, 0, 20]) == [0, 0, 0]


def test_a_rollout_without_drafts_leaves_the_expected_length():
    controller = controller_of(mode="toggle", gamma=3, ramp_up=4)
    controller.end_rollout(RolloutAcceptance(100, 300, 250))
    controller.end_rollout(RolloutAcceptance(0, 0, 0))
    assert gammas(controller, [20, 3]) == [0, 3]


def ladder(start: int = 5):
    """Free drafts and verification, so that the toggle always fires and shows the rung."""

    class Free(LinearCosts):
        def draft_step_s(self, batch, context):
            return 0.0

        def verify_step_s(self, batch, context, gamma):
            return self.target_step_s(batch, context)

    config = SelfSpecConfig(mode="adaptive", gamma=start, ladder=(3, 5, 7), ramp_up=0)
    return make_controller(config, Free())


@pytest.mark.parametrize(
    "rates, expected",
    [
        ([0.95], [5]),
        ([0.95, 0.95], [5, 7]),
        ([0.95, 0.90, 0.95], [5, 5, 5]),
        ([0.95, 0.95, 0.95, 0.95], [5, 7, 7, 7]),
        ([0.80, 0.80], [5, 3]),
        ([0.80, 0.80, 0.80, 0.80], [5, 3, 3, 3]),
        ([0.94, 0.94, 0.85, 0.85], [5, 7, 7, 5]),
    ],
)
def test_ladder_moves_after_two_rollouts_in_a_row(rates, expected):
    controller = ladder()
    seen = []
    for rate in rates:
        controller.end_rollout(finished(rate))
        seen += gammas(controller, [4])
    assert seen == expected


def test_a_rollout_without_drafts_leaves_the_ladder_alone():
    controller = ladder()
    controller.end_rollout(finished(0.95))
    controller.end_rollout(RolloutAcceptance(0, 0, 0))
    controller.end_rollout(finished(0.95))
    assert gammas(controller, [4]) == [7]


def test_after_a_move_the_expected_length_is_the_new_gamma():
    controller = ladder()
    controller.end_rollout(finished(0.95))
    assert controller.state()["mean_acceptance_length"] == 1 + 9.5  # 100 drafts of 10 tokens, 950 accepted
    controller.end_rollout(finished(0.95))
    assert controller.state() == {"ladder": {"gamma": 7, "num_high": 0, "num_low": 0}, "mean_acceptance_length": 7.0}


def test_a_restored_controller_goes_on_where_the_saved_one_stood():
    controller = ladder()
    controller.end_rollout(finished(0.95))
    restored = ladder()
    restored.restore(json.loads(json.dumps(controller.state())))
    restored.end_rollout(finished(0.95))
    assert gammas(restored, [4]) == [7]


def test_a_state_of_another_ladder_is_refused():
    controller = make_controller(SelfSpecConfig(mode="adaptive", gamma=5, ladder=(5, 9)), LinearCosts())
    with pytest.raises(ValueError, match="7 is no rung of the ladder 5,9"):
        controller.restore({"ladder": {"gamma": 7, "num_high": 0, "num_low": 0}, "mean_acceptance_length": 7.0})


@pytest.mark.parametrize("mode", ["toggle", "adaptive"])
def test_the_papers_modes_cannot_do_without_step_times(mode):
    with pytest.raises(ValueError, match="calibration"):
        make_controller(SelfSpecConfig(mode=mode, gamma=5), None)
