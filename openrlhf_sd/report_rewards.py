"""Whether two arms earn different rewards. The steps of a training follow from each other, so they are no replicates of it: a run gives one
number, and an interval needs runs. (Over steps, 4 of the 10 pairs among five vanilla quickstarts of one seed came out as different.)
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from openrlhf_sd.report_bootstrap import Estimate, missing, verdict

MIN_RUNS = 3
"""For an interval: of two runs Student's t makes one too wide to be of use."""

CONFIDENCE = 0.95

ByRun = Sequence[Sequence[float]]
"""Rewards of the steps that count, per run."""


def reward_difference(pairs: Sequence[tuple[ByRun, ByRun]]) -> Estimate:
    """Mean of the arm minus mean of the baseline, with Student's t interval over pairs of runs, or Welch's over the runs of one pair
    that holds all of two arms without a seed in common.

    Args:
        pairs: (the arm's runs, the baseline's); a pair in which a run has no reward is left out.
    """
    means = [tuple(np.array([np.mean(run) for run in side]) for side in sides) for sides in pairs if all(map(len, (*sides[0], *sides[1])))]
    num_runs, num_base = (sum(len(sides[place]) for sides in means) for place in (0, 1))
    if not means:
        return missing(num_runs, num_base)
    by_pair = tuple(float(run.mean() - base.mean()) for run, base in means)
    value = float(np.mean(by_pair))
    half_width = _half_width(means, np.array(by_pair))
    low, high = (None, None) if half_width is None else (value - half_width, value + half_width)
    counted = f"{num_runs} and {num_base} runs" if len(means) == 1 else f"{len(means)} pairs of runs"
    if half_width is None:
        said = f"no interval from {counted}: trainings differ by chance too; {MIN_RUNS} runs of each give one"
    else:
        said = verdict(low, high, 0.0, ("higher", "lower"), counted)
    return Estimate(value, low, high, num_runs, num_base, said, by_pair)


def _half_width(means: list[tuple[np.ndarray, np.ndarray]], by_pair: np.ndarray) -> float | None:
    # Seconds to import, and most comparisons have too few runs.
    if len(means) >= MIN_RUNS:
        from scipy.stats import t

        return float(t.ppf((1 + CONFIDENCE) / 2, len(by_pair) - 1) * by_pair.std(ddof=1) / np.sqrt(len(by_pair)))
    if len(means) == 1 and min(map(len, means[0])) >= MIN_RUNS:
        from scipy.stats import ttest_ind

        interval = ttest_ind(*means[0], equal_var=False).confidence_interval(CONFIDENCE)
        return float(interval.high - interval.low) / 2
    return None
