"""OpenRLHF's vLLM rollout actor with records, and with a self-speculating engine if asked for.

OpenRLHF names its actor literally inside `create_vllm_engines`, so `make_create_vllm_engines` gives back a function that calls the
unchanged upstream one while that name means our subclass. Trainers, sample generators and the weight broadcast stay upstream's.
"""

from __future__ import annotations

import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from openrlhf_sd.config import SelfSpecConfig
from openrlhf_sd.controller_states import ControllerStates
from openrlhf_sd.metrics import METRICS_FILE, append_row
from openrlhf_sd.policy.cost_model import CostModel
from openrlhf_sd.rollout_pool import start_pool
from openrlhf_sd.rollout_record import ResponseCounts, RolloutRecord


@dataclass(frozen=True)
class SelfSpecRun:
    """What every self-speculating engine of a run is told.

    Args:
        costs: calibrated step times; None where the mode needs none.
        states: where controller states are kept; None for a run without checkpoints.
    """

    config: SelfSpecConfig
    costs: CostModel | None
    states: ControllerStates | None


def make_create_vllm_engines(self_spec: SelfSpecRun | None, run_dir: str | None) -> Any:
    """A stand-in for `openrlhf.trainer.ray.create_vllm_engines` with the same signature.

    Args:
        self_spec: None for vanilla engines whose rollouts are recorded and nothing else.
        run_dir: where metrics.jsonl goes; None keeps no file.
    """
    from openrlhf.trainer.ray import vllm_engine

    upstream_create = vllm_engine.create_vllm_engines

    def create_vllm_engines(num_engines: int, *args: Any, **kwargs: Any) -> list[Any]:
        upstream_actor = vllm_engine.RolloutRayActor
        metrics_path = None if run_dir is None else str(Path(run_dir).resolve() / METRICS_FILE)
        if self_spec is None:
            actors = _NumberedActors(recording_rollout_actor(upstream_actor), {"metrics_path": metrics_path})
        else:
            ours = {"metrics_path": metrics_path, "self_spec": self_spec, "pool": start_pool(num_engines)}
            actors = _NumberedActors(self_spec_rollout_actor(upstream_actor), ours)
        vllm_engine.RolloutRayActor = actors
        try:
            return upstream_create(num_engines, *args, **kwargs)
        finally:
            vllm_engine.RolloutRayActor = upstream_actor

    return create_vllm_engines


class _NumberedActors:
    """Quacks like a Ray actor class for `.options(...).remote(**kwargs)`; adds our arguments and each engine's number."""

    def __init__(self, actor: Any, extra_kwargs: dict[str, Any]) -> None:
        self._actor = actor
        self._extra_kwargs = extra_kwargs
        self._num_engines = 0

    def options(self, **options: Any) -> Any:
        self._options = options
        return self

    def remote(self, **kwargs: Any) -> Any:
        engine = self._num_engines
        self._num_engines += 1
        return self._actor.options(**self._options).remote(**kwargs, engine=engine, **self._extra_kwargs)


def recording_rollout_actor(upstream_actor: Any) -> Any:
    """Ray actor class: `upstream_actor` plus one row in metrics.jsonl per rollout. Ray refuses to subclass an actor class, so the
    subclass is made of what its decorator wrapped."""
    import ray

    return ray.remote(_recording_class(upstream_actor.__ray_metadata__.modified_class))


def self_spec_rollout_actor(upstream_actor: Any) -> Any:
    """Ray actor class: a recording actor whose engine hosts the self-drafter."""
    import ray

    return ray.remote(_self_spec_class(upstream_actor.__ray_metadata__.modified_class))


