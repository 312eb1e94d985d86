"""The length-controlled speed-up: two arms whose answers differ in length cannot be compared by wall time.

Two methods. Which one gave a number always stands beside it; where neither is possible the number is missing, with the reason.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from openrlhf_sd.report_arms import Pairing
from openrlhf_sd.report_bootstrap import Estimate, estimate_ratio, missing
from openrlhf_sd.run_records import RunRecords
from openrlhf_sd.run_rollouts import EngineRollout, RolloutTotals
from openrlhf_sd.step_ledger import Segment

NUM_BINS = 14  # batches up to 2^14 - 1 per engine
TOKENS, SECONDS, STEPS, BATCH_STEPS = range(4)
"""Columns of a table of sums by active batch, shape (NUM_BINS, 4); BATCH_STEPS is the sum of batch over steps."""

MIN_ROLLOUTS_FOR_WORK = 3  # two coefficients are fitted

STAGGERED_FLAGS = ("train.async_enable", "train.partial_rollout_enable")
"""With these the requests of a rollout do not start together."""

TIMELINE = "timelines"
LENGTHS = "response lengths"


Pairs = list[tuple[list[RolloutTotals], list[RolloutTotals]]]
"""Rollouts of an arm and of its baseline, for each pair of runs."""


@dataclass(frozen=True)
class BatchBin:
    """Seconds per token of both arms while `low_batch` to `high_batch` requests were active on an engine."""

    low_batch: int
    high_batch: int
    baseline_share: float  # of the baseline's tokens
    baseline_s_per_token: float | None
    s_per_token: float | None


@dataclass(frozen=True)
class LengthControlled:
    """method None: missing. `explanation` says how the number came about, or why there is none."""

    estimate: Estimate
    method: str | None
    explanation: str
    bins: tuple[BatchBin, ...] = ()


def length_controlled(pairing: Pairing, common_steps: Sequence[Sequence[int]]) -> LengthControlled:
    """By timelines where both arms have them, else by response lengths.

    Args:
        common_steps: for each pair of `pairing`, the global steps that all its runs logged and that count.
    """
    rollouts = []
    for (runs, bases), steps in zip(pairing.pairs, common_steps):
        recorded = [step for step in steps if all(step in run.rollouts for run in (*runs, *bases))]
        rollouts.append((_rollouts(runs, recorded), _rollouts(bases, recorded)))
    if any(any(map(_timed, run)) and any(map(_timed, base)) for run, base in rollouts):
        return _by_timeline(rollouts)
    lacking = [
        name
        for name, side in (("run", [run for run, _ in rollouts]), ("baseline", [base for _, base in rollouts]))
        if not any(_timed(totals) for of_run in side for totals in of_run)
    ]
    why = f"no timeline in the {' and the '.join(lacking) or 'partner of a run that has one'}"
    for run in (run for sides in pairing.pairs for side in sides for run in side):
        if flag := next((flag for flag in STAGGERED_FLAGS if run.config["openrlhf"].get(flag)), None):
            return LengthControlled(missing(0, 0), None, f"{why}, and with --{flag} {LENGTHS} do not tell the active batch")
    return _by_lengths(rollouts, why)


def _rollouts(runs: Iterable[RunRecords], steps: Sequence[int]) -> list[RolloutTotals]:
    return [run.rollouts[step] for run in runs for step in steps]


def _timed(totals: RolloutTotals) -> bool:
    return any(segment.seconds > 0 for segment in totals.segments)


def equal_batch_speedup(run: np.ndarray, base: np.ndarray) -> tuple[float, float]:
    """How much faster the run generates a token than the baseline does at the same active batch.

    1. Each segment of a timeline (consecutive engine steps with one gamma) goes into the bin [2^k, 2^(k+1)) of its active batch,
       the mean of the batches of its first and its last step. Left out are the ramp-up (what comes before the first segment in
       the highest bin of that engine's rollout: prompts are being computed there) and steps without a measured time.
    2. In each bin: seconds per token s = seconds / tokens, and the mean batch over steps.
    3. The run's s is taken at the baseline's mean batch of the bin: log-log interpolation between the run's own bins (beyond the
       outermost, that bin's value), because a bin is a factor of 2 wide and the arms sit at different places in it.
    4. Bins are weighted by the baseline's tokens w: speed-up = sum(w * s_baseline) / sum(w * s_run). A bin that either arm lacks
       is left out; the share of the baseline's tokens that remains is given back.

    Args:
        run, base: sums, shape (NUM_BINS, 4), columns TOKENS, SECONDS, STEPS, BATCH_STEPS.

    Returns:
        (speed-up, above 1 the run is faster; share of the baseline's binned tokens it rests on). NaN and 0 without a common bin.
    """
    in_run, in_base = run[:, TOKENS] > 0, base[:, TOKENS] > 0
    both = in_run & in_base
    if not both.any():
        return math.nan, 0.0
    weights = base[both, TOKENS]
    base_s = base[both, SECONDS] / weights
    base_batch = base[both, BATCH_STEPS] / base[both, STEPS]
    run_batch = run[in_run, BATCH_STEPS] / run[in_run, STEPS]
    run_s_at_own = run[in_run, SECONDS] / run[in_run, TOKENS]
    run_s = np.exp(np.interp(np.log(base_batch), np.log(run_batch), np.log(run_s_at_own)))
    return float(weights @ base_s / (weights @ run_s)), float(weights.sum() / base[:, TOKENS].sum())


def sums_by_batch(timelines: Iterable[Sequence[Segment]]) -> np.ndarray:
    """Step 1 of `equal_batch_speedup`, for one rollout's engines: shape (NUM_BINS, 4)."""
    sums = np.zeros((NUM_BINS, 4))
    for timeline in timelines:
        bins = [_bin(segment) for segment in timeline]
        highest = max((k for k in bins if k is not None), default=None)
        after_ramp_up = False
        for segment, k in zip(timeline, bins):
            after_ramp_up = after_ramp_up or (k is not None and k == highest)
            if after_ramp_up and k is not None and segment.seconds > 0:
                batch = _active_batch(segment)
                sums[k] += segment.num_tokens, segment.seconds, segment.num_steps, batch * segment.num_steps
    return sums


def _active_batch(segment: Segment) -> float:
    return (segment.first_batch + segment.last_batch) / 2


def _bin(segment: Segment) -> int | None:
    """None: only prompts were computed."""
    batch = _active_batch(segment)
    return min(int(math.log2(batch)), NUM_BINS - 1) if batch >= 1 else None


def _by_timeline(rollouts: Pairs) -> LengthControlled:
    tables = [(_tables(run), _tables(base)) for run, base in rollouts]
    tables = [(run, base) for run, base in tables if len(run) and len(base)]
    run_sum, base_sum = (np.sum([side.sum(axis=0) for side in sides], axis=0) for sides in zip(*tables))

    def statistic(run: np.ndarray, base: np.ndarray) -> np.ndarray:
        return np.array([equal_batch_speedup(*sums)[0] for sums in zip(run.sum(axis=1), base.sum(axis=1))])

    estimate = estimate_ratio(tables, statistic)
    if estimate.value is None:
        return LengthControlled(estimate, None, f"the {TIMELINE} of the two arms have no active batch in common")
    _, binned_share = equal_batch_speedup(run_sum, base_sum)
    num_tokens = sum(segment.num_tokens for _, side in rollouts for totals in side for segment in totals.segments)
    share = binned_share * base_sum[:, TOKENS].sum() / num_tokens
    explanation = f"from {TIMELINE}, at equal active batch; covers {100 * share:.0f}% of the baseline's tokens"
    return LengthControlled(estimate, TIMELINE, explanation, _bins(run_sum, base_sum, num_tokens))


def _tables(side: list[RolloutTotals]) -> np.ndarray:
    """Shape (rollouts with a timeline, NUM_BINS, 4)."""
    tables = [sums_by_batch([e.timeline for e in totals.engines if e.timeline]) for totals in side if _timed(totals)]
    return np.array(tables).reshape(-1, NUM_BINS, 4)


def _bins(run: np.ndarray, base: np.ndarray, num_tokens: int) -> tuple[BatchBin, ...]:
    def s_per_token(sums: np.ndarray) -> float | None:
        return float(sums[SECONDS] / sums[TOKENS]) if sums[TOKENS] else None

    return tuple(
        BatchBin(2**k, 2 ** (k + 1) - 1, float(base[k, TOKENS] / num_tokens), s_per_token(base[k]), s_per_token(run[k]))
        for k in range(NUM_BINS)
        if run[k, TOKENS] or base[k, TOKENS]
    )


def equal_work_speedup(run: np.ndarray, base: np.ndarray) -> float:
    """How much faster the run does the work that its response lengths are, in the baseline's own seconds.

    If the requests of an engine all start together, plain decoding takes as many steps as the longest response has tokens, and the
    active batch of step t is the number of responses longer than t: the sum of the batches is the sum of the lengths. With a plain
    step of a + b * batch seconds a rollout takes W = a * longest + b * tokens. a and b (not negative) are fitted by least squares
    to the baseline's rollouts; speed-up = (W_run / seconds_run) / (W_baseline / seconds_baseline). Where the lengths are the
    same this is the ratio of the seconds. It assumes further that context length, prompts and queueing cost nothing, and it rests
    on every rollout as a whole: unlike `equal_batch_speedup` it cannot say at which batch the time was won.

    Args:
        run, base: one row per rollout, shape (n, 3): longest response, tokens, seconds; each summed over engines.
    """
    from scipy.optimize import nnls

    coefficients, _ = nnls(base[:, :2], base[:, 2])
    run_work, base_work = (float((rows[:, :2] @ coefficients).sum()) for rows in (run, base))
    return run_work / run[:, 2].sum() * base[:, 2].sum() / base_work if base_work else math.nan


def _by_lengths(rollouts: Pairs, why: str) -> LengthControlled:
    tables = [tuple(_work_rows(side) for side in sides) for sides in rollouts]
    enough = [(run, base) for run, base in tables if len(run) and len(base) >= MIN_ROLLOUTS_FOR_WORK]
    if not enough:
        counts = (sum(len(side) for side in sides) for sides in zip(*tables))
        reason = f"{why}, and too few rollouts with {LENGTHS} and engine seconds to model them"
        return LengthControlled(missing(*counts), None, reason)

    def statistic(run: np.ndarray, base: np.ndarray) -> np.ndarray:
        return np.array([equal_work_speedup(*rows) for rows in zip(run, base)])

    estimate = estimate_ratio(enough, statistic)
    return LengthControlled(estimate, None if estimate.value is None else LENGTHS, f"modelled from {LENGTHS} ({why})")


def _work_rows(side: list[RolloutTotals]) -> np.ndarray:
    """One row per rollout, shape (n, 3). Work is linear in both of its terms, so engines add up."""
    rows = [[_work(engine) for engine in totals.engines] for totals in side]
    return np.array([np.sum(engines, axis=0) for engines in rows if None not in engines]).reshape(-1, 3)


def _work(engine: EngineRollout) -> tuple[int, int, float] | None:
    if not engine.response_lengths or not engine.rollout_s:
        return None
    return max(engine.response_lengths), sum(engine.response_lengths), engine.rollout_s
