"""What a step truly costs in the simulation: one table of seconds over batch, context and gamma, from a sweep or from a cost model.

From a sweep, inside the measured grid: linear in log(batch) and in log(context) between neighbouring points, linear in gamma. Outside of
it the last segment is continued linearly in batch, in context and, for the verify step, in gamma; the seconds of one draft step are held
constant beyond the measured gammas, because their dependence on gamma is only padding. A verify step shorter than any measured is the
larger of two: the measured ones continued (the decode step's attention is another kernel, cheaper in long contexts), and the straight
line from the decode step (continued in batch and gamma at once, verify steps would undercut it). `is_extrapolated` says which steps lie
outside.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from openrlhf_sd.config import MAX_GAMMA, SelfSpecError
from openrlhf_sd.policy.speedup import StepCosts

LOWEST_SHARE = 0.5
"""A time continued below the measured grid never falls under this share of the smallest measured one."""

MODEL_CONTEXTS = tuple(round(2 ** (exponent / 4)) for exponent in range(4 * 5, 4 * 15 + 1))
"""Contexts at which a cost model is tabulated: 32 to 32,768, four per octave."""


class StepTimes:
    """Seconds of every step an engine can take with up to `max_batch` requests.

    Args:
        contexts: rising, shape (C,).
        plain_s: plain vLLM's decode step, shape (max_batch, C), first row for batch 1.
        verify_s: the speculating engine's target step on gamma + 1 tokens per request, shape (max_batch, MAX_GAMMA + 1, C); at gamma 0 its
            decode step with speculation off.
        draft_s: all gamma draft steps together, same shape; 0 at gamma 0.
        measured: smallest and largest (batch, context, gamma) that are no extrapolation; gamma 0 is none.
    """

    def __init__(self, contexts: Sequence[float], plain_s, verify_s, draft_s, measured, num_filled: int = 0) -> None:
        self.max_batch = len(plain_s)
        self.num_filled = num_filled
        self._contexts = [float(context) for context in contexts]
        self._log_contexts = [math.log(context) for context in self._contexts]
        self._plain = np.asarray(plain_s)
        self._cycle = np.asarray(verify_s) + np.asarray(draft_s)
        # Plain lists: one number out of a numpy array costs three times as much, and the loop asks twice per step.
        self._verify_lists = np.asarray(verify_s).tolist()
        self._draft_lists = np.asarray(draft_s).tolist()
        self._measured = measured

    def verify_s(self, batch: int, context: float, gamma: int) -> float:
        return self._between(self._verify_lists[batch - 1][gamma], context)

    def draft_s(self, batch: int, context: float, gamma: int) -> float:
        return self._between(self._draft_lists[batch - 1][gamma], context)

    def _between(self, row: list[float], context: float) -> float:
        index, inside, beyond = self._place(context)
        low, high = row[index], row[index + 1]
        return low + inside * (high - low) + beyond * max(0.0, high - low)

    def cycles_s(self, batch: int, context: float) -> np.ndarray:
        """Seconds of a whole cycle at every gamma, shape (MAX_GAMMA + 1,)."""
        index, inside, beyond = self._place(context)
        low = self._cycle[batch - 1, :, index]
        growth = self._cycle[batch - 1, :, index + 1] - low
        return low + inside * growth + beyond * np.maximum(0.0, growth)

    def plain_rollout_s(self, batches: np.ndarray, contexts: np.ndarray) -> float:
        """Seconds of plain vLLM's steps with these batches and contexts, shapes (steps,)."""
        index, inside, beyond = (np.array(part) for part in zip(*map(self._place, contexts.tolist()), strict=True))
        low = self._plain[batches - 1, index]
        growth = self._plain[batches - 1, index + 1] - low
        return float(np.sum(low + inside * growth + beyond * np.maximum(0.0, growth)))

    def is_extrapolated(self, batch: int, context: float, gamma: int) -> bool:
        (low_batch, low_context, low_gamma), (high_batch, high_context, high_gamma) = self._measured
        is_inside = low_batch <= batch <= high_batch and low_context <= context <= high_context
        return not (is_inside and (gamma == 0 or low_gamma <= gamma <= high_gamma))

    def prefill_s(self, num_tokens: int) -> float:
        """Seconds to compute prompt tokens, at the marginal cost of one more token in the largest verify steps of the table."""
        verify = self._verify_lists[-1]
        half = MAX_GAMMA // 2
        return num_tokens * max(0.0, verify[MAX_GAMMA][0] - verify[half][0]) / ((MAX_GAMMA - half) * self.max_batch)

    def _place(self, context: float) -> tuple[int, float, float]:
        """Segment of the context axis, how much of its growth lies before `context`, and how often that growth is to be added beyond the
        axis. Beyond it, times do not fall: a last segment that does is noise."""
        contexts = self._contexts
        index = min(max(bisect_right(contexts, context) - 1, 0), len(contexts) - 2)
        low, high = contexts[index], contexts[index + 1]
        if context > high:
            return index, 1.0, (context - high) / (high - low)
        if context < low:
            return index, (context - low) / (high - low), 0.0
        logs = self._log_contexts
        return index, (math.log(context) - logs[index]) / (logs[index + 1] - logs[index]), 0.0


