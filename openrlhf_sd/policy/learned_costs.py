"""Step times of a machine nobody has calibrated, learned from the rollout's own steps.

    plain step      T(B) = a + b * B, and a correction near each batch size
    any step        T(B) * (1 + d * drafted + v * B * verified)

`d` is a draft step over a plain one, `v` what each draft token adds to the step that verifies it. Each pair by recursive least squares
with forgetting, as `b` and `v` change where a step stops being bound by memory. Steps that only draft or only verify, which every change
of gamma brings, tell `d` and `v` apart.
"""

from __future__ import annotations

import math
from typing import Any

from openrlhf_sd.policy.live_costs import MAX_SURPRISE, Correction, batch_bucket

BATCH_SLOPE, BATCH_SLOPE_SIGMA = 1 / 64, 1 / 64
"""b / a before a second batch size was measured: between a large GPU (1/200) and a small CPU (1/8)."""

LEVEL_SIGMA = 0.3
"""Of `a`, relative to the first step's."""

DRAFT_RATIO, DRAFT_RATIO_SIGMA = 0.6, 0.2
"""`d` before any draft: 0.45 on the published A100 sweeps, 0.6 to 0.7 on the CPUs we measured."""

VERIFY_SLOPE, VERIFY_SLOPE_SIGMA = 0.01, 0.01
"""`v` before any verification."""

STEP_SIGMA = 0.1
"""Scatter of a step's time, as a share of it."""

FORGETTING = 0.98
"""Weight of the past per step: a memory of 50 speculative steps."""

MIN_PLAIN_STEPS = 3
"""Plain steps to measure before anything can be compared with them."""


class LearnedCosts:
    def __init__(self) -> None:
        self._plain: TwoTermFit | None = None
        self._speculation = TwoTermFit((DRAFT_RATIO, VERIFY_SLOPE), (DRAFT_RATIO_SIGMA, VERIFY_SLOPE_SIGMA))
        self._by_batch: dict[int, Correction] = {}
        self._num_speculative: dict[int, int] = {}
        self._num_steps = 0
        self._num_plain = 0

    @property
    def can_decide(self) -> bool:
        return self._num_plain >= MIN_PLAIN_STEPS

    def observe(self, batch: int, context: float, gamma_verified: int, gamma_drafted: int, step_s: float) -> None:
        """One step without prefills."""
        self._num_steps += 1
        if gamma_verified or gamma_drafted:
            if self._plain is not None:
                self._learn_speculation(batch, gamma_verified, gamma_drafted, step_s)
            return
        self._num_plain += 1
        if self._plain is None:
            level_s = step_s / (1 + BATCH_SLOPE * batch)
            self._plain = TwoTermFit(
                (level_s, BATCH_SLOPE * level_s), (LEVEL_SIGMA * level_s, BATCH_SLOPE_SIGMA * level_s)
            )
        self._plain.learn(1.0, float(batch), step_s)
        expected = self._log_correction(batch)
        log_ratio = math.log(step_s / self._line_s(batch))
        log_ratio = min(max(log_ratio, expected - MAX_SURPRISE), expected + MAX_SURPRISE)
        self._by_batch.setdefault(batch_bucket(batch), Correction()).add(log_ratio, self._num_steps)

    def _learn_speculation(self, batch: int, verified: int, drafted: int, step_s: float) -> None:
        bucket = batch_bucket(batch)
        self._num_speculative[bucket] = self._num_speculative.get(bucket, 0) + 1
        plain_s = self._plain_s(batch)
        self._speculation.learn(float(drafted), float(batch * verified), step_s / plain_s - 1, step_s / plain_s)

    def cycle_s(self, batch: int, context: float, gamma: int) -> float:
        draft_ratio, verify_slope = self._speculation.terms
        return self._plain_s(batch) * (1 + gamma * (draft_ratio + verify_slope * batch))

    def num_measured(self, batch: int, is_speculative: bool) -> float:
        bucket = batch_bucket(batch)
        if is_speculative:
            return self._num_speculative.get(bucket, 0)
        return self._by_batch[bucket].weight if bucket in self._by_batch else 0.0

    def _plain_s(self, batch: int) -> float:
        return self._line_s(batch) * math.exp(self._log_correction(batch))

    def _line_s(self, batch: int) -> float:
        level_s, slope_s = self._plain.terms
        return level_s + slope_s * batch

    def _log_correction(self, batch: int) -> float:
        fine = self._by_batch.get(batch_bucket(batch))
        return 0.0 if fine is None else fine.shrunk(self._num_steps)

    def state(self) -> dict[str, Any]:
        """Seconds are learned anew in a few steps; the ratios are worth keeping."""
        return {"draft_ratio": self._speculation.terms[0], "verify_slope": self._speculation.terms[1]}

    def restore(self, state: dict[str, Any]) -> None:
        self._speculation.terms = state["draft_ratio"], state["verify_slope"]


class TwoTermFit:
    """z = p * x + q * y with p, q >= 0, by recursive least squares with forgetting."""

    def __init__(self, terms: tuple[float, float], sigmas: tuple[float, float]) -> None:
        self.terms = terms
        self._first = sigmas[0] ** 2, sigmas[1] ** 2
        self._pp, self._pq, self._qq = self._first[0], 0.0, self._first[1]

    def learn(self, x: float, y: float, z: float, scale: float | None = None) -> None:
        """Args:
        scale: what STEP_SIGMA is a share of; z itself by default.
        """
        scale = z if scale is None else scale
        surprise = z - (self.terms[0] * x + self.terms[1] * y)
        limit = MAX_SURPRISE * scale
        surprise = min(max(surprise, -limit), limit)
        # Forget, but not beyond what was known at first: a direction that no step informs on must not blow up.
        self._pp = min(self._pp / FORGETTING, self._first[0])
        self._qq = min(self._qq / FORGETTING, self._first[1])
        bound = 0.99 * math.sqrt(self._pp * self._qq)
        self._pq = min(max(self._pq / FORGETTING, -bound), bound)
        along_x, along_y = self._pp * x + self._pq * y, self._pq * x + self._qq * y
        gain = 1 / ((STEP_SIGMA * scale) ** 2 + x * along_x + y * along_y)
        p = self.terms[0] + along_x * gain * surprise
        q = self.terms[1] + along_y * gain * surprise
        self.terms = max(0.0, p), max(0.0, q)
        self._pp -= along_x * along_x * gain
        self._pq -= along_x * along_y * gain
        self._qq -= along_y * along_y * gain
