"""The paper's roofline toggle: off at the start of a rollout, on from the first step at which speculation is predicted to pay, then on
to its end (EfficientRollout, section on the toggle)."""

from __future__ import annotations

from openrlhf_sd.policy.observation import StepObservation
from openrlhf_sd.policy.speedup import StepCosts, speedup


class Toggle:
    """Args:
    margin: speculate where the predicted speed-up is at least 1 + margin.
    ramp_up: not evaluated until more than this many requests have decoded at once, so that the first prefills of a rollout do not
        look like its tail.
    """

    def __init__(self, costs: StepCosts, margin: float, ramp_up: int) -> None:
        self._costs = costs
        self._margin = margin
        self._ramp_up = ramp_up
        self.reset()

    def reset(self) -> None:
        self._has_ramped_up = False
        self._is_on = False

    def is_on(self, observation: StepObservation, gamma: int, mean_acceptance_length: float) -> bool:
        batch = observation.num_decodes
        self._has_ramped_up = self._has_ramped_up or batch > self._ramp_up
        if not self._is_on and self._has_ramped_up and batch > 0:
            predicted = speedup(self._costs, batch, observation.mean_context, gamma, mean_acceptance_length)
            self._is_on = predicted >= 1 + self._margin
        return self._is_on
