"""Step times as predicted, corrected by the steps the engine itself has measured while it runs.

    plain step      exp(p(B)) * T
    cycle           exp(p(B) + k) * (V + g * D * exp(d(B)))        T, V, D as predicted; p, d, k in step_belief.py

What p, d and k leave at single batch sizes and gammas are stairs, a few percent, which no neighbour shares: each has a fading mean of its
own. A calibration is a prior that is trusted; `RoughCosts` (rough_costs.py) one that is not.
"""

from __future__ import annotations

import math
import statistics
from typing import Any

from openrlhf_sd.policy.speedup import StepCosts
from openrlhf_sd.policy.step_belief import StepBelief, Trust

STAIR_STEPS = 24.0
"""Memory of the mean at one batch size."""

STAIR_WEIGHT = 3.0
"""Steps at one batch size that count as much as the curves."""

STAIR_SIGMA = 0.03
"""Height of stairs, to be expected where a batch size was not measured."""

STALE_AFTER_STEPS = 10_000.0
"""Steps after which an unrefreshed stair counts for 1/e: as long as belief takes to fade, more than a rollout."""

MAX_PREDICTIONS = 2_000
"""Of the prior, kept; a rollout meets about 1,000 pairs of batch and neighbourhood of contexts."""

MIN_PLAIN_STEPS = 3
"""Plain steps to measure before an uncalibrated engine can compare anything with them."""

ANY_GAMMA = 0
"""Key of what the cycles of all gammas share at a batch size."""

_STAIR_FADE = math.exp(-1 / STAIR_STEPS)


