"""What is believed of step times beyond their prediction, as one Gaussian: two curves over log(batch) and a number.

    p(B)   logarithm of measured over predicted plain steps
    d(B)   the same of draft steps over plain ones
    k      the same of cycles over plain steps

Updated step by step (extended Kalman filter): a step at one batch size says much about its neighbours and little about the rest, as far
as the `Trust` says. Because covariances are kept, learning that plain steps take longer than thought leaves a measured cycle where it was
measured. Doubt grows back to what it was at first, never beyond, and means stay: what the last rollout showed at a batch size is there in
the next.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import numpy as np

NODES_PER_OCTAVE = 2
NUM_NODES = 8 * NODES_PER_OCTAVE + 1
"""Batches 1 to 256; the curves are constant beyond."""

STEP_SIGMA = 0.1
"""Scatter of a step's logarithm around the curves: noise, and the stairs of single batch sizes."""

FADES_IN_STEPS = 10_000.0
"""Doubt is back after so many steps; with STEP_SIGMA this also sets the memory where steps are measured, about 100 of them."""

STEPS_AT_ONCE = 4
"""Steps of one kind that are learned from together, for a fraction of the microseconds, where each alone would move belief little."""

LITTLE = 0.1
"""Share of a step's surprise by which it moves the belief about its own kind."""

FADE_EVERY = 16
"""Steps from one growth of doubt to the next; it is not worth its microseconds in each."""

OUTLIER_SIGMAS = 3.0
"""A surprise counts up to this: a stall of seconds is no step time."""

RECENT_STEPS = 4.0
"""Memory of the mean surprise."""

LASTING_CHANGE = 0.12
"""Mean surprise that noise of 5% per step does not make, nor one stall."""

CHANGE_SIGMA = 0.3
"""How far a step time may have changed then."""

_RECENT_FADE = math.exp(-1 / RECENT_STEPS)
_K = 2 * NUM_NODES
"""Place of k, after the nodes of p and of d."""


@dataclass(frozen=True)
class Trust:
    """How far a prior may be off: standard deviations of logarithms, and how far one batch size tells of others."""

    plain: float
    """Plain steps, at all batch sizes alike ..."""
    plain_curve: float
    """... and at each by itself."""
    draft: float
    """Draft steps over plain ones, at all batch sizes alike ..."""
    draft_curve: float
    """... and at each by itself."""
    cycle: float
    """All cycles over plain steps."""
    octaves: float
    """Distance at which two batch sizes still share 1/e of what they have by themselves."""
    knows_seconds: bool
    """False: only ratios mean anything; the first plain step says what a second is."""


CALIBRATED = Trust(plain=0.2, plain_curve=0.15, draft=0.05, draft_curve=0.05, cycle=0.05, octaves=1.0, knows_seconds=True)
"""`plain_curve`: in trainings on a CPU, plain steps took 0.9 to 1.5 times as long as calibrated, by batch (docs/measurements.md)."""
ROUGH = Trust(plain=0.3, plain_curve=0.3, draft=0.25, draft_curve=0.25, cycle=0.1, octaves=3.0, knows_seconds=False)


