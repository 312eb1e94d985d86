"""OpenRLHF's vLLM rollout actor, keeping records: one row of metrics.jsonl per rollout."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from openrlhf_sd.metrics import METRICS_FILE
from openrlhf_sd.plain_steps import PlainSteps
from openrlhf_sd.rollout_record import RolloutRecord
from openrlhf_sd.row_writer import RowWriter

FAILURE = "failure"
"""Key of an exception in the report of a rollout, which ends the run once the rollout has its row."""


def plain_rollout_actor(upstream_actor: Any) -> Any:
    """Ray actor class: `upstream_actor`, a vanilla engine, plus one row in metrics.jsonl per rollout. Ray refuses to subclass an actor
    class, so the subclass is made of what its decorator wrapped."""
    import ray

    return ray.remote(_plain_class(upstream_actor.__ray_metadata__.modified_class))


def print_news(line: str | None) -> None:
    """Ray shows what an actor prints in the log of the run."""
    if line is not None:
        print(line, flush=True)


def recording_class(base: type) -> type:
    class RecordingRolloutActor(base):
        """A rollout is what is generated between two ends of a weight broadcast; the row is written at the second. All engines take part in
        every broadcast, so they count rollouts alike, those in which one had nothing to do included."""

        async def __init__(self, *args: Any, engine: int, run_dir: Path | None, resumed_step: int, **kwargs: Any) -> None:
            self._engine = engine
            self._run_dir = run_dir
            self._rows = run_dir and RowWriter(run_dir / METRICS_FILE)
            self._rollout = resumed_step
            self._awaits_checkpoint = resumed_step > 0
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

        @property
        def _is_eval(self) -> bool:
            return self._training_record is not None

        async def begin_eval(self) -> None:
            """What follows is evaluation (eval_mark.py): it counts into no training rollout's row."""
            self._training_record, self._record = self._record, RolloutRecord(acceptance_before=self._record.acceptance_before)

        async def end_eval(self) -> None:
            self._record, self._training_record = self._training_record, None

        async def update_weight(self, name, dtype, shape, empty_cache=False):
            await self._sync_starts()
            result = await super().update_weight(name, dtype, shape, empty_cache)
            if empty_cache:
                await self._sync_ended()
            return result

        async def update_weight_cuda_ipc(self, name, dtype, shape, ipc_handles, empty_cache=False):
            await self._sync_starts()
            result = await super().update_weight_cuda_ipc(name, dtype, shape, ipc_handles, empty_cache)
            if empty_cache:
                await self._sync_ended()
            return result

        async def _sync_starts(self) -> None:
            if self._sync_started_s is None:
                self._sync_started_s = time.perf_counter()

        async def _sync_ended(self) -> None:
            began_s, ended_s, self._sync_started_s = self._sync_started_s, time.perf_counter(), None
            if self._awaits_checkpoint:
                # OpenRLHF broadcasts the checkpoint's weights before the first rollout; that sync ends no training step.
                self._awaits_checkpoint = False
                await self._checkpoint_arrived()
                return
            record, self._record = self._record, self._record.next(began_s, ended_s)
            report = await self._rollout_ended(record) or {}
            failure = report.pop(FAILURE, None)  # once the row is written: it is the one that somebody will want to see
            rollout, self._rollout = self._rollout, self._rollout + 1
            if record.num_responses and self._rows is not None:
                row = record.row(
                    rollout=rollout,
                    engine=self._engine,
                    time_unix_s=time.time(),
                    weight_sync_s=ended_s - began_s,
                    counts=self._spec_decode_counts(record),
                    report=report,
                )
                print_news(self._rows.write(row))
            if failure is not None:
                raise failure

        async def _checkpoint_arrived(self) -> None:
            """The weights of a resumed run are there."""

        async def _rollout_ended(self, record: RolloutRecord) -> dict[str, Any] | None:
            """Of rollout number `self._rollout`: what goes into the row beside what this class has counted; see `RolloutRecord.row`."""
            return None

        def _spec_decode_counts(self, record: RolloutRecord):
            return None

    return RecordingRolloutActor


def _plain_class(base: type) -> type:
    class PlainRolloutActor(recording_class(base)):
        """A vanilla engine. Its steps are timed here, where vLLM's own statistics of every step arrive."""

        async def __init__(self, *args: Any, **kwargs: Any) -> None:
            from openrlhf_sd.step_stats import StepStats

            self._steps = PlainSteps()
            self._training_steps: PlainSteps | None = None
            await super().__init__(*args, **kwargs)
            self.llm.logger_manager.stat_loggers.append(StepStats(self._on_step))

        def _on_step(self, scheduler_stats, iteration_stats) -> None:
            if iteration_stats is None:
                return  # part of a prompt, or an abort: nothing was sampled
            self._steps.add(
                time.perf_counter(),
                num_new_tokens=iteration_stats.num_generation_tokens,
                num_first_tokens=len(iteration_stats.time_to_first_tokens_iter),
                num_prompt_tokens=iteration_stats.num_prompt_tokens,
                num_unfinished=scheduler_stats.num_running_reqs + scheduler_stats.num_waiting_reqs,
            )

        async def begin_eval(self) -> None:
            await super().begin_eval()
            self._training_steps, self._steps = self._steps, PlainSteps()

        async def end_eval(self) -> None:
            await super().end_eval()
            self._steps, self._training_steps = self._training_steps, None

        async def _rollout_ended(self, record: RolloutRecord) -> dict[str, Any]:
            steps, self._steps = self._steps, PlainSteps()
            return steps.report()

    return PlainRolloutActor
