"""What a comparison of runs says: per-run summaries, and each run against the baseline with intervals. No output.

Ratios are medians over steps, baseline over run, so above 1 is faster. Intervals are 95% percentile bootstrap over
steps. Steps of one run are not independent, and one run per arm says nothing about run-to-run luck: the page says so.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import fmean

import numpy as np

from openrlhf_sd.config import SelfSpecError
from openrlhf_sd.report_differences import differences
from openrlhf_sd.run_records import (
    BROADCAST_S,
    RESPONSE_LENGTH,
    REWARD,
    ROLLOUT_S,
    TRUNCATED_RATE,
    VLLM_KL,
    RunRecords,
    weighted_mean,
)

NUM_RESAMPLES = 5000
RESAMPLES_PER_CHUNK = 250  # bounds memory for runs of many thousand steps
BOOTSTRAP_SEED = 0  # the same records always give the same page
MIN_STEPS_FOR_INTERVAL = 5  # a bootstrap over fewer steps understates the spread badly


@dataclass(frozen=True)
class Spread:
    """Total, median and quartiles of one quantity over `n` steps."""

    n: int
    total: float
    median: float
    p25: float
    p75: float


@dataclass(frozen=True)
class Progress:
    """How a per-step mean moved: first and last step, and means over the first and last quarter of the steps."""

    n: int
    first: float
    last: float
    first_quarter: float
    last_quarter: float


@dataclass(frozen=True)
class ArmSummary:
    """One run. Times and throughput leave out the warm-up steps, all else uses every step. None is missing."""

    label: str
    arm: str
    run_dir: str
    notes: list[str]
    num_steps: int
    warmup_rollout_s: list[float]
    rollout_s: Spread | None
    step_s: Spread | None
    broadcast_s: Spread | None
    weight_sync_s: Spread | None
    requantize_s: Spread | None
    s_per_token: Spread | None
    tokens_per_s: float | None
    acceptance_rate: float | None
    mean_acceptance_length: float | None
    acceptance_rate_by_pos: list[float | None]
    gamma: Spread | None
    vllm_kl: Spread | None
    reward: Progress | None
    response_length: Progress | None
    truncated_rate: Spread | None


@dataclass(frozen=True)
class Estimate:
    """A ratio or difference against the baseline. value None: missing; low, high None: too few steps."""

    value: float | None
    low: float | None
    high: float | None
    n: int
    n_baseline: int
    verdict: str


@dataclass(frozen=True)
class Versus:
    """One run against the baseline, over the steps both logged."""

    label: str
    rollout_speedup: Estimate
    per_token_speedup: Estimate
    step_speedup: Estimate
    reward_difference: Estimate  # run minus baseline, mean of the last half of the common steps


@dataclass(frozen=True)
class Comparison:
    arms: list[ArmSummary]
    baseline: str | None  # label
    versus: list[Versus]
    num_warmup_steps: int
    warnings: list[str]


def compare(runs: list[RunRecords], baseline: int | None, num_warmup_steps: int) -> Comparison:
    """Summarise `runs` and compare each with `runs[baseline]` (no comparison when None).

    Raises:
        SelfSpecError: a run has no step left after the warm-up.
    """
    labels = arm_labels(runs)
    arms = [summarize(run, label, num_warmup_steps) for run, label in zip(runs, labels)]
    versus, warnings = [], []
    if baseline is None and len(runs) > 1:
        warnings.append("No vanilla run among these folders: no speed-ups. Name one with --baseline.")
    if baseline is not None:
        for index, run in enumerate(runs):
            if index != baseline:
                versus.append(versus_baseline(run, runs[baseline], labels[index], num_warmup_steps))
                warnings += differences(run, runs[baseline], labels[index], labels[baseline])
    return Comparison(arms, None if baseline is None else labels[baseline], versus, num_warmup_steps, warnings)


def arm_labels(runs: list[RunRecords]) -> list[str]:
    """`vanilla`, `fixed γ=3 w4`, `adaptive w4`; with the folder's name, or its path, where two would read the same."""
    labels = []
    for run in runs:
        parts, self_spec = [run.arm], run.config["self_spec"] or {}
        if run.arm in ("fixed", "toggle"):
            parts.append(f"γ={self_spec.get('gamma')}")
        if run.arm != "vanilla" and self_spec.get("quant"):
            parts.append(str(self_spec["quant"]))
        labels.append(" ".join(parts))
    named = [f"{label} ({run.run_dir.name})" if labels.count(label) > 1 else label for label, run in zip(labels, runs)]
    return [
        f"{label} ({run.run_dir})" if named.count(name) > 1 else name for label, name, run in zip(labels, named, runs)
    ]


