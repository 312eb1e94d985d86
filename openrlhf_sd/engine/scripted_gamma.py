"""A scheduler that drafts as far as its requests say, for measurements that compare draft lengths inside one engine."""

from __future__ import annotations

from vllm.v1.request import Request

from openrlhf_sd.engine.scheduler import SelfSpecScheduler
from openrlhf_sd.policy.controller import RolloutAcceptance, StepObservation

GAMMA_ARG = "self_spec_gamma"
"""Key in `SamplingParams.extra_args`; the request added last decides for all."""


class _ScriptedGamma:
    gamma = 0

    def next_gamma(self, observation: StepObservation) -> int:
        return self.gamma

    def end_rollout(self, acceptance: RolloutAcceptance) -> None:
        pass


class ScriptedGammaScheduler(SelfSpecScheduler):
    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.controller = _ScriptedGamma()

    def add_request(self, request: Request) -> None:
        self.controller.gamma = request.sampling_params.extra_args[GAMMA_ARG]
        super().add_request(request)


QUALNAME = f"{ScriptedGammaScheduler.__module__}.{ScriptedGammaScheduler.__qualname__}"
