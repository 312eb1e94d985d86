"""How soon requests end, as the running rollout shows it. Tokens accepted past the end of a request gain nothing: with responses of 50
tokens and drafts of 7, all accepted, 7% of what comes out.
"""

from __future__ import annotations

import math

MIN_MEMORY_ENDS = 8.0
"""Ends after which a count has faded to 1/e; with large batches as many as there are requests, because a batch that has shrunk to a third
has other requests left than it had: those that end early are gone."""


class EndRate:
    """Zero until the first request has ended."""

    def __init__(self) -> None:
        self._num_tokens = 0.0
        self._num_ended = 0.0

    def observe(self, batch: int, num_tokens: int, num_ended: int) -> None:
        """Count one step's tokens, of `batch` requests of which `num_ended` ended in it."""
        if num_ended:
            fade = math.exp(-num_ended / max(MIN_MEMORY_ENDS, batch))
            self._num_tokens *= fade
            self._num_ended *= fade
        self._num_tokens += num_tokens
        self._num_ended += num_ended

    def per_token(self) -> float:
        """Probability that a token is a request's last one."""
        return self._num_ended / self._num_tokens if self._num_ended else 0.0
