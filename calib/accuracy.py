"""How well predicted step times meet measured ones, scored in one place for validation, cross-validation and the tables in docs.

    pairs = prediction_pairs(cost_model, sweep)     # measured against predicted; pairs of several folds may be joined
    score(pairs).mape["cycle"]

What counts for the policy is not seconds but the decision: `ToggleAccuracy` is the share of (batch, context, gamma, acceptance) at
which predicted and measured times agree on whether speculation reaches 1 + margin times the plain speed. Far from that boundary any
model is right, so the share near it is given too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from calib.sweep_csv import Sweep
from openrlhf_sd.policy.cost_model import CostModel
from openrlhf_sd.policy.speedup import StepCosts, cycle_s, geometric_acceptance_length, speedup

SCORED_KINDS = ("target", "draft", "verify", "cycle")

DEFAULT_MARGIN = 0.05
"""The paper's toggle speculates at or above a predicted speed-up of 1 + this."""

ACCEPTANCES = tuple(percent / 100 for percent in range(80, 98))
"""0.80 to 0.97, the range in which the decision is open on the published sweeps."""

NEAR_BOUNDARY = 0.1
"""A measured speed-up within this share of 1 + margin is near the boundary."""


@dataclass(frozen=True, slots=True)
class Pair:
    """A measured time and what the model says."""

    kind: str
    batch: int
    context: int
    gamma: int
    measured_s: float
    predicted_s: float

    @property
    def point(self) -> tuple[int, int, int]:
        return (self.batch, self.context, self.gamma)


@dataclass(frozen=True)
class ToggleAccuracy:
    """Shares of right decisions in 0..1, None where there was nothing to decide, and out of how many."""

    overall: float | None
    num_decisions: int
    near_boundary: float | None
    num_near_boundary: int


@dataclass(frozen=True)
class Scores:
    """By kind: mean absolute relative error (0.02 is 2%), coefficient of determination (None for fewer than two different times), how
    many times were scored."""

    mape: dict[str, float]
    r_squared: dict[str, float | None]
    num_scored: dict[str, int]
    toggle: ToggleAccuracy


def prediction_pairs(cost_model: CostModel, sweep: Sweep) -> list[Pair]:
    """Pairs of the kinds in SCORED_KINDS, predicted for the conditions of the sweep (`costs_in_sweep`).

    Where a cycle was not timed whole, it is gamma draft steps and a verify step, as measured.
    """
    measured = {(timing.kind, *timing.point): timing.seconds for timing in sweep.timings if timing.kind in SCORED_KINDS}
    for timing in sweep.timings:
        draft_s = measured.get(("draft", *timing.point))
        if timing.kind == "verify" and draft_s is not None:
            measured.setdefault(("cycle", *timing.point), timing.gamma * draft_s + timing.seconds)
    return [Pair(*key, seconds, float(_predict(cost_model, sweep, *key))) for key, seconds in measured.items()]


def costs_in_sweep(cost_model: CostModel, sweep: Sweep, gamma: int) -> StepCosts:
    """The cost model under the sweep's prompts and, if it had one engine per gamma, in the one built for `gamma`."""
    costs = cost_model.under(sweep.prompts)
    return _EngineBuiltFor(costs, gamma) if sweep.engine_per_gamma and gamma > 0 else costs


def score(pairs: Sequence[Pair], margin: float = DEFAULT_MARGIN) -> Scores:
    """Scores of all kinds that occur in `pairs`."""
    by_kind = {kind: [pair for pair in pairs if pair.kind == kind] for kind in SCORED_KINDS}
    by_kind = {kind: found for kind, found in by_kind.items() if found}
    times = {kind: (_column(found, "measured_s"), _column(found, "predicted_s")) for kind, found in by_kind.items()}
    return Scores(
        mape={kind: mape(*both) for kind, both in times.items()},
        r_squared={kind: r_squared(*both) for kind, both in times.items()},
        num_scored={kind: len(found) for kind, found in by_kind.items()},
        toggle=toggle_accuracy(pairs, margin),
    )


