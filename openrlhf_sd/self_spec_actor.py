"""OpenRLHF's vLLM rollout actor with a self-speculating engine."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

from openrlhf_sd.audit import AuditError
from openrlhf_sd.rescoring import Auditor
from openrlhf_sd.rollout_actor import FAILURE, print_news, recording_class
from openrlhf_sd.rollout_record import ResponseCounts, RolloutRecord
from openrlhf_sd.row_writer import RowWriter
from openrlhf_sd.stop_strings import ending_at_stop_strings

if TYPE_CHECKING:
    from openrlhf_sd.rollout_engines import SelfSpecRun


def self_spec_rollout_actor(upstream_actor: Any) -> Any:
    """Ray actor class: a recording actor whose engine hosts the self-drafter."""
    import ray

    return ray.remote(_self_spec_class(upstream_actor.__ray_metadata__.modified_class))


def _self_spec_class(base: type) -> type:
    class SelfSpecRolloutActor(recording_class(ending_at_stop_strings(base))):
        async def __init__(self, *args: Any, self_spec: SelfSpecRun, pool: Any, **kwargs: Any) -> None:
            from openrlhf_sd.engine.args import engine_args
            from openrlhf_sd.step_stats import StepStats  # imports vLLM, like the line above

            self._states = self_spec.states
            self._state_rows = self._states and RowWriter(self._states.path(kwargs["engine"]))
            self._pool = pool
            self._auditor: Auditor | None = None
            kwargs |= engine_args(self_spec.config, kwargs["model"], kwargs["tensor_parallel_size"], costs=self_spec.costs)
            kwargs["per_request_spec_decode_metrics"] = "summary"
            await super().__init__(*args, **kwargs)
            self.executor = _CountingExecutor(self.executor)
            # The engine process reports drafts and acceptances per step to its frontend's stat loggers, in this process.
            self.llm.logger_manager.stat_loggers.append(StepStats(self._on_step))
            if self_spec.config.audit:
                self._auditor = Auditor(self.llm, self_spec.config.audit, self._run_dir / "audit", self._engine, self._rollout)
            await self._start_controller()

        async def _start_controller(self) -> None:
            # From the first mark on, the scheduler leaves the boundaries of rollouts to this actor.
            await self._call_core("self_spec_end_rollout", 0, 0, 0)
            if self._states is None or self._states.global_step == 0:
                return
            state = self._states.saved(self._engine)
            if state is None:
                print(
                    f"self-speculation: engine {self._engine} finds no controller state for step {self._states.global_step} in "
                    f"{self._states.folder}; it learns acceptance anew"
                )
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

        async def _checkpoint_arrived(self) -> None:
            await self._sync_report(self._rollout)

        async def _rollout_ended(self, record: RolloutRecord) -> dict[str, Any]:
            own = record.counts.num_drafts, record.counts.num_draft_tokens, record.counts.num_accepted_tokens
            pooled = await self._pool.add.remote(self._rollout, own)
            global_step = self._rollout + 1
            report = json.loads(await self._call_core("self_spec_end_rollout", *pooled))
            if self._state_rows is not None:
                print_news(self._state_rows.write(self._states.row(global_step, report["controller"])))
            return report | await self._sync_report(global_step) | self._audit_report()

        def _audit_report(self) -> dict[str, Any]:
            try:
                result = self._auditor and self._auditor.take_result()
            except AuditError as failure:
                return {"audit": None, FAILURE: failure}
            return {"audit": result and result.as_row()}

        async def sleep(self, level=1):
            await self._audit()  # asleep, an engine has no KV cache to score with
            await super().sleep(level)

        async def _sync_starts(self) -> None:
            if self._sync_started_s is None:
                await self._audit()
            await super()._sync_starts()

        async def _audit(self) -> None:
            if self._auditor is None or not self._auditor.has_responses:
                return
            await self._call_core("self_spec_begin_eval")  # the controller shall not learn from it
            try:
                await self._auditor.rescore()
            finally:
                await self._call_core("self_spec_end_eval")

        async def _sync_report(self, global_step: int) -> dict[str, Any]:
            """Of the sync that brought the weights of this step.

            Raises:
                RuntimeError: the engines of the run were sent different weights.
            """
            reports = await self.llm.collective_rpc("self_spec_sync_report")
            for report in reports:
                await self._pool.agree.remote(global_step, report["fingerprint"])
            # Every tensor-parallel rank re-quantizes at the same time; the sync waited for the slowest.
            slowest = max(reports, key=lambda report: report["requantize_s"])
            return {**slowest, "drafter_error": max(report["drafter_error"] for report in reports)}

        def _on_step(self, scheduler_stats, iteration_stats) -> None:
            self._record.step(scheduler_stats.spec_decoding_stats)

        async def generate(self, prompt_token_ids, sampling_params, multi_modal_data=None):
            audited = self._auditor and not self._is_eval and self._auditor.choose(sampling_params)
            params = audited or sampling_params
            output = await super().generate(prompt_token_ids, params, multi_modal_data)
            _require_logprobs(output.outputs[0], params)
            if audited:
                self._auditor.keep(prompt_token_ids, params, output.outputs[0])
            return output

        async def generate_responses(self, *args: Any, **kwargs: Any) -> list[dict[str, Any]]:
            responses = await super().generate_responses(*args, **kwargs)
            for response in responses:
                counts: ResponseCounts = response.pop(_COUNTS_KEY)
                logs = counts.logs(self._record)
                self._record.response_logged(logs)
                # An agent executor of the user's own may leave them out: OpenRLHF does without (`samples_generator.py`).
                response["extra_logs"] = {**response.get("extra_logs", {}), **logs}
            return responses

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
        if position >= len(logprobs) or token_id not in logprobs[position] or not math.isfinite(logprobs[position][token_id].logprob)
    ]
    if missing:
        raise RuntimeError(
            f"self-speculation: {len(missing)} of {len(completion.token_ids)} sampled tokens came back without a finite logprob "
            f"(first at position {missing[0]}); OpenRLHF would train on probability 1 there"
        )
