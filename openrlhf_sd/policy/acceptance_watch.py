"""Whether the drafter still is a copy of the policy, by how its drafts fare: a collapse ends speculation for the rollout."""

from __future__ import annotations

from collections import deque

from openrlhf_sd.policy.observation import MeasuredStep

WINDOW = 512
"""First draft tokens that a verdict needs: at an acceptance of 0.6 fewer than one window in 10^5 falls to COLLAPSED_AT by chance."""

COLLAPSED_AT = 0.5
"""Acceptance of the first draft token. Even free drafts make at most 1 / (1 - 0.5) = 2 tokens per cycle there, and a quantized copy of the
policy has above 0.8 by the paper's measurements and ours: something else is wrong."""

COARSE_ERROR = 0.25
"""Relative error of a drafter's linear (`engine/drafter_probe.py`): twice what w4 round-to-nearest leaves in well-behaved weights."""

HOT = 1.2
"""Temperature from which on a policy's distribution is flat enough for small logit errors to cost acceptance."""


class AcceptanceWatch:
    """One rollout of one engine.

    Args:
        quant: the drafter's scheme, for the cause.
        drafter_error: largest relative error of the drafter's linears after the last weight sync; None where nobody measured it.
    """

    def __init__(self, quant: str, drafter_error: float | None) -> None:
        self._quant = quant
        self._drafter_error = drafter_error
        self._steps: deque[tuple[int, int]] = deque()
        self._num_drafts = 0
        self._num_accepted = 0
        self.cause: str | None = None
        """Why speculation is off for the rest of the rollout, in one line; None while it is not."""

    def has_collapsed(self, step: MeasuredStep) -> bool:
        """Take a step in. True where its rollout should be turned off."""
        if not step.num_draft_tokens_per_pos:
            return False
        self._add(step.num_draft_tokens_per_pos[0], step.num_accepted_tokens_per_pos[0])
        return self._num_drafts >= WINDOW and self._num_accepted < COLLAPSED_AT * self._num_drafts

    def turn_off(self, mean_temperature: float) -> None:
        """Args:
        mean_temperature: of the requests that decode.
        """
        rate = self._num_accepted / self._num_drafts
        self.cause = f"{rate:.0%} of the last {self._num_drafts} first draft tokens accepted: {self._likely_cause(mean_temperature)}"

    def _add(self, num_drafts: int, num_accepted: int) -> None:
        self._steps.append((num_drafts, num_accepted))
        self._num_drafts += num_drafts
        self._num_accepted += num_accepted
        while self._num_drafts - self._steps[0][0] >= WINDOW:
            oldest_drafts, oldest_accepted = self._steps.popleft()
            self._num_drafts -= oldest_drafts
            self._num_accepted -= oldest_accepted

    def _likely_cause(self, mean_temperature: float) -> str:
        """A stale or non-finite drafter is none of them: either stops the run at the sync that leaves it."""
        if self._drafter_error is not None and self._drafter_error > COARSE_ERROR:
            return (
                f"scheme too coarse ({self._quant} leaves an error of {self._drafter_error:.0%} in a layer's output); use "
                f"--self-spec.quant {'w8a8' if self._quant == 'w4' else 'w4'} or a smaller --self-spec.group_size"
            )
        if mean_temperature > HOT:
            return f"temperature too high ({mean_temperature:.2f}); lower --rollout.temperature or train without --self-spec"
        known = "unmeasured" if self._drafter_error is None else f"{self._drafter_error:.1%}"
        return (
            f"cause unknown (drafter error {known}, temperature {mean_temperature:.2f}); --self-spec.audit 1 shows whether the policy's "
            "own logprobs are right"
        )
