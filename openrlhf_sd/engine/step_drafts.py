"""Drafts verified in one engine step."""

from __future__ import annotations

from itertools import accumulate


class StepDrafts:
    """Counts by length while requests are gone through (hundreds per step), by position when asked."""

    def __init__(self, gamma_max: int) -> None:
        self.num_drafts = 0
        self._num_by_draft_length = [0] * (gamma_max + 1)
        self._num_by_accepted = [0] * (gamma_max + 1)

    def add(self, num_draft_tokens: int, num_accepted_tokens: int) -> None:
        """One request's."""
        self.num_drafts += 1
        self._num_by_draft_length[num_draft_tokens] += 1
        self._num_by_accepted[num_accepted_tokens] += 1

    @property
    def num_draft_tokens(self) -> int:
        return sum(length * count for length, count in enumerate(self._num_by_draft_length))

    @property
    def num_accepted_tokens(self) -> int:
        return sum(length * count for length, count in enumerate(self._num_by_accepted))

    @property
    def num_draft_tokens_per_pos(self) -> tuple[int, ...]:
        return _at_least(self._num_by_draft_length)

    @property
    def num_accepted_tokens_per_pos(self) -> tuple[int, ...]:
        return _at_least(self._num_by_accepted)


def _at_least(num_by_length: list[int]) -> tuple[int, ...]:
    """Entry i: how many are longer than i."""
    return tuple(accumulate(reversed(num_by_length[1:])))[::-1]
