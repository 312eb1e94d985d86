"""vLLM's scheduler, asking the controller for gamma before every step. The scheduler owns gamma; everyone else is told per step."""

from __future__ import annotations

from vllm.platforms import current_platform
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request
from vllm.v1.spec_decode.metrics import SpecDecodingStats

from openrlhf_sd.config import SelfSpecConfig
from openrlhf_sd.policy.controller import RolloutAcceptance, StepObservation, make_controller

ROLLOUT_ARG = "self_spec_rollout"
"""Key in `SamplingParams.extra_args`: which rollout (number of finished weight broadcasts) a request belongs to."""

_PlatformScheduler = Scheduler if current_platform.is_cpu() else AsyncScheduler
"""What vLLM itself would use: a plain `Scheduler` on CUDA would lose asynchronous scheduling and rig every comparison."""


class SelfSpecScheduler(_PlatformScheduler):
    """Raises RuntimeError where vLLM runs the other kind of scheduling than the platform's own."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        if self.scheduler_config.async_scheduling != isinstance(self, AsyncScheduler):
            raise RuntimeError("self-speculation: leave vLLM's async_scheduling at the platform's default")
        self.controller = make_controller(SelfSpecConfig.from_dict(self.vllm_config.additional_config["self_spec"]))
        # Upstream looks gamma up by batch size, in a list; ours holds the one answer at every index.
        num_entries = self.scheduler_config.max_num_seqs + 1
        self._lookups = [[gamma] * num_entries for gamma in range(self.num_spec_tokens + 1)]
        self._rollout: int | None = None
        self._start_counts()

    def _start_counts(self) -> None:
        self._num_drafts = 0
        self._num_draft_tokens = 0
        self._num_accepted_tokens = 0

    def add_request(self, request: Request) -> None:
        """A rollout ends where the weights change: OpenRLHF's actor numbers its requests. Without numbers (a plain vLLM user) it
        ends where the engine has run empty."""
        extra_args = (request.sampling_params.extra_args or {}) if request.sampling_params is not None else {}
        rollout = extra_args.get(ROLLOUT_ARG)
        if (rollout != self._rollout) if rollout is not None else (not self.requests):
            self._end_rollout()
            self._rollout = rollout
        super().add_request(request)

    def _end_rollout(self) -> None:
        self.controller.end_rollout(
            RolloutAcceptance(self._num_drafts, self._num_draft_tokens, self._num_accepted_tokens)
        )
        self._start_counts()

    def schedule(self, throttle_prefills: bool = False) -> SchedulerOutput:
        # Upstream would count every scheduled request; prefills must not look like a large decode batch.
        num_decodes = sum(not request.is_prefill_chunk for request in self.running)
        gamma = self.controller.next_gamma(StepObservation(num_decodes=num_decodes))
        self.dynamic_sd_lookup = self._lookups[gamma]
        return super().schedule(throttle_prefills)

    def make_spec_decoding_stats(
        self,
        spec_decoding_stats: SpecDecodingStats | None,
        num_draft_tokens: int,
        num_accepted_tokens: int,
        num_invalid_spec_tokens: dict[str, int] | None,
        request_id: str,
    ) -> SpecDecodingStats | None:
        self._num_drafts += 1
        self._num_draft_tokens += num_draft_tokens
        self._num_accepted_tokens += num_accepted_tokens
        return super().make_spec_decoding_stats(
            spec_decoding_stats, num_draft_tokens, num_accepted_tokens, num_invalid_spec_tokens, request_id
        )
