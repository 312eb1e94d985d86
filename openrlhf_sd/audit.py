"""`--self-spec.audit N`: every N rollouts a few responses are scored again by the same engine without speculation.

The logprobs that came with the sampled tokens are those of the policy as speculation left its KV cache; a prefill of the same tokens
computes them anew. What differs by more than bf16 arithmetic was generated from a wrong state, and stops the run.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

NUM_RESPONSES = 4
STRIDE = 8
"""Every eighth request of a rollout, in the order they start: chosen before anyone knows how long they become, and of several prompts."""

MAX_MEAN = 0.05
"""Mean |difference| per token. Between a decode and a prefill of the same tokens 0.002 to 0.01 was measured (docs/modes.md)."""

FAR = 0.5
MAX_FAR_SHARE = 0.01
MIN_FAR_TOKENS = 3
"""Single unlikely tokens may be far off; more than this share of them, or more than two in a short audit, may not."""


class AuditError(RuntimeError):
    """Responses are not what the policy samples; the message names the file with the evidence."""


def is_due(rollout: int, every: int) -> bool:
    """Args:
    rollout: 0-based; the first one is audited.
    every: 0 means never.
    """
    return every > 0 and rollout % every == 0


@dataclass(frozen=True)
class ScoredResponse:
    """Token ids and, for those after the first `num_skipped`, both logprobs."""

    prompt_token_ids: list[int]
    token_ids: list[int]
    temperature: float
    num_skipped: int
    rollout_logprobs: list[float]
    rescored_logprobs: list[float]


@dataclass(frozen=True)
class Audit:
    num_responses: int
    num_tokens: int
    mean_abs_diff: float | None
    max_abs_diff: float | None
    num_far: int

    @property
    def is_noise(self) -> bool:
        if not self.num_tokens:
            return True
        too_many = max(MIN_FAR_TOKENS, math.ceil(MAX_FAR_SHARE * self.num_tokens))
        return self.mean_abs_diff <= MAX_MEAN and self.num_far < too_many

    def as_row(self) -> dict[str, Any] | None:
        """None where there was nothing to compare."""
        if not self.num_tokens:
            return None
        return {
            "num_responses": self.num_responses,
            "num_tokens": self.num_tokens,
            "mean_abs_diff": self.mean_abs_diff,
            "max_abs_diff": self.max_abs_diff,
        }


def audit(responses: Sequence[ScoredResponse]) -> Audit:
    """Raises AuditError for a logprob that is NaN or infinite: it is missing, not 0."""
    diffs = [
        abs(rollout - rescored)
        for response in responses
        for rollout, rescored in zip(response.rollout_logprobs, response.rescored_logprobs, strict=True)
    ]
    if not all(map(math.isfinite, diffs)):
        raise AuditError("--self-spec.audit: a logprob is NaN or infinite")
    return Audit(
        num_responses=len(responses),
        num_tokens=len(diffs),
        mean_abs_diff=sum(diffs) / len(diffs) if diffs else None,
        max_abs_diff=max(diffs, default=None),
        num_far=sum(diff > FAR for diff in diffs),
    )


def save_evidence(folder: Path, rollout: int, engine: int, result: Audit, responses: Sequence[ScoredResponse]) -> AuditError:
    """Write the responses with both logprobs to `folder`. Returns the error to stop with."""
    path = folder / f"rollout{rollout}-engine{engine}.json"
    document = {**result.as_row(), "responses": [vars(response) for response in responses]}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(document, indent=1))
        where = f"the evidence is in {path}"
    except OSError as error:
        where = f"the evidence could not be saved to {path} ({error.strerror})"
    return AuditError(
        f"--self-spec.audit: rollout {rollout} of engine {engine}: {result.num_tokens} sampled tokens scored again without speculation "
        f"differ by {result.mean_abs_diff:.3f} in mean logprob ({result.max_abs_diff:.2f} at most, {result.num_far} by more than {FAR}), "
        f"more than bf16 noise; {where}"
    )
