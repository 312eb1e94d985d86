"""A scheduler that drafts as far as its requests say, for measurements that compare draft lengths inside one engine."""

from __future__ import annotations

from vllm.v1.request import Request

from openrlhf_sd.config import SelfSpecConfig
from openrlhf_sd.engine.scheduler import SelfSpecScheduler
from openrlhf_sd.policy.controller import FixedController

GAMMA_ARG = "self_spec_gamma"
"""Key in `SamplingParams.extra_args`; the request added last decides for all."""


class _ScriptedGamma(FixedController):
    def __init__(self) -> None:
        super().__init__(0)

    def set_gamma(self, gamma: int) -> None:
        self._gamma = gamma


class ScriptedGammaScheduler(SelfSpecScheduler):
    def make_controller(self, config: SelfSpecConfig) -> _ScriptedGamma:
        return _ScriptedGamma()

    def add_request(self, request: Request) -> None:
        self.controller.set_gamma(request.sampling_params.extra_args[GAMMA_ARG])
        super().add_request(request)


QUALNAME = f"{ScriptedGammaScheduler.__module__}.{ScriptedGammaScheduler.__qualname__}"
