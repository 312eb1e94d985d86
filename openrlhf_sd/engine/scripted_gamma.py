"""A scheduler that drafts as its requests say, for measurements that compare draft lengths and modes inside one engine."""

from __future__ import annotations

import dataclasses

from vllm.v1.request import Request

from openrlhf_sd.config import SelfSpecConfig
from openrlhf_sd.engine.scheduler import SelfSpecScheduler
from openrlhf_sd.policy.controller import Controller, FixedController, make_controller

DRAFT_ARG = "self_spec_draft"
"""Key in `SamplingParams.extra_args`: a gamma, or a mode's name. The request added last decides for all. A mode's controller stays alive
between the calls that name it, as in training."""


class ScriptedGammaScheduler(SelfSpecScheduler):
    def make_controller(self, config: SelfSpecConfig) -> Controller:
        self._config = config
        self._modes: dict[str, Controller] = {}
        return FixedController(0)

    def add_request(self, request: Request) -> None:
        super().add_request(request)
        draft = request.sampling_params.extra_args[DRAFT_ARG]
        self.controller = self._mode(draft) if isinstance(draft, str) else FixedController(draft)

    def _mode(self, mode: str) -> Controller:
        if mode not in self._modes:
            self._modes[mode] = make_controller(dataclasses.replace(self._config, mode=mode), self._costs)
        return self._modes[mode]


QUALNAME = f"{ScriptedGammaScheduler.__module__}.{ScriptedGammaScheduler.__qualname__}"
