"""What a controller is told. Raw counts and seconds, frozen; whoever fills them owns the clock."""

from __future__ import annotations

from dataclasses import dataclass


def acceptance_rate(num_accepted_tokens: int | None, num_draft_tokens: int | None) -> float | None:
    """Accepted draft tokens per draft token; None when nothing was drafted."""
    return num_accepted_tokens / num_draft_tokens if num_draft_tokens else None


def mean_acceptance_length(num_accepted_tokens: int | None, num_drafts: int | None) -> float | None:
    """Tokens per draft-and-verify cycle and request, the target's own included: 1 + accepted / drafts. None without drafts."""
    return 1 + num_accepted_tokens / num_drafts if num_drafts else None


@dataclass(frozen=True, slots=True)
class StepObservation:
    """What is known before a step is scheduled."""

    num_decodes: int
    """Running requests whose prompt is fully computed; prefills do not count."""

    mean_context: float = 0.0
    """Mean tokens in context over those requests, prompt included; 0 without any."""

    num_prefills: int = 0
    """Requests waiting or with a prompt partly computed: they will decode soon."""


@dataclass(frozen=True, slots=True)
class MeasuredStep:
    """What one engine step turned out to be. A step verifies the drafts made in the step before it, then drafts for the next."""

    num_decodes: int
    mean_context: float
    step_s: float | None
    """Wall seconds from the step before to this one; None where that is no step time (engine was idle, first step)."""

    num_prefill_tokens: int
    """Prompt tokens computed in this step; above 0 its time says nothing about decoding."""

    gamma_verified: int
    """Draft tokens per request verified in `step_s`, 0 for a plain decode step."""

    gamma_drafted: int
    """Draft steps run in `step_s`."""

    num_drafts: int = 0
    """Requests of which drafts were verified."""

    num_draft_tokens_per_pos: tuple[int, ...] = ()
    """Of those, how many had a draft token at position i (0-based)."""

    num_accepted_tokens_per_pos: tuple[int, ...] = ()
    """Of those, how many had position i accepted (then all before it were too)."""

    num_tokens: int = 0
    """Tokens that came out for requests; those past a stop token or a length limit do not count."""

    num_ended: int = 0
    """Requests that ended in this step."""

    is_followed_alike: bool = True
    """Whether the step after it drafts as much. Asynchronous scheduling launches that one before it fetches the output of this one, so
    `step_s` may hold launches of draft steps that this one did not run, or lack some that it did."""


@dataclass(frozen=True, slots=True)
class RolloutAcceptance:
    """Draft counts of one finished training rollout, summed over its verify steps and over all engines of the run."""

    num_drafts: int
    num_draft_tokens: int
    num_accepted_tokens: int

    @property
    def acceptance_rate(self) -> float | None:
        return acceptance_rate(self.num_accepted_tokens, self.num_draft_tokens)

    @property
    def mean_acceptance_length(self) -> float | None:
        return mean_acceptance_length(self.num_accepted_tokens, self.num_drafts)