def _recording_class(base: type) -> type:
    class RecordingRolloutActor(base):
        """A rollout is what is generated between two ends of a weight broadcast; the row is written at the second."""

        async def __init__(self, *args: Any, engine: int, metrics_path: str | None, **kwargs: Any) -> None:
            self._engine = engine
            self._metrics_path = metrics_path
            self._rollout = 0
            self._sync_started_s: float | None = None
            self._record = RolloutRecord()
            self._training_record: RolloutRecord | None = None
            await super().__init__(*args, **kwargs)

        async def generate(self, prompt_token_ids, sampling_params, multi_modal_data=None):
            self._record.request_started(time.perf_counter())
            try:
                output = await super().generate(prompt_token_ids, sampling_params, multi_modal_data)
            finally:
                self._record.request_ended(time.perf_counter())
            self._record.request_answered(len(prompt_token_ids), len(output.outputs[0].token_ids))
            return output

        async def begin_eval(self) -> None:
            """What follows is evaluation (eval_mark.py): it counts into no training rollout's row."""
            self._training_record, self._record = self._record, RolloutRecord(acceptance_before=self._record.acceptance_before)

        async def end_eval(self) -> None:
            self._record, self._training_record = self._training_record, None

        async def update_weight(self, name, dtype, shape, empty_cache=False):
            self._sync_starts()
            result = await super().update_weight(name, dtype, shape, empty_cache)
            if empty_cache:
                await self._sync_ended()
            return result

        async def update_weight_cuda_ipc(self, name, dtype, shape, ipc_handles, empty_cache=False):
            self._sync_starts()
            result = await super().update_weight_cuda_ipc(name, dtype, shape, ipc_handles, empty_cache)
            if empty_cache:
                await self._sync_ended()
            return result

        def _sync_starts(self) -> None:
            if self._sync_started_s is None:
                self._sync_started_s = time.perf_counter()

        async def _sync_ended(self) -> None:
            weight_sync_s = time.perf_counter() - self._sync_started_s
            self._sync_started_s = None
            record, self._record = self._record, self._record.next()
            report = await self._rollout_ended(record)
            if record.num_responses == 0:
                return  # the broadcast of a resumed run, before its first rollout
            row = record.row(
                rollout=self._rollout,
                engine=self._engine,
                time_unix_s=time.time(),
                weight_sync_s=weight_sync_s,
                requantize_s=await self._requantize_s(),
                counts=self._spec_decode_counts(record),
                report=report,
            )
            self._rollout += 1
            if self._metrics_path is not None:
                append_row(self._metrics_path, row)

        async def _rollout_ended(self, record: RolloutRecord) -> dict[str, Any] | None:
            return None

        async def _requantize_s(self) -> float | None:
            return None

        def _spec_decode_counts(self, record: RolloutRecord):
            return None

    return RecordingRolloutActor