def timed_steps(run: RunRecords, num_warmup_steps: int) -> list[int]:
    """Global steps whose times count: all the run logged, after its first `num_warmup_steps`."""
    return sorted(set(run.scalar(ROLLOUT_S)) | set(run.rollouts))[num_warmup_steps:]


def s_per_token(run: RunRecords) -> dict[int, float]:
    """Trainer-clock rollout seconds per generated token, by global step."""
    rollout_s = run.scalar(ROLLOUT_S)
    return {
        step: rollout_s[step] / totals.num_output_tokens
        for step, totals in run.rollouts.items()
        if step in rollout_s and totals.num_output_tokens
    }


def summarize(run: RunRecords, label: str, num_warmup_steps: int) -> ArmSummary:
    steps = timed_steps(run, num_warmup_steps)
    if not steps:
        raise SelfSpecError(
            f"{run.run_dir}: no step left after {num_warmup_steps} warm-up step(s); "
            "let it run longer or lower --warmup-steps"
        )
    rollout_s, per_token, totals = run.scalar(ROLLOUT_S), s_per_token(run), list(run.rollouts.values())
    timed_rollouts = {step: run.rollouts[step] for step in steps if step in run.rollouts}
    token_steps = [step for step in steps if step in per_token]
    seconds = sum(rollout_s[step] for step in token_steps)
    num_drafts = sum(t.num_drafts or 0 for t in totals)
    num_draft_tokens = sum(t.num_draft_tokens or 0 for t in totals)
    num_accepted_tokens = sum(t.num_accepted_tokens or 0 for t in totals)
    num_positions = max((len(t.acceptance_rate_by_pos) for t in totals), default=0)
    return ArmSummary(
        label=label,
        arm=run.arm,
        run_dir=str(run.run_dir),
        notes=run.notes,
        num_steps=len(steps) + num_warmup_steps,
        warmup_rollout_s=[value for step, value in rollout_s.items() if step < steps[0]],
        rollout_s=spread_at(rollout_s, steps),
        step_s=spread_at(run.step_s(), steps),
        broadcast_s=spread_at(run.scalar(BROADCAST_S), steps),
        weight_sync_s=spread([t.weight_sync_s for t in timed_rollouts.values()]),
        requantize_s=spread([t.requantize_s for t in timed_rollouts.values()]),
        s_per_token=spread_at(per_token, steps),
        tokens_per_s=sum(run.rollouts[s].num_output_tokens for s in token_steps) / seconds if seconds else None,
        acceptance_rate=num_accepted_tokens / num_draft_tokens if num_draft_tokens else None,
        mean_acceptance_length=1 + num_accepted_tokens / num_drafts if num_drafts else None,
        acceptance_rate_by_pos=[
            weighted_mean([(_at(t.acceptance_rate_by_pos, i), _at(t.num_drafts_by_pos, i)) for t in totals])
            for i in range(num_positions)
        ],
        gamma=spread([t.gamma for t in totals]),
        vllm_kl=spread(list(run.scalar(VLLM_KL).values())),
        reward=progress(run.scalar(REWARD)),
        response_length=progress(run.scalar(RESPONSE_LENGTH)),
        truncated_rate=spread(list(run.scalar(TRUNCATED_RATE).values())),
    )


def _at(values: tuple, index: int):
    return values[index] if index < len(values) else None


def spread(values: list[float | None]) -> Spread | None:
    """Over the measured values; None when there is none."""
    measured = [value for value in values if value is not None]
    if not measured:
        return None
    p25, median, p75 = (float(q) for q in np.percentile(measured, (25, 50, 75)))
    return Spread(len(measured), float(sum(measured)), median, p25, p75)


