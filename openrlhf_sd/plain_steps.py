"""The timeline of a vanilla engine, from what its front end sees: no code of ours runs in that engine's process. Pure."""

from __future__ import annotations

from typing import Any

from openrlhf_sd.policy.observation import MeasuredStep
from openrlhf_sd.step_ledger import StepLedger


class PlainSteps:
    """One rollout. A step's time is the interval between the arrivals of two steps' outputs at the front end: a step that the front end
    was slow to take makes the next one look shorter, which evens out over a rollout."""

    def __init__(self) -> None:
        self._ledger = StepLedger(None)
        self._last_output_s: float | None = None

    def add(self, now_s: float, num_new_tokens: int, num_first_tokens: int, num_prompt_tokens: int, num_unfinished: int) -> None:
        """One engine step that sampled something.

        Args:
            now_s: when its output arrived, seconds of one monotonic clock.
            num_new_tokens: sampled in it, one per request.
            num_first_tokens: of those, the ones after a prompt.
            num_prompt_tokens: computed in it.
            num_unfinished: requests the engine is left with; without any, the time to the next output is no step time.
        """
        step = MeasuredStep(
            num_decodes=num_new_tokens - num_first_tokens,
            mean_context=0.0,
            step_s=None if self._last_output_s is None else now_s - self._last_output_s,
            num_prefill_tokens=num_prompt_tokens,
            gamma_verified=0,
            gamma_drafted=0,
            num_tokens=num_new_tokens,
        )
        self._ledger.add(step)
        self._last_output_s = now_s if num_unfinished else None

    def report(self) -> dict[str, Any]:
        """`num_steps` and `timeline`, as of the scheduler of a self-speculating engine; all else of a rollout is null there."""
        report = self._ledger.report()
        return {key: report[key] for key in ("num_steps", "timeline")}
