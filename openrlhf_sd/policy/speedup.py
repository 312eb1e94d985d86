"""The arithmetic of speculation, once: seconds of a cycle, tokens of a cycle, and what they say about speed (EfficientRollout, section
on the cost model).

    symbol  here                                    meaning
    B       batch                                   decoding requests in the step
    S       context                                 mean tokens in context per request
    g       gamma                                   draft tokens per request and cycle
    T_T     StepCosts.target_step_s(B, S)           plain decode step, one token per request
    T_D     StepCosts.draft_step_s(B, S)            one draft step
    T_V     StepCosts.verify_step_s(B, S, g)        target step on g + 1 tokens per request
    a       acceptance                              probability that a draft token is accepted, given that those before it were
    L       mean acceptance length                  tokens per cycle and request, the target's own included: 1 + accepted / drafts

All seconds. Every function takes floats, or numpy arrays that broadcast.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class StepCosts(Protocol):
    """Whatever predicts or knows step times: a fitted cost model, an interpolated sweep, live measurements."""

    def target_step_s(self, batch, context): ...

    def draft_step_s(self, batch, context): ...

    def verify_step_s(self, batch, context, gamma): ...


def cycle_s(costs: StepCosts, batch, context, gamma: int):
    """Seconds of one draft-and-verify cycle; gamma 0 is a plain decode step."""
    if gamma == 0:
        return costs.target_step_s(batch, context)
    return gamma * costs.draft_step_s(batch, context) + costs.verify_step_s(batch, context, gamma)


def geometric_acceptance_length(acceptance, gamma: int):
    """L = (1 - a^(g+1)) / (1 - a), summed term by term, so that a = 1 needs no special case."""
    return sum(acceptance**position for position in range(gamma + 1))


def acceptance_lengths(acceptance_by_position: Sequence[float]) -> list[float]:
    """L at every gamma from 0 on.

    Args:
        acceptance_by_position: probability that the draft token at position i is accepted, given that all before it were.
    """
    length = reached = 1.0
    lengths = [length]
    for acceptance in acceptance_by_position:
        reached *= acceptance
        length += reached
        lengths.append(length)
    return lengths


def acceptance_length(acceptance_by_position: Sequence[float], gamma: int) -> float:
    return acceptance_lengths(acceptance_by_position[:gamma])[-1]


def speedup(costs: StepCosts, batch, context, gamma: int, mean_acceptance_length):
    """Plain seconds per token over speculative seconds per token: L / (g T_D / T_T + T_V / T_T)."""
    return mean_acceptance_length * costs.target_step_s(batch, context) / cycle_s(costs, batch, context, gamma)
