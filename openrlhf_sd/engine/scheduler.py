"""vLLM's scheduler, asking the controller for gamma before every step and telling it what the step became. The scheduler owns gamma;
everyone else is told per step."""

from __future__ import annotations

import copy
import time
from typing import Any

from vllm.logger import init_logger
from vllm.platforms import current_platform
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request
from vllm.v1.spec_decode.metrics import SpecDecodingStats

from openrlhf_sd import garbage
from openrlhf_sd.config import SelfSpecConfig
from openrlhf_sd.engine import core_calls
from openrlhf_sd.engine.step_drafts import StepDrafts
from openrlhf_sd.policy.acceptance_watch import AcceptanceWatch
from openrlhf_sd.policy.controller import Controller, make_controller
from openrlhf_sd.policy.cost_model import CostModel
from openrlhf_sd.policy.observation import MeasuredStep, RolloutAcceptance, StepObservation
from openrlhf_sd.step_ledger import StepLedger

logger = init_logger(f"vllm.{__name__}")

PlatformScheduler = Scheduler if current_platform.is_cpu() else AsyncScheduler
"""What vLLM itself would use: a plain `Scheduler` on CUDA would lose asynchronous scheduling and rig every comparison."""

core_calls.install()


class SelfSpecScheduler(PlatformScheduler):
    """Raises RuntimeError where vLLM runs the other kind of scheduling than the platform's own."""

    def __init__(self, *args, **kwargs) -> None:
        garbage.end_without_search()
        super().__init__(*args, **kwargs)
        if self.scheduler_config.async_scheduling != isinstance(self, AsyncScheduler):
            raise RuntimeError("self-speculation: leave vLLM's async_scheduling at the platform's default")
        settings = self.vllm_config.additional_config
        calibration = settings.get("self_spec_costs")
        self._costs = None if calibration is None else CostModel.from_dict(calibration)
        self._config = SelfSpecConfig.from_dict(settings["self_spec"])
        self.controller = self.make_controller(self._config)
        self._drafter_error: float | None = None
        # Upstream looks gamma up by batch size, in a list; ours holds the one answer at every index.
        num_entries = self.scheduler_config.max_num_seqs + 1
        self._lookups = [[gamma] * num_entries for gamma in range(self.num_spec_tokens + 1)]
        self._training: tuple[Controller, StepLedger, RolloutAcceptance, AcceptanceWatch] | None = None
        self._has_rollout_marks = False
        self._observation = StepObservation(num_decodes=0)
        self._drafts = StepDrafts(self.num_spec_tokens)
        self._newest_gamma = 0
        self._last_output_s: float | None = None
        self._scored_ids: set[str] = set()
        self._start_rollout()

    def make_controller(self, config: SelfSpecConfig) -> Controller:
        return make_controller(config, self._costs)

    def _start_rollout(self) -> None:
        self._ledger = StepLedger(self._costs)
        self._acceptance = RolloutAcceptance(0, 0, 0)
        self._watch = AcceptanceWatch(self._config.quant, self._drafter_error)
        self._last_output_s = None

    def add_request(self, request: Request) -> None:
        """Without anyone to mark rollouts (a plain vLLM user), one ends where the engine has run empty."""
        if not self._has_rollout_marks and not self.requests:
            self._end_rollout(self._acceptance)
        if request.sampling_params is not None and request.sampling_params.prompt_logprobs is not None:
            self._scored_ids.add(request.request_id)
        super().add_request(request)

    def end_rollout(self, acceptance: RolloutAcceptance, drafter_error: float) -> dict[str, Any]:
        """The end of a weight broadcast. Returns the finished rollout's report and the controller's state after it.

        Args:
            acceptance: of all engines of the run.
            drafter_error: largest relative error of the re-quantized drafter's layers.
        """
        self._has_rollout_marks = True
        self._drafter_error = drafter_error
        report = self._ledger.report() | {"collapse": self._watch.cause}
        self._end_rollout(acceptance)
        return report | {"controller": self.controller.state()}

    def _end_rollout(self, acceptance: RolloutAcceptance) -> None:
        self.controller.end_rollout(acceptance)
        self._start_rollout()

    def begin_eval(self) -> None:
        """Evaluation decides by a copy of the controller, which is thrown away after it."""
        self._training = self.controller, self._ledger, self._acceptance, self._watch
        self.controller = copy.deepcopy(self.controller)
        self._start_rollout()

    def end_eval(self) -> None:
        self._start_rollout()
        self.controller, self._ledger, self._acceptance, self._watch = self._training
        self._training = None

    def set_pause_state(self, pause_state: PauseState) -> None:
        super().set_pause_state(pause_state)
        self._last_output_s = None  # the pause is no step time

    def schedule(self, throttle_prefills: bool = False) -> SchedulerOutput:
        # Upstream would count every scheduled request; prefills must not look like a large decode batch.
        contexts = [request.num_computed_tokens for request in self.running if not request.is_prefill_chunk]
        num_decodes = len(contexts)
        self._observation = StepObservation(
            num_decodes=num_decodes,
            mean_context=sum(contexts) / num_decodes if num_decodes else 0.0,
            num_prefills=len(self.running) - num_decodes + len(self.waiting),
        )
        gamma = self.controller.next_gamma(self._observation) if self._watch.cause is None and not self._has_scored() else 0
        self.dynamic_sd_lookup = self._lookups[gamma]
        self._drop_old_drafts()
        scheduled = super().schedule(throttle_prefills)
        if scheduled.num_scheduled_tokens:
            self._newest_gamma = scheduled.num_spec_tokens_to_schedule
        return scheduled

    def _has_scored(self) -> bool:
        """Whether a prompt is to be computed whose logprobs were asked for. Upstream computes them after drafting, from hidden states in
        the memory that all CUDA graphs share: the drafter's would overwrite them (vLLM issue 53488)."""
        self._scored_ids &= self.requests.keys()
        scored = (self.requests[request_id] for request_id in self._scored_ids)
        return any(request.num_computed_tokens < request.num_prompt_tokens for request in scored)

    def _drop_old_drafts(self) -> None:
        """Of requests that the step before passed over: no token budget was left, or the context's end was in reach.

        The worker keeps neither drafts nor their probabilities beyond one step. Verified all the same, synchronous drafts cost
        the whole batch its probabilities; asynchronous ones are the placeholder -1, no index of the embedding (vLLM issue 37159).
        """
        for request in self.running:
            if request.spec_token_ids and request.request_id not in self.prev_step_scheduled_req_ids:
                request.spec_token_ids = []

    def update_from_output(self, scheduler_output: SchedulerOutput, model_runner_output):
        self._drafts = StepDrafts(self.num_spec_tokens)
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        if scheduler_output.num_scheduled_tokens:
            # Not what the model sampled: that of a request aborted, finished or reset meanwhile is dropped.
            delivered = [output for answers in outputs.values() for output in answers.outputs]
            num_tokens = sum(len(output.new_token_ids) for output in delivered)
            self._observe(scheduler_output, num_tokens, num_ended=sum(output.finished for output in delivered))
        return outputs

    def _observe(self, scheduler_output: SchedulerOutput, num_tokens: int, num_ended: int) -> None:
        now_s = time.perf_counter()
        verified = scheduler_output.scheduled_spec_decode_tokens
        num_draft_tokens = sum(map(len, verified.values()))
        num_new = len(scheduler_output.scheduled_new_reqs)
        # Every request that decodes has one token of its own and its drafts; what is beyond that is prompt.
        num_decodes = sum(
            count == 1 + len(verified.get(request_id, ())) for request_id, count in scheduler_output.num_scheduled_tokens.items()
        )
        num_decode_tokens = num_decodes + num_draft_tokens
        step = MeasuredStep(
            num_decodes=num_decodes,
            mean_context=self._observation.mean_context,
            step_s=self._step_s(now_s),
            num_prefill_tokens=scheduler_output.total_num_scheduled_tokens - num_decode_tokens + num_new,
            gamma_verified=max(map(len, verified.values()), default=0),
            # A step's output comes after its drafts were made, in asynchronous scheduling too: the copy of the sampled tokens to the
            # host waits for the stream that the drafter was enqueued on before it.
            gamma_drafted=scheduler_output.num_spec_tokens_to_schedule,
            # Synchronously the newest step is this one.
            is_followed_alike=self._newest_gamma == scheduler_output.num_spec_tokens_to_schedule,
            num_drafts=self._drafts.num_drafts,
            num_draft_tokens_per_pos=self._drafts.num_draft_tokens_per_pos if verified else (),
            num_accepted_tokens_per_pos=self._drafts.num_accepted_tokens_per_pos if verified else (),
            num_tokens=num_tokens,
            num_ended=num_ended,
        )
        # An idle engine's time is no step time either.
        self._last_output_s = now_s if self.has_unfinished_requests() else None
        self.controller.observe(step)
        self._ledger.add(step)
        if verified and self._watch.cause is None and self._watch.has_collapsed(step):
            self._watch.turn_off(self._mean_temperature())
            logger.warning("self-speculation: off for the rest of this rollout; %s", self._watch.cause)
        if verified:
            self._acceptance = RolloutAcceptance(
                self._acceptance.num_drafts + self._drafts.num_drafts,
                self._acceptance.num_draft_tokens + self._drafts.num_draft_tokens,
                self._acceptance.num_accepted_tokens + self._drafts.num_accepted_tokens,
            )
        for line in self.controller.take_news():
            logger.info("self-speculation: %s", line)

    def _mean_temperature(self) -> float:
        temperatures = [request.sampling_params.temperature for request in self.running]
        return sum(temperatures) / len(temperatures) if temperatures else 0.0

    def _step_s(self, now_s: float) -> float | None:
        """None after an idle engine or a pause, and where the clock stood still or was set back: that has measured nothing."""
        if self._last_output_s is None or now_s <= self._last_output_s:
            return None
        return now_s - self._last_output_s

    def make_spec_decoding_stats(
        self,
        spec_decoding_stats: SpecDecodingStats | None,
        num_draft_tokens: int,
        num_accepted_tokens: int,
        num_invalid_spec_tokens: dict[str, int] | None,
        request_id: str,
    ) -> SpecDecodingStats | None:
        if num_draft_tokens:
            self._drafts.add(num_draft_tokens, num_accepted_tokens)
        return super().make_spec_decoding_stats(
            spec_decoding_stats, num_draft_tokens, num_accepted_tokens, num_invalid_spec_tokens, request_id
        )