def spread_at(by_step: dict[int, float], steps: list[int]) -> Spread | None:
    return spread([by_step.get(step) for step in steps])


def progress(by_step: dict[int, float]) -> Progress | None:
    values = list(by_step.values())
    if not values:
        return None
    quarter = max(1, len(values) // 4)
    return Progress(len(values), values[0], values[-1], fmean(values[:quarter]), fmean(values[-quarter:]))


def versus_baseline(run: RunRecords, base: RunRecords, label: str, num_warmup_steps: int) -> Versus:
    """Only steps both runs logged count: answers change length with training, so a longer run is a different mix."""
    common = [step for step in timed_steps(run, num_warmup_steps) if step in set(timed_steps(base, num_warmup_steps))]

    def speedup(run_by_step: dict[int, float], base_by_step: dict[int, float]) -> Estimate:
        return ratio_of_medians(
            [run_by_step[s] for s in common if s in run_by_step], [base_by_step[s] for s in common if s in base_by_step]
        )

    reward, base_reward = run.scalar(REWARD), base.scalar(REWARD)
    graded = [step for step in reward if step in base_reward]
    last_half = graded[len(graded) // 2 :]
    return Versus(
        label=label,
        rollout_speedup=speedup(run.scalar(ROLLOUT_S), base.scalar(ROLLOUT_S)),
        per_token_speedup=speedup(s_per_token(run), s_per_token(base)),
        step_speedup=speedup(run.step_s(), base.step_s()),
        reward_difference=difference_of_means([reward[s] for s in last_half], [base_reward[s] for s in last_half]),
    )


def ratio_of_medians(run_s: list[float], baseline_s: list[float]) -> Estimate:
    """Median of the baseline over median of the run: above 1 the run is faster."""
    n, n_baseline = len(run_s), len(baseline_s)
    if not n or not n_baseline:
        return Estimate(None, None, None, n, n_baseline, "missing")
    value = float(np.median(baseline_s) / np.median(run_s))
    low, high = _interval(run_s, baseline_s, lambda run, base: np.median(base, axis=1) / np.median(run, axis=1))
    return Estimate(value, low, high, n, n_baseline, _verdict(low, high, 1.0, "faster", "slower", n, n_baseline))


def difference_of_means(run: list[float], baseline: list[float]) -> Estimate:
    """Mean of the run minus mean of the baseline."""
    n, n_baseline = len(run), len(baseline)
    if not n or not n_baseline:
        return Estimate(None, None, None, n, n_baseline, "missing")
    value = fmean(run) - fmean(baseline)
    low, high = _interval(run, baseline, lambda run, base: run.mean(axis=1) - base.mean(axis=1))
    return Estimate(value, low, high, n, n_baseline, _verdict(low, high, 0.0, "higher", "lower", n, n_baseline))


def _interval(run: list[float], baseline: list[float], statistic) -> tuple[float | None, float | None]:
    """95% percentile bootstrap of `statistic(run (R, n), baseline (R, m)) -> (R,)`, each arm resampled on its own."""
    if min(len(run), len(baseline)) < MIN_STEPS_FOR_INTERVAL:
        return None, None
    random = np.random.default_rng(BOOTSTRAP_SEED)
    draws = []
    for _ in range(NUM_RESAMPLES // RESAMPLES_PER_CHUNK):
        picks = [random.choice(np.asarray(values), (RESAMPLES_PER_CHUNK, len(values))) for values in (run, baseline)]
        draws.append(statistic(*picks))
    low, high = np.percentile(np.concatenate(draws), (2.5, 97.5))
    return float(low), float(high)


def _verdict(low: float | None, high: float | None, neutral: float, above: str, below: str, n: int, m: int) -> str:
    steps = f"n = {n} steps each" if n == m else f"n = {n} and {m} steps"
    if low is None:
        return f"too few steps for an interval ({steps})"
    if low > neutral:
        return f"{above} ({steps})"
    if high < neutral:
        return f"{below} ({steps})"
    return f"no difference detected at {steps}"
