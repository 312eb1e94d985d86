"""A scheduler whose controller draws gamma anew at every step, 0 included: the hardest case for exactness."""

from __future__ import annotations

import random

from vllm.v1.engine.core import EngineCore

from openrlhf_sd.config import SelfSpecConfig
from openrlhf_sd.engine.scheduler import SelfSpecScheduler
from openrlhf_sd.policy.controller import FixedController
from openrlhf_sd.policy.observation import StepObservation


class RandomGamma(FixedController):
    def __init__(self, gamma_max: int) -> None:
        super().__init__(gamma_max)
        self._random = random.Random(0)

    def next_gamma(self, observation: StepObservation) -> int:
        return self._random.randint(0, self._gamma)


class RandomGammaScheduler(SelfSpecScheduler):
    def make_controller(self, config: SelfSpecConfig) -> RandomGamma:
        return RandomGamma(self.num_spec_tokens)


def _num_free_blocks(core: EngineCore) -> int:
    return core.scheduler.kv_cache_manager.block_pool.get_num_free_blocks()


EngineCore.test_num_free_blocks = _num_free_blocks
"""Where this scheduler runs, a test can ask how much of the KV cache is free."""

QUALNAME = f"{RandomGammaScheduler.__module__}.{RandomGammaScheduler.__qualname__}"
