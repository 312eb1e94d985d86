"""How many draft tokens a verify step accepts.

Chance is fixed per request and token, before any policy runs: whether the token at a place of a request's output would be accepted, were
it drafted, does not depend on who drafts it or when. All policies so meet the same luck, and their difference is not noise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from openrlhf_sd.config import MAX_GAMMA, SelfSpecError
from openrlhf_sd.policy.speedup import acceptance_length, geometric_acceptance_length

PADDING = MAX_GAMMA + 1
"""Drafts run past the end of a request; so do the draws."""

HARD_SHARE = 0.25
HARD_TOKENS = 20.0
EASY_REJECTION = 0.2
"""`bursty`: a quarter of the tokens is hard, in stretches of 20 on average; easy tokens are rejected a fifth as often as the mean."""


class Draws(Protocol):
    """The luck of one engine's requests in one rollout, laid out one after the other in one flat array."""

    def accepted(self, places: np.ndarray, gamma: int) -> np.ndarray:
        """Of gamma draft tokens from each place on, how many are accepted; int64, shape of `places`."""


class AcceptanceProcess(Protocol):
    def mean_acceptance_length(self, gamma: int) -> float:
        """Expected tokens per cycle, the target's own included, if every cycle drafts `gamma`."""

    def draw(self, rng: np.random.Generator, sizes: np.ndarray) -> Draws:
        """`sizes`: places per request, shape (requests,)."""


@dataclass(frozen=True)
class Independent:
    """Every draft token is accepted with the same probability, whatever happened before."""

    acceptance: float

    def mean_acceptance_length(self, gamma: int) -> float:
        return geometric_acceptance_length(self.acceptance, gamma)

    def draw(self, rng: np.random.Generator, sizes: np.ndarray) -> Draws:
        return _RunLengths(rng.random(sizes.sum()) < self.acceptance)


@dataclass(frozen=True)
class ByPosition:
    """Position i (0-based) of a draft is accepted with `acceptances[i]`, given that all before it were; the last holds for those after."""

    acceptances: tuple[float, ...]

    def mean_acceptance_length(self, gamma: int) -> float:
        return acceptance_length(self._extended(gamma), gamma)

    def _extended(self, gamma: int) -> tuple[float, ...]:
        return self.acceptances + self.acceptances[-1:] * max(0, gamma - len(self.acceptances))

    def draw(self, rng: np.random.Generator, sizes: np.ndarray) -> Draws:
        return _Uniforms(rng.random(sizes.sum()), np.array(self._extended(MAX_GAMMA)))


@dataclass(frozen=True)
class Bursty:
    """Each request wanders between easy and hard stretches (a two-state Markov chain over its tokens); `acceptance` is the mean over
    tokens."""

    acceptance: float

    def _by_state(self) -> np.ndarray:
        easy = EASY_REJECTION * (1 - self.acceptance)
        return 1 - np.array([easy, (1 - self.acceptance - (1 - HARD_SHARE) * easy) / HARD_SHARE])

    def draw(self, rng: np.random.Generator, sizes: np.ndarray) -> Draws:
        num_places = sizes.sum()
        # A two-state chain is one that, with a constant chance per token, draws its state anew.
        is_fresh = rng.random(num_places) < _fresh_chance()
        is_fresh[np.concatenate([[0], np.cumsum(sizes)[:-1]])] = True
        fresh_state = (rng.random(num_places) < HARD_SHARE).astype(np.int64)
        last_fresh = np.maximum.accumulate(np.where(is_fresh, np.arange(num_places), 0))
        return _RunLengths(rng.random(num_places) < self._by_state()[fresh_state[last_fresh]])

    def mean_acceptance_length(self, gamma: int) -> float:
        """Exact: a cycle begins more often in a hard stretch than a token lies in one, because short cycles begin there."""
        share, accept = np.array([1 - HARD_SHARE, HARD_SHARE]), self._by_state()
        step = (1 - _fresh_chance()) * np.eye(2) + _fresh_chance() * share
        reach, ends, length = np.eye(2), np.zeros((2, 2)), np.ones(2)
        for _ in range(gamma):  # reach[s, t]: begun in s, all accepted so far, next token in t
            ends += reach @ np.diag(1 - accept) @ step
            reach = reach @ np.diag(accept)
            length += reach.sum(axis=1)
            reach = reach @ step
        ends += reach @ step  # all accepted: the target's own token comes on top
        begin = np.array([ends[1, 0], ends[0, 1]]) / (ends[1, 0] + ends[0, 1])
        return float(begin @ length)


def _fresh_chance() -> float:
    return 1 / (HARD_TOKENS * (1 - HARD_SHARE))


class _RunLengths:
    def __init__(self, is_accepted: np.ndarray) -> None:
        num_places = len(is_accepted)
        next_rejected = np.where(is_accepted, num_places, np.arange(num_places))
        next_rejected = np.minimum.accumulate(next_rejected[::-1])[::-1]
        self._runs = next_rejected - np.arange(num_places)

    def accepted(self, places: np.ndarray, gamma: int) -> np.ndarray:
        return np.minimum(self._runs[places], gamma)


class _Uniforms:
    def __init__(self, uniforms: np.ndarray, acceptances: np.ndarray) -> None:
        self._uniforms = uniforms
        self._acceptances = acceptances
        self._ahead = np.arange(MAX_GAMMA)

    def accepted(self, places: np.ndarray, gamma: int) -> np.ndarray:
        is_accepted = self._uniforms[places[:, None] + self._ahead[:gamma]] < self._acceptances[:gamma]
        return np.logical_and.accumulate(is_accepted, axis=1).sum(axis=1)


def acceptance_process(spec: str) -> AcceptanceProcess:
    """`0.9`, `positions:0.95,0.9,0.8` or `bursty:0.9`.

    Raises:
        SelfSpecError: another form, or a probability outside 0..1.
    """
    kind, has_kind, rest = spec.partition(":")
    if not has_kind:
        return Independent(_probabilities(spec, spec)[0])
    if kind == "positions":
        return ByPosition(_probabilities(spec, rest))
    if kind == "bursty":
        [acceptance, *more] = _probabilities(spec, rest)
        process = Bursty(acceptance)
        if more or process._by_state()[1] < 0:
            lowest = 1 - HARD_SHARE / (1 - (1 - HARD_SHARE) * EASY_REJECTION)
            raise SelfSpecError(f"--acceptance: {spec}: bursty takes one number of at least {lowest:.3f}")
        return process
    raise SelfSpecError(f"--acceptance: {spec!r} is none of 0.9, positions:0.95,0.9,0.8 and bursty:0.9")


def _probabilities(spec: str, text: str) -> tuple[float, ...]:
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError:
        raise SelfSpecError(f"--acceptance: {spec!r} is none of 0.9, positions:0.95,0.9,0.8 and bursty:0.9") from None
    if not all(0 <= value <= 1 for value in values):
        raise SelfSpecError(f"--acceptance: {spec}: a probability lies within 0..1")
    return values


def conditional(per_position: Sequence[float]) -> tuple[float, ...]:
    """Probabilities of accepting position i given all before it, from the shares of drafts whose position i was accepted."""
    before = (1.0, *per_position[:-1])
    return tuple(min(1.0, now / earlier) if earlier > 0 else 0.0 for now, earlier in zip(per_position, before, strict=True))
