"""How likely a draft token is accepted, by position, as the running rollout shows it: forgetting, and honest about how little is known.

An estimate 0.05 too high costs more than one 0.05 too low (every draft step after the first rejection is wasted), so decisions read
`lower`; only the question whether a trial is worth its price reads `upper`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

MEMORY_STEPS = 300.0
"""Verify steps after which a count has faded to 1/e: long against the noise of one request, short against a training step's rollout."""

MEMORY_DRAFTS = 20_000.0
"""Drafts after which it has faded, for large batches, where a few steps say all."""

RECENT_STEPS = 12.0
"""Memory of the second, quick record that notices a collapse."""

CHANGE_SIGMAS = 5.0
"""The quick record overrules the slow one when they differ by more than chance explains; it is consulted at every step, hence the 5."""

FIRST_GUESS = 0.8
"""Acceptance before anything was drafted, in the range of 4-bit round-to-nearest drafters."""

FIRST_GUESS_DRAFTS = 4.0
"""Weight of that guess, in drafts."""

NEIGHBOUR_DRAFTS = 16.0
"""Weight of the position before as the guess for a position: acceptance changes little from one to the next."""

SMALLEST_UNIT = 1e-100
"""Far above what a float can no longer hold."""

SIGMAS = 1.0
"""Width of the bounds. Draft tokens of one request are not independent, so a sigma counted as if they were covers less than 68%.
Half of it saves about 0.1 points more of a rollout in simulation where they are, and as much less where rejections come in bursts."""


class AcceptanceEstimate:
    """Positions are 0-based. The probability of position i is that of being accepted given that all positions before it were."""

    def __init__(self, gamma_max: int) -> None:
        self._slow = _Counts(gamma_max)
        self._recent = _Counts(gamma_max)
        self._bounds: tuple[list[float], list[float]] | None = None

    def observe(self, num_draft_tokens_per_pos: Sequence[int], num_accepted_tokens_per_pos: Sequence[int]) -> None:
        """Count the drafts verified in one step."""
        num_drafts = num_draft_tokens_per_pos[0]
        self._slow.fade(math.exp(-1 / MEMORY_STEPS - num_drafts / MEMORY_DRAFTS))
        self._recent.fade(math.exp(-1 / RECENT_STEPS))
        for counts in (self._slow, self._recent):
            counts.add(num_draft_tokens_per_pos, num_accepted_tokens_per_pos)
        if self._slow.differs_from(self._recent):
            self._slow.restore(self._recent.reached, self._recent.accepted)
        self._bounds = None

    def fade(self, factor: float) -> None:
        """Trust what is known less: the weights have changed, or a while has passed without drafts."""
        self._slow.fade(factor)
        self._recent.fade(factor)
        self._bounds = None

    def num_reached(self, position: int) -> float:
        """Fading count of the drafts that position's acceptance is known from."""
        return self._slow.num_reached(position)

    def lower(self) -> list[float]:
        return self._both_bounds()[0]

    def upper(self) -> list[float]:
        return self._both_bounds()[1]

    def _both_bounds(self) -> tuple[list[float], list[float]]:
        if self._bounds is None:
            self._bounds = self._slow.bounds()
        return self._bounds

    def state(self) -> dict[str, Any]:
        return {"reached": self._slow.reached, "accepted": self._slow.accepted}

    def restore(self, state: dict[str, Any]) -> None:
        """Raises ValueError when the saved counts belong to another gamma_max."""
        if len(state["reached"]) != self._slow.num_positions:
            raise ValueError(f"saved acceptance covers {len(state['reached'])} positions, this run drafts {self._slow.num_positions}")
        self._slow.restore(state["reached"], state["accepted"])
        self._bounds = None


class _Counts:
    """Per position: drafts that reached it (drafted, all before accepted) and drafts accepted there.

    All fade alike, so one number fades instead, the unit they are counted in.
    """

    def __init__(self, num_positions: int) -> None:
        self._reached = [0.0] * num_positions
        self._accepted = [0.0] * num_positions
        self._unit = 1.0

    @property
    def num_positions(self) -> int:
        return len(self._reached)

    @property
    def reached(self) -> list[float]:
        return [count * self._unit for count in self._reached]

    @property
    def accepted(self) -> list[float]:
        return [count * self._unit for count in self._accepted]

    def restore(self, reached: Sequence[float], accepted: Sequence[float]) -> None:
        self._reached, self._accepted = list(reached), list(accepted)
        self._unit = 1.0

    def num_reached(self, position: int) -> float:
        return self._reached[position] * self._unit

    def fade(self, factor: float) -> None:
        self._unit *= factor
        if self._unit < SMALLEST_UNIT:
            self.restore(self.reached, self.accepted)

    def add(self, drafted: Sequence[int], accepted: Sequence[int]) -> None:
        unit = self._unit
        still_accepted = drafted[0]
        for position, (num_drafted, num_accepted) in enumerate(zip(drafted, accepted)):
            # Drafts cut short near the end of a sequence never reach the later positions.
            self._reached[position] += (still_accepted if still_accepted < num_drafted else num_drafted) / unit
            self._accepted[position] += num_accepted / unit
            still_accepted = num_accepted

    def differs_from(self, other: _Counts) -> bool:
        """Whether acceptance over all positions differs by more than chance."""
        own_n, other_n = sum(self._reached) * self._unit, sum(other._reached) * other._unit
        if own_n < 1 or other_n < 1:
            return False
        own_rate, other_rate = sum(self._accepted) * self._unit / own_n, sum(other._accepted) * other._unit / other_n
        variance = own_rate * (1 - own_rate) * (1 / own_n + 1 / other_n) + 1 / other_n**2
        return (own_rate - other_rate) ** 2 > CHANGE_SIGMAS**2 * variance

    def bounds(self) -> tuple[list[float], list[float]]:
        lower, upper = [], []
        unit, mean, weight, known = self._unit, FIRST_GUESS, FIRST_GUESS_DRAFTS, FIRST_GUESS_DRAFTS
        for reached, accepted in zip(self._reached, self._accepted):
            reached *= unit
            # The position before is the guess for this one.
            mean = (accepted * unit + mean * weight) / (reached + weight)
            # What is known of this position, or, through its neighbour, at most as much as of the one before.
            known = reached + (weight if weight < known else known)
            width = SIGMAS * math.sqrt(max(mean * (1 - mean), 1 / (known + 2)) / (known + 1))
            lower.append(mean - width if mean > width else 0.0)
            upper.append(mean + width if mean + width < 1.0 else 1.0)
            weight = NEIGHBOUR_DRAFTS
        return lower, upper