def _self_spec_class(base: type) -> type:
    class SelfSpecRolloutActor(_recording_class(base)):
        async def __init__(self, *args: Any, self_spec: SelfSpecRun, pool: Any, **kwargs: Any) -> None:
            from openrlhf_sd.engine.args import engine_args
            from openrlhf_sd.engine.step_stats import StepStats

            self._states = self_spec.states
            self._pool = pool
            self._num_syncs = 0
            self._resumed = False
            kwargs |= engine_args(self_spec.config, kwargs["model"], kwargs["tensor_parallel_size"], costs=self_spec.costs)
            kwargs["per_request_spec_decode_metrics"] = "summary"
            await super().__init__(*args, **kwargs)
            self.executor = _CountingExecutor(self.executor)
            # The engine process reports drafts and acceptances per step to its frontend's stat loggers, in this process.
            self.llm.logger_manager.stat_loggers.append(StepStats(self._on_step))
            await self._start_controller()

        async def _start_controller(self) -> None:
            # From the first mark on, the scheduler leaves the boundaries of rollouts to this actor.
            await self._call_core("self_spec_end_rollout", 0, 0, 0)
            if self._states is None or self._states.global_step == 0:
                return
            self._num_syncs = self._states.global_step
            self._resumed = True
            state = self._states.load(self._engine)
            if state is None:
                print(f"self-speculation: engine {self._engine} finds no controller state for step {self._states.global_step} in "
                      f"{self._states.folder}; it learns acceptance anew")
            else:
                await self._call_core("self_spec_restore", json.dumps(state))

        async def _call_core(self, method: str, *args: Any) -> Any:
            return await self.llm.engine_core.call_utility_async(method, *args)

        async def begin_eval(self) -> None:
            await super().begin_eval()
            await self._call_core("self_spec_begin_eval")

        async def end_eval(self) -> None:
            await super().end_eval()
            await self._call_core("self_spec_end_eval")

        async def _rollout_ended(self, record: RolloutRecord) -> dict[str, Any] | None:
            if self._resumed:
                # OpenRLHF broadcasts the checkpoint's weights before the first rollout; that sync ends no training step.
                self._resumed = False
                return None
            own = record.counts.num_drafts, record.counts.num_draft_tokens, record.counts.num_accepted_tokens
            pooled = await self._pool.add.remote(self._num_syncs, own)
            self._num_syncs += 1
            report = json.loads(await self._call_core("self_spec_end_rollout", *pooled))
            if self._states is not None:
                self._states.save(self._engine, self._num_syncs, report["controller"])
            return report

        def _on_step(self, stats) -> None:
            self._record.step(stats)

        async def generate(self, prompt_token_ids, sampling_params, multi_modal_data=None):
            output = await super().generate(prompt_token_ids, sampling_params, multi_modal_data)
            _require_logprobs(output.outputs[0], sampling_params)
            return output

        async def generate_responses(self, *args: Any, **kwargs: Any) -> list[dict[str, Any]]:
            responses = await super().generate_responses(*args, **kwargs)
            for response in responses:
                counts: ResponseCounts = response.pop(_COUNTS_KEY)
                logs = counts.logs(self._record)
                self._record.response_logged(logs)
                response["extra_logs"] = {**response["extra_logs"], **logs}
            return responses

        async def _requantize_s(self) -> float:
            # Every tensor-parallel rank re-quantizes at the same time; the sync waited for the slowest.
            return max(await self.llm.collective_rpc("self_spec_requantize_s"))

        def _spec_decode_counts(self, record: RolloutRecord):
            return record.counts

    return SelfSpecRolloutActor


_COUNTS_KEY = "_self_spec_counts"


class _CountingExecutor:
    """Wraps OpenRLHF's agent executor and hands it, per response, an engine that adds up what this response's calls drafted."""

    def __init__(self, executor: Any) -> None:
        self._executor = executor

    async def execute(self, *args: Any, llm_engine: Any, **kwargs: Any) -> dict[str, Any]:
        engine = _CountingEngine(llm_engine)
        response = await self._executor.execute(*args, llm_engine=engine, **kwargs)
        return {**response, _COUNTS_KEY: engine.counts}


class _CountingEngine:
    def __init__(self, actor: Any) -> None:
        self._actor = actor
        self.counts = ResponseCounts()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._actor, name)

    async def generate(self, *args: Any, **kwargs: Any):
        output = await self._actor.generate(*args, **kwargs)
        self.counts.add(output.outputs[0].spec_decode_metrics)
        return output


def _require_logprobs(completion: Any, sampling_params: Any) -> None:
    """OpenRLHF reads a missing token logprob as 0.0, a probability of 1; under speculation that must be an error.

    Raises:
        RuntimeError: a sampled token came back without a finite logprob though logprobs were asked for.
    """
    if sampling_params.logprobs is None:
        return
    logprobs = completion.logprobs or []
    missing = [
        position
        for position, token_id in enumerate(completion.token_ids)
        if position >= len(logprobs)
        or token_id not in logprobs[position]
        or not math.isfinite(logprobs[position][token_id].logprob)
    ]
    if missing:
        raise RuntimeError(
            f"self-speculation: {len(missing)} of {len(completion.token_ids)} sampled tokens came back without a finite logprob "
            f"(first at position {missing[0]}); OpenRLHF would train on probability 1 there"
        )
