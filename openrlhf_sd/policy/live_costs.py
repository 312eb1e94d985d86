"""Step times as predicted, corrected by the steps the engine itself has measured while it runs.

A calibration is a prior: another driver, a neighbour on the machine or another model length move the real times. Corrections are factors
(sums of logarithms), kept apart for plain and speculative steps, and refined from coarse to fine: all steps of the kind, the deviation of
those near this batch size, the deviation of those with this gamma. A deviation counts as far as it has samples.

The kinds are kept apart on purpose: when steps slow down, only the kind that runs is believed to be slower, so the controller turns to
the other one, measures it, and knows. That costs a few steps and can never leave it speculating at a loss it does not see.
"""

from __future__ import annotations

import math
from typing import Any

from openrlhf_sd.policy.speedup import StepCosts
from openrlhf_sd.policy.speedup import cycle_s as predicted_cycle_s

MEMORY_STEPS = 24.0
"""Samples after which an old one has faded to 1/e: step times scatter by 3 to 10%, their mean over these by 1 to 2%."""

RECENT_STEPS = 4.0
"""Memory of the quick mean."""

LASTING_CHANGE = 0.12
"""Difference of the quick mean that noise of 5% per step does not make (5 sigmas), nor one stall, which counts MAX_SURPRISE."""

FIRST_STEPS = 3.0
"""Steps of a kind that are believed as they come: a calibration may be off by any factor."""

_FADE, _RECENT_FADE = math.exp(-1 / MEMORY_STEPS), math.exp(-1 / RECENT_STEPS)

COARSE_WEIGHT = 3.0
"""Samples a finer correction needs to count as much as the coarser one above it."""

MAX_SURPRISE = 0.4
"""A step's logarithm is believed up to this far from what was expected: a stall of seconds is no step time, yet a lasting change gets
through within a few steps."""

STALE_AFTER_STEPS = 1500
"""Engine steps after which an unrefreshed fine correction counts for 1/e: the rollout has moved on."""


class Correction:
    """Fading mean of logarithms of measured over predicted seconds. A second, quick one replaces it when a lasting change shows."""

    __slots__ = ("weight", "mean", "last_step", "_recent_weight", "_recent_mean")

    def __init__(self) -> None:
        self.weight = 0.0
        self.mean = 0.0
        self.last_step = 0
        self._recent_weight = 0.0
        self._recent_mean = 0.0

    def add(self, log_ratio: float, step: int) -> None:
        self.weight = self.weight * _FADE + 1
        self.mean += (log_ratio - self.mean) / self.weight
        self._recent_weight = self._recent_weight * _RECENT_FADE + 1
        self._recent_mean += (log_ratio - self._recent_mean) / self._recent_weight
        if abs(self._recent_mean - self.mean) > LASTING_CHANGE:
            self.weight, self.mean = self._recent_weight, self._recent_mean
        self.last_step = step

    def shrunk(self, step: int) -> float:
        """The mean as far as it has samples, fresh ones: a deviation from a coarser correction is 0 until shown."""
        weight = self.weight * math.exp((self.last_step - step) / STALE_AFTER_STEPS)
        return self.mean * weight / (weight + COARSE_WEIGHT)


class LiveCosts:
    """Seconds per step of this engine, from a calibration and live corrections. Without a calibration: learned_costs.py."""

    def __init__(self, prior: StepCosts) -> None:
        self._prior = prior
        self._plain = Correction()
        self._speculative = Correction()
        self._by_batch: dict[tuple[bool, int], Correction] = {}
        self._by_gamma: dict[tuple[int, int], Correction] = {}
        self._predictions: dict[tuple[int, int, int], float] = {}
        self._num_steps = 0

    @property
    def can_decide(self) -> bool:
        return True

    def observe(self, batch: int, context: float, gamma_verified: int, gamma_drafted: int, step_s: float) -> None:
        """One step without prefills. Only whole cycles count, steps that verify as many drafts as they make."""
        if gamma_verified != gamma_drafted:
            return
        gamma = gamma_verified
        self._num_steps += 1
        step = self._num_steps
        # Not cached: a step's own batch and context, not those of its neighbourhood.
        log_ratio = math.log(step_s / predicted_cycle_s(self._prior, batch, context, gamma))
        kind = self._speculative if gamma else self._plain
        if kind.weight > FIRST_STEPS:
            expected = self._correction(batch, gamma)
            log_ratio = min(max(log_ratio, expected - MAX_SURPRISE), expected + MAX_SURPRISE)
        kind.add(log_ratio, step)
        bucket = batch_bucket(batch)
        by_batch = self._by_batch.setdefault((gamma > 0, bucket), Correction())
        by_batch.add(log_ratio - kind.mean, step)
        if gamma:
            by_gamma = self._by_gamma.setdefault((bucket, gamma), Correction())
            by_gamma.add(log_ratio - kind.mean - by_batch.shrunk(step), step)

    def cycle_s(self, batch: int, context: float, gamma: int) -> float:
        """Predicted seconds of a cycle, for `context` rounded to a neighbourhood of 128 tokens."""
        rounded = int(context) // 128
        key = (batch, rounded, gamma)
        seconds = self._predictions.get(key)
        if seconds is None:
            if len(self._predictions) > 50_000:
                self._predictions.clear()
            seconds = self._predictions[key] = predicted_cycle_s(self._prior, batch, rounded * 128 + 64, gamma)
        return seconds * math.exp(self._correction(batch, gamma))

    def num_measured(self, batch: int, is_speculative: bool) -> float:
        """Fading count of the steps of one kind measured near this batch size."""
        correction = self._by_batch.get((is_speculative, batch_bucket(batch)))
        if correction is None:
            return 0.0
        return correction.weight * math.exp((correction.last_step - self._num_steps) / STALE_AFTER_STEPS)

    def _correction(self, batch: int, gamma: int) -> float:
        step = self._num_steps
        own, other = (self._speculative, self._plain) if gamma else (self._plain, self._speculative)
        # A kind never measured is believed to be half as far off as the other one: a slow machine is slow at both, but then a trial
        # of this one costs little, and tells.
        value = own.mean if own.weight else 0.5 * other.mean
        bucket = batch_bucket(batch)
        fine = self._by_batch.get((gamma > 0, bucket))
        if fine is not None:
            value += fine.shrunk(step)
        if gamma:
            finest = self._by_gamma.get((bucket, gamma))
            if finest is not None:
                value += finest.shrunk(step)
        return value

    def state(self) -> dict[str, Any]:
        """The coarse corrections; the fine ones are learned anew."""
        return {
            "plain": [self._plain.weight, self._plain.mean],
            "speculative": [self._speculative.weight, self._speculative.mean],
        }

    def restore(self, state: dict[str, Any]) -> None:
        self._plain.weight, self._plain.mean = state["plain"]
        self._speculative.weight, self._speculative.mean = state["speculative"]


def batch_bucket(batch: int) -> int:
    """Batch sizes within a factor of about 1.4 share their fine corrections."""
    return round(2 * math.log2(batch))
