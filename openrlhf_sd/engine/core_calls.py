"""Calls from the rollout actor to the scheduler, which lives in vLLM's engine-core process.

vLLM's client can call any method of `EngineCore` by name (`call_utility_async`), and nothing else in that process. The scheduler's module
is imported there and adds these names to the class; it replaces none.

    self_spec_end_rollout   the weights have changed: close the rollout, get its report
    self_spec_begin_eval    what follows is evaluation, which leaves the controller and the record alone
    self_spec_end_eval
    self_spec_restore       a resumed run's controller state
"""

from __future__ import annotations

import json

from vllm.v1.engine.core import EngineCore

from openrlhf_sd.policy.observation import RolloutAcceptance


def install() -> None:
    EngineCore.self_spec_end_rollout = _end_rollout
    EngineCore.self_spec_begin_eval = _begin_eval
    EngineCore.self_spec_end_eval = _end_eval
    EngineCore.self_spec_restore = _restore


def _end_rollout(self, num_drafts: int, num_draft_tokens: int, num_accepted_tokens: int) -> str:
    # Tensor-parallel ranks hold different slices; the worst of them limits the drafter.
    drafter_error = max(report["drafter_error"] for report in self.model_executor.collective_rpc("self_spec_sync_report"))
    acceptance = RolloutAcceptance(num_drafts, num_draft_tokens, num_accepted_tokens)
    return json.dumps(self.scheduler.end_rollout(acceptance, drafter_error))


def _begin_eval(self) -> None:
    self.scheduler.begin_eval()


def _end_eval(self) -> None:
    self.scheduler.end_eval()


def _restore(self, state: str) -> None:
    self.scheduler.controller.restore(json.loads(state))