class LiveCosts:
    """Seconds per step of this engine.

    Args:
        gamma_max: draft lengths 0..gamma_max can be asked for.
    """

    def __init__(self, prior: StepCosts, trust: Trust, gamma_max: int) -> None:
        self._prior = prior
        self._trust = trust
        self._gammas = range(1, gamma_max + 1)
        self._scale_s = 1.0 if trust.knows_seconds else None
        self._belief = StepBelief(trust)
        self._plain_stairs: dict[int, _Stair] = {}
        self._cycle_stairs: dict[int, dict[int, _Stair]] = {}
        self._parts: dict[tuple[int, int], tuple[float, float, list[float]]] = {}
        self._num_steps = 0
        self._first_scales_s: list[float] = []

    @property
    def can_decide(self) -> bool:
        return self._scale_s is not None

    def observe(self, batch: int, context: float, gamma_verified: int, gamma_drafted: int, step_s: float) -> None:
        """One step without prefills. Only whole cycles count, steps that verify as many drafts as they make."""
        gamma = gamma_verified
        if gamma != gamma_drafted:
            return
        plain_s, draft_s, verify_s = self._predicted(batch, context)
        if self._scale_s is None:
            if not gamma:
                self._learn_scale(step_s / plain_s)
            return
        self._num_steps += 1
        self._belief.turn_to(batch, gamma)
        believed = self._belief.plain(batch)
        draft_share = 0.0
        if gamma:
            drafts_s = gamma * draft_s * math.exp(self._belief.draft(batch))
            cycle_s = verify_s[gamma - 1] + drafts_s
            draft_share = drafts_s / cycle_s
            believed += self._belief.cycle() + math.log(cycle_s)
        else:
            believed += math.log(plain_s)
        stair = self._stair(batch, gamma)
        deviation = math.log(step_s / self._scale_s) - believed
        surprise, has_changed = self._belief.learn(draft_share, deviation, stair)
        if has_changed:
            (self._cycle_stairs if gamma else self._plain_stairs).clear()
            stair = 0.0
        self._learn_stair(batch, gamma, stair + surprise)

    def _learn_scale(self, scale_s: float) -> None:
        """By the median of the first plain steps: one that waited for a kernel to be compiled says nothing, and all else is learned in
        proportion."""
        self._first_scales_s.append(scale_s)
        if len(self._first_scales_s) == MIN_PLAIN_STEPS:
            self._scale_s = statistics.median(self._first_scales_s)

    def _learn_stair(self, batch: int, gamma: int, deviation: float) -> None:
        step = self._num_steps
        if not gamma:
            self._plain_stairs.setdefault(batch, _Stair()).add(deviation, step)
            return
        stairs = self._cycle_stairs.setdefault(batch, {ANY_GAMMA: _Stair()})
        stairs[ANY_GAMMA].add(deviation, step)
        stairs.setdefault(gamma, _Stair()).add(deviation - stairs[ANY_GAMMA].height(step), step)

    def _stair(self, batch: int, gamma: int) -> float:
        """Deviation from the curves."""
        step = self._num_steps
        if not gamma:
            return self._plain_stairs[batch].height(step) if batch in self._plain_stairs else 0.0
        stairs = self._cycle_stairs.get(batch, {})
        return sum(stairs[key].height(step) for key in (ANY_GAMMA, gamma) if key in stairs)

    def cycles_s(self, batch: int, context: float) -> list[float]:
        """Seconds of a cycle at every gamma; at 0 of a plain step."""
        self._belief.settle()
        plain_s, draft_s, verify_s = self._predicted(batch, context)
        level_s = self._scale_s * math.exp(self._belief.plain(batch))
        cycle_s = level_s * math.exp(self._belief.cycle())
        draft_s *= math.exp(self._belief.draft(batch))
        seconds = [level_s * plain_s * math.exp(self._stair(batch, 0))]
        stairs = self._cycle_stairs.get(batch)
        if stairs:
            cycle_s *= math.exp(stairs[ANY_GAMMA].height(self._num_steps))
        for gamma in self._gammas:
            gamma_s = cycle_s * (verify_s[gamma - 1] + gamma * draft_s)
            if stairs and gamma in stairs:
                gamma_s *= math.exp(stairs[gamma].height(self._num_steps))
            seconds.append(gamma_s)
        return seconds

    def sigma(self, batch: int, gamma: int) -> float:
        """How far a cycle over a plain step may be off: standard deviation of the logarithm of their ratio."""
        self._belief.settle()
        draft_share = gamma / (gamma + 2)  # a verify step takes as long as two draft steps, roughly
        stairs = sum(STAIR_WEIGHT / (STAIR_WEIGHT + self.num_measured(batch, kind)) for kind in (False, True))
        return math.sqrt(self._belief.ratio_variance(batch, draft_share) + STAIR_SIGMA**2 * stairs)

    def num_measured(self, batch: int, is_speculative: bool) -> float:
        """Fading count of the steps of one kind measured at this batch size."""
        stair = self._cycle_stairs.get(batch, {}).get(ANY_GAMMA) if is_speculative else self._plain_stairs.get(batch)
        return 0.0 if stair is None else stair.faded(self._num_steps)

    def _predicted(self, batch: int, context: float) -> tuple[float, float, list[float]]:
        """(plain, draft, verify by gamma from 1 on) of the prior, for `context` rounded to a neighbourhood of 128 tokens."""
        key = batch, int(context) // 128
        parts = self._parts.get(key)
        if parts is None:
            if len(self._parts) > MAX_PREDICTIONS:
                self._parts.clear()
            prior, middle = self._prior, key[1] * 128 + 64
            verify_s = [prior.verify_step_s(batch, middle, gamma) for gamma in self._gammas]
            parts = prior.target_step_s(batch, middle), prior.draft_step_s(batch, middle), verify_s
            self._parts[key] = parts
        return parts

    def state(self) -> dict[str, Any]:
        """The curves; how sure they are is learned anew, and so are stairs."""
        self._belief.settle()
        return {"is_calibrated": self._trust.knows_seconds, "scale_s": self._scale_s, "curves": self._belief.means}

    def restore(self, state: dict[str, Any]) -> None:
        """Raises ValueError when the state was saved with a calibration and this run has none, or the other way round."""
        if state.get("is_calibrated") != self._trust.knows_seconds:
            raise ValueError(
                "the saved step times belong to a run " + ("without" if self._trust.knows_seconds else "with") + " a calibration"
            )
        self._scale_s = state["scale_s"]
        self._belief.restore(state["curves"])


class _Stair:
    """Fading mean of deviations at one batch size, counted as far as it has steps."""

    __slots__ = ("last_step", "mean", "weight")

    def __init__(self) -> None:
        self.weight = 0.0
        self.mean = 0.0
        self.last_step = 0

    def add(self, deviation: float, step: int) -> None:
        self.weight = self.faded(step) * _STAIR_FADE + 1
        self.mean += (deviation - self.mean) / self.weight
        self.last_step = step

    def faded(self, step: int) -> float:
        return self.weight * math.exp((self.last_step - step) / STALE_AFTER_STEPS)

    def height(self, step: int) -> float:
        weight = self.faded(step)
        return self.mean * weight / (weight + STAIR_WEIGHT)
