"""A scheduler whose controller is told simulated step times: what it decides then depends on no machine's speed, and it does speculate.
The engine, its drafts and its acceptance stay real."""

from __future__ import annotations

import dataclasses
from typing import Any

from step_world import GpuLike

from openrlhf_sd.config import SelfSpecConfig
from openrlhf_sd.engine.scheduler import SelfSpecScheduler
from openrlhf_sd.policy.controller import Controller
from openrlhf_sd.policy.observation import MeasuredStep, RolloutAcceptance, StepObservation


class TimesOfAGpu:
    def __init__(self, controller: Controller) -> None:
        self._controller = controller
        self._costs = GpuLike()

    def next_gamma(self, observation: StepObservation) -> int:
        return self._controller.next_gamma(observation)

    def end_rollout(self, acceptance: RolloutAcceptance) -> None:
        self._controller.end_rollout(acceptance)

    def take_news(self) -> list[str]:
        return self._controller.take_news()

    def state(self) -> dict[str, Any]:
        return self._controller.state()

    def observe(self, step: MeasuredStep) -> None:
        if step.step_s is not None and step.num_decodes:
            batch, context = step.num_decodes, step.mean_context
            if step.gamma_verified:
                step_s = self._costs.verify_step_s(batch, context, step.gamma_verified)
            else:
                step_s = self._costs.target_step_s(batch, context)
            step_s += step.gamma_drafted * self._costs.draft_step_s(batch, context) + 1e-4 * step.num_prefill_tokens
            step = dataclasses.replace(step, step_s=step_s)
        self._controller.observe(step)


class SimulatedTimesScheduler(SelfSpecScheduler):
    def make_controller(self, config: SelfSpecConfig) -> TimesOfAGpu:
        return TimesOfAGpu(super().make_controller(config))


QUALNAME = f"{SimulatedTimesScheduler.__module__}.{SimulatedTimesScheduler.__qualname__}"
