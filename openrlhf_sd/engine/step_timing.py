"""Schedulers that follow a script of gammas and write down how long every engine step took. For calibration sweeps, not for rollouts.

A bout is `batch` requests that decode together. Its script is a list of gammas, one per step, begun at the first step in which all of
them decode and no prompt is computed; when it has been played, the requests end. Every request carries the whole bout in
`SamplingParams.extra_args[BOUT_ARG]`; the scheduler appends one line of JSON per bout to the file named in
`additional_config[TIMES_FILE_ARG]`:

    {"bout": ID, "steps": [[step_s, gamma_verified, gamma_drafted, mean_context], ...]}

`step_s` is the wall time between the outputs of two engine steps, both in the script. What it holds: an engine step runs the policy on
the newest token and the `gamma_verified` drafts of each request, samples, and then runs `gamma_drafted` draft steps; its output arrives
after the last of them. That is so in vLLM's synchronous scheduling (CPU), where `sample_tokens` drafts before it returns, and in its
asynchronous scheduling (CUDA), where the copy of the output waits for the stream on which the drafter was enqueued before it
(`GPUModelRunner.sample_tokens`, `AsyncGPUModelRunnerOutput`, vLLM 0.29.0). There the output of a step is fetched when the next one has
been launched (`EngineCore.step_with_batch_queue`): where the host launches that for longer than the GPU runs this one, and the two are not
of a kind, `step_s` is not this step's own (`calib/cell_times.py`). `mean_context` is the tokens in context of the step, the newest
included.
"""

from __future__ import annotations

import json
import time
from typing import Any

from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.request import Request

from openrlhf_sd.config import SelfSpecConfig
from openrlhf_sd.engine.scheduler import PlatformScheduler, SelfSpecScheduler
from openrlhf_sd.policy.controller import FixedController
from openrlhf_sd.policy.observation import StepObservation

BOUT_ARG = "self_spec_bout"
"""Key in `SamplingParams.extra_args`: {"bout": ID, "batch": B, "gammas": [...]}."""

TIMES_FILE_ARG = "self_spec_times_file"


class _StepTiming:
    """Mixed into a scheduler."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self._times_file = self.vllm_config.additional_config[TIMES_FILE_ARG]
        self._bout: dict[str, Any] | None = None

    def add_request(self, request: Request) -> None:
        bout = request.sampling_params.extra_args[BOUT_ARG]
        if self._bout is None or bout["bout"] != self._bout["bout"]:
            self._bout = bout
            self._num_scheduled = 0
            self._num_outputs = 0
            self._steps: list[tuple[float, int, int, float]] = []
            self._last_output_s: float | None = None
        super().add_request(request)

    def next_scripted_gamma(self) -> int:
        """To be asked once per step; 0 before the script has begun and after it has been played."""
        num_decodes = sum(not request.is_prefill_chunk for request in self.running)
        if num_decodes < self._bout["batch"] or self._num_scheduled == len(self._bout["gammas"]):
            return 0
        self._num_scheduled += 1
        return self._bout["gammas"][self._num_scheduled - 1]

    def update_from_output(self, scheduler_output: SchedulerOutput, model_runner_output):
        now_s = time.perf_counter()
        if self._num_scheduled > 0 and self._num_outputs < len(self._bout["gammas"]):
            self._note(scheduler_output, now_s)
        return super().update_from_output(scheduler_output, model_runner_output)

    def _note(self, scheduler_output: SchedulerOutput, now_s: float) -> None:
        num_tokens = scheduler_output.num_scheduled_tokens
        drafts = scheduler_output.scheduled_spec_decode_tokens
        gamma_verified = max((len(tokens) for tokens in drafts.values()), default=0)
        # Asynchronous scheduling: the output of a step with a prompt may arrive when the script has begun.
        if len(num_tokens) < self._bout["batch"] or any(count != gamma_verified + 1 for count in num_tokens.values()):
            self._last_output_s = None
            return
        if self._last_output_s is not None:
            context = sum(self.requests[name].num_tokens for name in num_tokens) / len(num_tokens)
            gamma_drafted = scheduler_output.num_spec_tokens_to_schedule
            self._steps.append((now_s - self._last_output_s, gamma_verified, gamma_drafted, context))
        self._last_output_s = now_s
        self._num_outputs += 1
        if self._num_outputs == len(self._bout["gammas"]):
            for request in self.running:  # the next step is their last
                request.max_tokens = min(request.max_tokens, request.num_output_tokens + 1)
            with open(self._times_file, "a") as file:
                file.write(json.dumps({"bout": self._bout["bout"], "steps": self._steps}) + "\n")


class TimedPlainScheduler(_StepTiming, PlatformScheduler):
    """Plain vLLM: the script only counts the steps, its gammas are 0."""

    def schedule(self, throttle_prefills: bool = False) -> SchedulerOutput:
        self.next_scripted_gamma()
        return super().schedule(throttle_prefills)


class _Script(FixedController):
    """The controller that plays it."""

    def __init__(self, scheduler: _StepTiming) -> None:
        super().__init__(0)
        self._scheduler = scheduler

    def next_gamma(self, observation: StepObservation) -> int:
        return self._scheduler.next_scripted_gamma()


class TimedSelfSpecScheduler(_StepTiming, SelfSpecScheduler):
    def make_controller(self, config: SelfSpecConfig) -> _Script:
        return _Script(self)


PLAIN_QUALNAME = f"{__name__}.{TimedPlainScheduler.__qualname__}"
SELF_SPEC_QUALNAME = f"{__name__}.{TimedSelfSpecScheduler.__qualname__}"
