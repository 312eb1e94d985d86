"""A scheduler whose controller draws gamma anew at every step, 0 included: the hardest case for exactness."""

from __future__ import annotations

import random

from openrlhf_sd.engine.scheduler import SelfSpecScheduler
from openrlhf_sd.policy.controller import RolloutAcceptance, StepObservation


class _RandomGamma:
    def __init__(self, gamma_max: int) -> None:
        self._gamma_max = gamma_max
        self._random = random.Random(0)

    def next_gamma(self, observation: StepObservation) -> int:
        return self._random.randint(0, self._gamma_max)

    def end_rollout(self, acceptance: RolloutAcceptance) -> None:
        pass


class RandomGammaScheduler(SelfSpecScheduler):
    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.controller = _RandomGamma(self.num_spec_tokens)


QUALNAME = f"{RandomGammaScheduler.__module__}.{RandomGammaScheduler.__qualname__}"