def from_cost_model(costs: StepCosts, max_batch: int) -> StepTimes:
    """The cost model as truth: a policy that holds it predicts perfectly."""
    contexts = np.array(MODEL_CONTEXTS, dtype=float)
    batches = np.arange(1, max_batch + 1, dtype=float)[:, None]
    plain = _on_grid(costs.target_step_s(batches, contexts), batches, contexts)
    draft = _on_grid(costs.draft_step_s(batches, contexts), batches, contexts)
    verify = [plain] + [_on_grid(costs.verify_step_s(batches, contexts, g), batches, contexts) for g in range(1, MAX_GAMMA + 1)]
    drafts = [gamma * draft for gamma in range(MAX_GAMMA + 1)]
    everything = ((1, MODEL_CONTEXTS[0], 1), (max_batch, MODEL_CONTEXTS[-1], MAX_GAMMA))
    return StepTimes(MODEL_CONTEXTS, plain, np.stack(verify, axis=1), np.stack(drafts, axis=1), everything)


def _on_grid(seconds: Any, batches: np.ndarray, contexts: np.ndarray) -> np.ndarray:
    return np.broadcast_to(np.asarray(seconds, dtype=float), (batches.size, contexts.size))


def from_timings(timings: Iterable[Any], max_batch: int, *, off_costs_target_sd: bool, source: str = "the sweep") -> StepTimes:
    """The measured points of a sweep as truth.

    Args:
        timings: with `kind` "target", "draft", "verify", "cycle" or "target_sd", `batch`, `context`, `gamma`, `seconds`. A measured cycle
            scales the draft and verify times of its point, so that together they take as long as it did.
        off_costs_target_sd: what a speculating engine's step costs with speculation off: its own measured step ("target_sd"), or, where
            that column cannot be trusted, plain vLLM's.

    Raises:
        SelfSpecError: no target, draft or verify times, or fewer than two batches or contexts.
    """
    points: dict[tuple[str, int], dict[tuple[int, int], float]] = {}
    for timing in timings:
        points.setdefault((timing.kind, timing.gamma if timing.kind in ("draft", "verify", "cycle") else 0), {})[
            (timing.batch, timing.context)
        ] = timing.seconds
    for kind in ("target", "draft", "verify"):
        if not any(key[0] == kind for key in points):
            raise SelfSpecError(f"{source}: no {kind} times; measure them, or simulate on a calibration with --calibration")
    cells = {cell for by_cell in points.values() for cell in by_cell}
    batches, contexts = sorted({b for b, _ in cells}), sorted({s for _, s in cells})
    if len(batches) < 2 or len(contexts) < 2:
        raise SelfSpecError(f"{source}: needs at least two batches and two contexts to interpolate; use --calibration instead")
    gammas = sorted({gamma for kind, gamma in points if kind == "verify"})

    def grid(kind: str, *wanted: int) -> np.ndarray:
        """(batch, gamma, context), NaN where nothing was measured."""
        rows = [points.get((kind, gamma), {}) for gamma in wanted]
        return np.array([[[row.get((batch, context), np.nan) for context in contexts] for row in rows] for batch in batches])

    target = grid("target", 0)
    off = grid("target_sd", 0) if off_costs_target_sd and ("target_sd", 0) in points else target
    verify, draft, cycle = grid("verify", *gammas), grid("draft", *gammas), grid("cycle", *gammas)
    num_filled = int(sum(np.isnan(values).sum() for values in (target, verify, draft)))
    target, off, verify, draft = (_filled(values, batches, contexts, source) for values in (target, off, verify, draft))
    stretch = np.where(np.isnan(cycle), 1.0, cycle / (draft * np.array(gammas)[:, None] + verify))

    every_batch = np.arange(1, max_batch + 1)
    target, off, verify, draft = (_along_batch(values, batches, every_batch) for values in (target, off, verify * stretch, draft * stretch))
    drafting = np.arange(1, MAX_GAMMA + 1)
    continued = _along_gamma(verify, gammas, drafting)
    from_decode = _along_gamma(np.concatenate([off, verify[:, :1]], axis=1), [0, gammas[0]], np.minimum(drafting, gammas[0]))
    is_shorter = (drafting < gammas[0])[:, None]
    verify = np.concatenate([off, np.where(is_shorter, np.maximum(continued, from_decode), continued)], axis=1)
    draft = _along_gamma(draft, gammas, np.clip(drafting, gammas[0], gammas[-1])) * drafting[:, None]
    draft = np.concatenate([np.zeros_like(off), draft], axis=1)
    measured = ((batches[0], contexts[0], gammas[0]), (batches[-1], contexts[-1], gammas[-1]))
    return StepTimes(contexts, target[:, 0], verify, draft, measured, num_filled)


