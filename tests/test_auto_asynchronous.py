"""`auto` by the step times of an asynchronous engine, whose outputs are fetched when the step after them has been launched."""

from __future__ import annotations

import pytest
from async_pipeline import Machine, Pipeline, played_asynchronously

from openrlhf_sd.policy.auto import AutoController
from openrlhf_sd.policy.observation import MeasuredStep

GAMMA = 7
BATCH, CONTEXT = 16, 200.0
A100 = Machine(
    target_s=0.0095,
    draft_s=0.0030,
    verify_s=lambda gamma: 0.0095 + 0.0001 * gamma,
    schedule_s=0.0006,
    launch_target_s=0.003,
    launch_draft_s=0.0015,
)


class Costs:
    """What a perfect calibration says of it."""

    def target_step_s(self, batch, context):
        return A100.target_s

    def verify_step_s(self, batch, context, gamma):
        return A100.verify_s(gamma)

    def draft_step_s(self, batch, context):
        return A100.draft_s


@pytest.mark.parametrize("script", [15 * [GAMMA] + 5 * [0], 15 * [0] + 5 * [GAMMA]], ids=["plain trials", "speculative trials"])
def test_launches_of_other_steps_are_learned_as_nobodys_time(script):
    controller = AutoController(Costs(), GAMMA)
    pipeline, last_s = Pipeline(A100), None
    for gamma in 20 * script:
        output = pipeline.step(gamma)
        if output is None:
            continue
        now_s, verified, drafted = output
        step_s = None if last_s is None else now_s - last_s
        controller.observe(MeasuredStep(BATCH, CONTEXT, step_s, 0, verified, drafted, is_followed_alike=drafted == gamma))
        last_s = now_s
    seconds = controller._costs.cycles_s(BATCH, CONTEXT)
    running_on_s = played_asynchronously(40 * [GAMMA], A100)[-2].step_s
    assert seconds[GAMMA] / seconds[0] == pytest.approx(running_on_s / A100.target_s, rel=0.01)
