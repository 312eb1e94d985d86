"""vLLM's multi-process executor, without the question for drafts after steps that draft nothing.

On CPU vLLM schedules synchronously: after every step of an engine with a drafter it asks the worker for the draft tokens, one more
message to another process. With gamma 0 the answer is known, and for a small model the message is a tenth of the step.
"""

from __future__ import annotations

from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.executor.multiproc_executor import MultiprocExecutor
from vllm.v1.outputs import DraftTokenIds


class SelfSpecExecutor(MultiprocExecutor):
    def execute_model(self, scheduler_output: SchedulerOutput, non_block: bool = False):
        self._last_gamma = scheduler_output.num_spec_tokens_to_schedule
        return super().execute_model(scheduler_output, non_block)

    def take_draft_token_ids(self) -> DraftTokenIds | None:
        return super().take_draft_token_ids() if self._last_gamma else None
