"""A ratio between two arms, with its interval.

The interval is a 95% percentile bootstrap over steps, within each run. Steps of one run are not independent, and steps say
nothing about run-to-run luck: what each pair of runs gave is kept beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

NUM_RESAMPLES = 5000
RESAMPLES_PER_CHUNK = 250  # bounds memory for runs of many thousand steps
BOOTSTRAP_SEED = 0  # the same records always give the same page
MIN_STEPS_FOR_INTERVAL = 5  # a bootstrap over fewer steps understates the spread badly

Samples = tuple[Sequence[float], Sequence[float]]
"""One value per step: of a run (or of several pooled), and of the baseline it is compared with."""


@dataclass(frozen=True)
class Estimate:
    """A ratio or difference against the baseline. value None: missing; low, high None: too few steps, or runs.

    Attributes:
        n, n_baseline: steps, over all pairs of runs; of a reward difference runs.
        by_pair: what each pair of runs gave alone; the value is their mean (of ratios: the geometric mean).
    """

    value: float | None
    low: float | None
    high: float | None
    n: int
    n_baseline: int
    verdict: str
    by_pair: tuple[float, ...] = ()

    @property
    def is_claim(self) -> bool:
        """A value that a reader may take for a difference: its interval leaves out 1, or it has none."""
        return self.value is not None and (self.low is None or not self.low <= 1 <= self.high)


def missing(n: int, n_baseline: int) -> Estimate:
    return Estimate(None, None, None, n, n_baseline, "missing")


def ratio_of_medians(pairs: Sequence[Samples]) -> Estimate:
    """Median of the baseline's seconds over median of the run's: above 1 the run is faster."""

    def statistic(run: np.ndarray, base: np.ndarray) -> np.ndarray:
        return np.median(base, axis=1) / np.median(run, axis=1)

    return estimate_ratio(pairs, statistic)


def estimate_ratio(pairs: Sequence[tuple[Sequence, Sequence]], statistic: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> Estimate:
    """Geometric mean over pairs of `statistic(run (R, n, ...), baseline (R, m, ...)) -> (R,)`, a ratio with 1 for no difference;
    NaN where it cannot be formed. Pairs of which one side has no step are left out."""
    arrays = [(np.asarray(run), np.asarray(base)) for run, base in pairs if len(run) and len(base)]
    n, n_baseline = sum(len(run) for run, _ in arrays), sum(len(base) for _, base in arrays)
    if not arrays:
        return missing(sum(len(run) for run, _ in pairs), sum(len(base) for _, base in pairs))
    values = np.array([statistic(run[None], base[None]) for run, base in arrays])
    value = float(_geometric_mean(values)[0])
    if not np.isfinite(value):
        return missing(n, n_baseline)
    low = high = None
    if all(min(len(run), len(base)) >= MIN_STEPS_FOR_INTERVAL for run, base in arrays):
        low, high = _interval(arrays, statistic)
    counted = _counted(n, n_baseline, len(arrays))
    said = f"too few steps for an interval ({counted})" if low is None else verdict(low, high, 1.0, ("faster", "slower"), counted)
    return Estimate(value, low, high, n, n_baseline, said, tuple(float(v) for v in values[:, 0]))


def _geometric_mean(values: np.ndarray) -> np.ndarray:
    return np.exp(np.mean(np.log(values), axis=0))


def _interval(arrays, statistic) -> tuple[float | None, float | None]:
    """Each run's steps are resampled on their own."""
    random = np.random.default_rng(BOOTSTRAP_SEED)
    draws = []
    for _ in range(NUM_RESAMPLES // RESAMPLES_PER_CHUNK):
        chunk = []
        for run, base in arrays:
            picks = [values[random.integers(len(values), size=(RESAMPLES_PER_CHUNK, len(values)))] for values in (run, base)]
            chunk.append(statistic(*picks))
        draws.append(_geometric_mean(np.array(chunk)))
    resampled = np.concatenate(draws)
    # A resample of steps among which a statistic cannot be formed says nothing about its size.
    resampled = resampled[np.isfinite(resampled)]
    if not len(resampled):
        return None, None
    low, high = np.percentile(resampled, (2.5, 97.5))
    return float(low), float(high)


def _counted(n: int, n_baseline: int, num_pairs: int) -> str:
    steps = f"n = {n} steps each" if n == n_baseline else f"n = {n} and {n_baseline} steps"
    return steps if num_pairs == 1 else f"{steps}, {num_pairs} pairs of runs"


def verdict(low: float, high: float, neutral: float, words: tuple[str, str], counted: str) -> str:
    """What an interval says, with `words` for above and below `neutral`."""
    above, below = words
    if low > neutral:
        return f"{above} ({counted})"
    if high < neutral:
        return f"{below} ({counted})"
    return f"no difference detected at {counted}; one under about {(high - low) / 2:.3f} would not show here"