def _filled(values: np.ndarray, batches: Sequence[int], contexts: Sequence[int], source: str) -> np.ndarray:
    """Missing points of a (batch, gamma, context) array from their neighbours: along context first, then batch, then gamma."""
    values = values.copy()
    axes = ((2, np.array(contexts, float)), (0, np.array(batches, float)), (1, np.arange(values.shape[1], dtype=float)))
    for fewest in (2, 1):  # a line with one point alone is a last resort
        for axis, coordinates in axes:
            lines = np.moveaxis(values, axis, -1)
            for line in np.ndindex(lines.shape[:-1]):
                known = ~np.isnan(lines[line])
                if known.all() or known.sum() < fewest:
                    continue
                missing = coordinates[~known]
                lines[line][~known] = _interpolated(coordinates[known], lines[line][known][:, None], missing, log=False)[:, 0]
    if np.isnan(values).any():
        raise SelfSpecError(f"{source}: too few points to interpolate; use --calibration instead")
    return values


def _along_gamma(values: np.ndarray, gammas: Sequence[int], wanted: np.ndarray) -> np.ndarray:
    moved = np.moveaxis(values, 1, 0)
    return np.moveaxis(_interpolated(np.array(gammas, float), moved, wanted.astype(float), log=False), 0, 1)


def _along_batch(values: np.ndarray, batches: Sequence[int], wanted: np.ndarray) -> np.ndarray:
    return _interpolated(np.array(batches, float), values, wanted.astype(float), log=True)


def _interpolated(known: np.ndarray, values: np.ndarray, wanted: np.ndarray, *, log: bool) -> np.ndarray:
    """Piecewise linear along the first axis, in log(coordinate) inside if `log`; outside the last segment goes on in a straight line."""
    if len(known) == 1:
        return np.repeat(values, len(wanted), axis=0)
    index = np.clip(np.searchsorted(known, wanted, side="right") - 1, 0, len(known) - 2)
    low, high = known[index], known[index + 1]
    weight = (wanted - low) / (high - low)
    if log:
        inside = (low <= wanted) & (wanted <= high)
        weight = np.where(inside, np.log(np.maximum(wanted, low) / low) / np.log(high / low), weight)
    weight = weight.reshape(-1, *[1] * (values.ndim - 1))
    result = values[index] + weight * (values[index + 1] - values[index])
    return np.maximum(result, LOWEST_SHARE * values.min(axis=0))