def mape(measured, predicted) -> float:
    """Mean of |predicted / measured - 1| over arrays of positive numbers."""
    return float(np.mean(np.abs(np.asarray(predicted) / np.asarray(measured) - 1)))


def r_squared(measured, predicted) -> float | None:
    """1 - residual / total sum of squares; None where all measured values are one value."""
    measured, predicted = np.asarray(measured), np.asarray(predicted)
    total = np.sum((measured - measured.mean()) ** 2)
    return float(1 - np.sum((measured - predicted) ** 2) / total) if total > 0 else None


def toggle_accuracy(pairs: Sequence[Pair], margin: float = DEFAULT_MARGIN, acceptances: Sequence[float] = ACCEPTANCES) -> ToggleAccuracy:
    """Do predicted and measured speed-up lie on the same side of 1 + margin? Over all cycles whose target step is in `pairs` too."""
    right, near = [], []
    for target, cycle in cycles_with_targets(pairs):
        measured = known_speedup(target.measured_s, cycle.measured_s, cycle.gamma, np.asarray(acceptances))
        predicted = known_speedup(target.predicted_s, cycle.predicted_s, cycle.gamma, np.asarray(acceptances))
        right.append((measured >= 1 + margin) == (predicted >= 1 + margin))
        near.append(np.abs(measured / (1 + margin) - 1) < NEAR_BOUNDARY)
    if not right:
        return ToggleAccuracy(None, 0, None, 0)
    right, near = np.concatenate(right), np.concatenate(near)
    return ToggleAccuracy(
        overall=float(right.mean()),
        num_decisions=right.size,
        near_boundary=float(right[near].mean()) if near.any() else None,
        num_near_boundary=int(near.sum()),
    )


def cycles_with_targets(pairs: Sequence[Pair]) -> list[tuple[Pair, Pair]]:
    """(target step, cycle) of every cycle whose target step at the same batch and context is in `pairs`."""
    targets = {(pair.batch, pair.context): pair for pair in pairs if pair.kind == "target"}
    cycles = [pair for pair in pairs if pair.kind == "cycle" and (pair.batch, pair.context) in targets]
    return [(targets[cycle.batch, cycle.context], cycle) for cycle in cycles]


def known_speedup(target_s: float, whole_cycle_s: float, gamma: int, acceptance):
    """Speed-up from a target step and a whole cycle, at an acceptance or an array of them."""
    length = geometric_acceptance_length(acceptance, gamma)
    return speedup(_KnownTimes(target_s, whole_cycle_s), None, None, gamma, length)


@dataclass(frozen=True)
class _KnownTimes:
    """A target step and a whole cycle as `StepCosts`, for `speedup`: the cycle in the place of the verify step, drafting free."""

    target_s: float
    whole_cycle_s: float

    def target_step_s(self, batch, context):
        return self.target_s

    def draft_step_s(self, batch, context):
        return 0.0

    def verify_step_s(self, batch, context, gamma):
        return self.whole_cycle_s


@dataclass(frozen=True)
class _EngineBuiltFor:
    """A cost model in an engine whose draft steps are padded for one gamma."""

    cost_model: CostModel
    gamma: int

    def target_step_s(self, batch, context):
        return self.cost_model.target_step_s(batch, context)

    def draft_step_s(self, batch, context):
        return self.cost_model.draft_step_s(batch, context, self.gamma)

    def verify_step_s(self, batch, context, gamma):
        return self.cost_model.verify_step_s(batch, context, gamma)


def _predict(cost_model: CostModel, sweep: Sweep, kind: str, batch: int, context: int, gamma: int):
    costs = costs_in_sweep(cost_model, sweep, gamma)
    if kind == "target":
        return costs.target_step_s(batch, context)
    if kind == "draft":
        return costs.draft_step_s(batch, context)
    if kind == "verify":
        return costs.verify_step_s(batch, context, gamma)
    return cycle_s(costs, batch, context, gamma)


def _column(pairs: Sequence[Pair], name: str) -> np.ndarray:
    return np.array([getattr(pair, name) for pair in pairs])