class StepBelief:
    """Ask only after `settle`: learning is put off until a few steps of one kind have come together, or one of another kind comes."""

    def __init__(self, trust: Trust) -> None:
        self._first = _covariance(trust)
        self._covariance = self._first.copy()
        self._mean = np.zeros(_K + 1)
        self.means: list[float] = self._mean.tolist()
        """Nodes of p, nodes of d, k."""
        self._recent = [0.0, 0.0]
        self._num_steps_since_fade = 0
        self._batch = self._gamma = 0
        self._unsettled: _Steps | None = None

    def plain(self, batch: int) -> float:
        """p."""
        node, right = _place(batch)
        return self.means[node] * (1 - right) + self.means[node + 1] * right

    def draft(self, batch: int) -> float:
        """d."""
        node, right = _place(batch)
        return self.means[NUM_NODES + node] * (1 - right) + self.means[NUM_NODES + node + 1] * right

    def cycle(self) -> float:
        """k."""
        return self.means[_K]

    def restore(self, means: list[float]) -> None:
        self._unsettled = None
        self.means = list(means)
        self._mean = np.array(means)

    def turn_to(self, batch: int, gamma: int) -> None:
        """The next step to learn from is of this kind, and is to be compared with what is believed after those of all others."""
        if batch != self._batch or gamma != self._gamma:
            self.settle()
            self._batch, self._gamma = batch, gamma

    def learn(self, draft_share: float, deviation: float, stair: float) -> tuple[float, bool]:
        """Learn from one step of the kind turned to. Returns its surprise, and whether steps of its kind take another time than they did:
        surprises of late are all one way. Only the kind that runs is then in doubt, so that the controller turns to the other one, measures
        it, and knows: a few steps, and it can never go on at a loss it does not see.

        Args:
            draft_share: of a cycle's seconds.
            deviation: logarithm of measured over believed seconds.
            stair: the part of it that is known of this batch size alone. After a change it is not.
        """
        steps = self._unsettled or self._begin(draft_share)
        surprise = min(max(deviation - stair, -steps.limit), steps.limit)
        is_cycle = self._gamma > 0
        recent = self._recent[is_cycle]
        # Plain steps count in full: where a calibration is wrong about them, cycles must stay believed as they are, at once.
        recent += (surprise * (steps.known if is_cycle else 1.0) - recent) * (1 - _RECENT_FADE)
        has_changed = abs(recent) > LASTING_CHANGE
        self._recent[is_cycle] = 0.0 if has_changed else recent
        if has_changed:
            deviation -= self.settle()
            surprise = min(max(deviation, -steps.limit), steps.limit)
            self._doubt(is_cycle)
            steps = self._begin(draft_share)
        steps.count += 1
        steps.sum += surprise
        if has_changed or steps.count == steps.at_once or abs(surprise) == steps.limit:
            self.settle()
        return surprise, has_changed

    def _begin(self, draft_share: float) -> _Steps:
        self._unsettled = steps = _Steps(self._covariance, _sensitivity(self._batch, draft_share if self._gamma else None))
        return steps

    def settle(self) -> float:
        """Believe what was learned. Returns by how much the logarithm of the seconds of the steps turned to has moved."""
        steps, self._unsettled = self._unsettled, None
        if steps is None or not steps.count:
            return 0.0
        variance = steps.variance + STEP_SIGMA**2 / steps.count
        along, by = steps.along, steps.sum / steps.count / variance
        self._mean += along * by
        self._covariance -= along[:, None] * (along / variance)
        self.means = self._mean.tolist()
        self._num_steps_since_fade += steps.count
        if self._num_steps_since_fade >= FADE_EVERY:
            self._covariance += (self._first - self._covariance) * (self._num_steps_since_fade / FADES_IN_STEPS)
            self._num_steps_since_fade = 0
        return steps.variance * by

    def _doubt(self, is_cycle: bool) -> None:
        direction = np.zeros(_K + 1)
        if is_cycle:
            direction[_K] = CHANGE_SIGMA
        else:
            direction[:NUM_NODES], direction[_K] = CHANGE_SIGMA, -CHANGE_SIGMA
        self._covariance += np.outer(direction, direction)

    def ratio_variance(self, batch: int, draft_share: float) -> float:
        """Of the logarithm of a cycle over a plain step."""
        x = _sensitivity(batch, draft_share)
        x[:NUM_NODES] = 0.0
        return float(x @ self._covariance @ x)


class _Steps:
    """Of one kind, not learned from yet."""

    __slots__ = ("along", "at_once", "count", "known", "limit", "sum", "variance")

    def __init__(self, covariance: np.ndarray, x: np.ndarray) -> None:
        self.along = covariance @ x
        """What such a step says about everything."""
        self.variance = float(x @ self.along)
        """Of its logarithm as believed, its own scatter apart."""
        self.limit = OUTLIER_SIGMAS * math.sqrt(self.variance + STEP_SIGMA**2)
        self.known = STEP_SIGMA / math.sqrt(self.variance + STEP_SIGMA**2)
        """How far a surprise is none of ignorance: where little was measured, little can have changed."""
        self.at_once = STEPS_AT_ONCE if self.variance < LITTLE * STEP_SIGMA**2 else 1
        self.count = 0
        self.sum = 0.0


def _sensitivity(batch: int, draft_share: float | None) -> np.ndarray:
    """Of the logarithm of a step's seconds to p's nodes, d's nodes and k."""
    node, right = _place(batch)
    x = np.zeros(_K + 1)
    x[node], x[node + 1] = 1 - right, right
    if draft_share is not None:
        x[NUM_NODES + node], x[NUM_NODES + node + 1] = draft_share * (1 - right), draft_share * right
        x[_K] = 1.0
    return x


@functools.lru_cache(maxsize=1024)
def _place(batch: int) -> tuple[int, float]:
    """Node of the curves at or below a batch size, and the share of the next one."""
    place = min(NODES_PER_OCTAVE * math.log2(batch), NUM_NODES - 1.0)
    node = min(int(place), NUM_NODES - 2)
    return node, place - node


def _covariance(trust: Trust) -> np.ndarray:
    """Of p's nodes, d's nodes and k, before any step."""
    octaves = np.arange(NUM_NODES) / NODES_PER_OCTAVE
    near = np.exp(-abs(octaves[:, None] - octaves) / trust.octaves)
    covariance = np.zeros((_K + 1, _K + 1))
    covariance[:NUM_NODES, :NUM_NODES] = trust.plain**2 + trust.plain_curve**2 * near
    covariance[NUM_NODES:_K, NUM_NODES:_K] = trust.draft**2 + trust.draft_curve**2 * near
    covariance[_K, _K] = trust.cycle**2
    return covariance
