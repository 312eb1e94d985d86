"""One arm in numbers: what its runs took, drafted and learned."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import fmean
from typing import Any

import numpy as np

from openrlhf_sd.config import SelfSpecError
from openrlhf_sd.policy.observation import acceptance_rate, mean_acceptance_length
from openrlhf_sd.report_arms import Arm
from openrlhf_sd.run_records import (
    BROADCAST_S,
    RESPONSE_LENGTH,
    REWARD,
    ROLLOUT_S,
    TRUNCATED_RATE,
    VLLM_KL,
    RunRecords,
)
from openrlhf_sd.run_rollouts import EngineRollout, RolloutTotals, weighted_mean
from openrlhf_sd.step_ledger import Segment


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
    """One arm, its runs pooled. Times and throughput leave out the warm-up steps, all else uses every step. None is missing.

    Lists named `..._by_run` hold one entry per run.
    """

    label: str
    arm: str
    run_dirs: list[str]
    seeds: list[Any]
    notes: list[str]
    num_steps_by_run: list[int]
    warmup_rollout_s: list[float]
    rollout_s: Spread | None
    median_rollout_s_by_run: list[float | None]
    step_s: Spread | None
    median_step_s_by_run: list[float | None]
    broadcast_s: Spread | None
    weight_sync_s: Spread | None
    requantize_s: Spread | None
    s_per_token: Spread | None
    tokens_per_s: float | None
    num_drafts: int | None
    acceptance_rate: float | None
    mean_acceptance_length: float | None
    acceptance_rate_by_pos: list[float | None]
    gamma: Spread | None
    speculated_share_of_steps: float | None
    speculated_share_of_tokens: float | None
    toggle_step: Spread | None
    toggle_batch: Spread | None
    predicted_speedup: Spread | None
    measured_speedup: Spread | None
    vllm_kl: Spread | None
    reward: Progress | None
    response_length: Progress | None
    truncated_rate: Spread | None


def timed_steps(run: RunRecords, num_warmup_steps: int) -> list[int]:
    """Global steps whose times count: all the run logged, after its first `num_warmup_steps`."""
    return sorted(set(run.scalar(ROLLOUT_S)) | set(run.rollouts))[num_warmup_steps:]


def s_per_token(run: RunRecords) -> dict[int, float]:
    """Trainer-clock rollout seconds per generated token, by global step. Empty for asynchronous training: there a row holds what was
    generated between two weight broadcasts, which may be two batches or none, and the trainer's clock has one time for each batch."""
    if run.config["openrlhf"].get("train.async_enable"):
        return {}
    rollout_s = run.scalar(ROLLOUT_S)
    return {
        step: rollout_s[step] / totals.num_output_tokens
        for step, totals in run.rollouts.items()
        if step in rollout_s and totals.num_output_tokens
    }


def summarize(arm: Arm, num_warmup_steps: int) -> ArmSummary:
    """Raises SelfSpecError when a run with records has no step left after the warm-up."""
    for run in arm.runs:
        if run.has_records and not timed_steps(run, num_warmup_steps):
            raise SelfSpecError(
                f"{run.run_dir}: no step left after {num_warmup_steps} warm-up step(s); let it run longer or lower --warmup-steps"
            )

    def timed(by_step_of_run: list[dict[int, Any]]) -> list[list[Any]]:
        """Values at the steps that count, one list per run."""
        steps = [timed_steps(run, num_warmup_steps) for run in arm.runs]
        return [[by_step[step] for step in of_run if step in by_step] for by_step, of_run in zip(by_step_of_run, steps)]

    def scalar(tag: str) -> list[dict[int, float]]:
        return [run.scalar(tag) for run in arm.runs]

    rollout_s, step_s = timed(scalar(ROLLOUT_S)), timed([run.step_s() for run in arm.runs])
    timed_rollouts = _flat(timed([run.rollouts for run in arm.runs]))
    token_times = timed([_tokens_and_seconds(run) for run in arm.runs])
    seconds = sum(s for _, s in _flat(token_times))
    totals = [t for run in arm.runs for t in run.rollouts.values()]
    engines = [engine for t in totals for engine in t.engines]
    return ArmSummary(
        label=arm.label,
        arm=arm.mode,
        run_dirs=[str(run.run_dir) for run in arm.runs],
        seeds=arm.seeds,
        notes=[note if len(arm.runs) == 1 else f"{run.run_dir.name}: {note}" for run in arm.runs for note in run.notes],
        num_steps_by_run=[len(timed_steps(run, 0)) for run in arm.runs],
        warmup_rollout_s=[
            value for run in arm.runs for step, value in run.scalar(ROLLOUT_S).items() if step in timed_steps(run, 0)[:num_warmup_steps]
        ],
        rollout_s=spread(_flat(rollout_s)),
        median_rollout_s_by_run=[_median(values) for values in rollout_s],
        step_s=spread(_flat(step_s)),
        median_step_s_by_run=[_median(values) for values in step_s],
        broadcast_s=spread(_flat(timed(scalar(BROADCAST_S)))),
        weight_sync_s=spread([t.weight_sync_s for t in timed_rollouts]),
        requantize_s=spread([t.requantize_s for t in timed_rollouts]),
        s_per_token=spread(_flat(timed([s_per_token(run) for run in arm.runs]))),
        tokens_per_s=sum(tokens for tokens, _ in _flat(token_times)) / seconds if seconds else None,
        gamma=spread([t.gamma for t in totals]),
        vllm_kl=spread([value for series in scalar(VLLM_KL) for value in series.values()]),
        reward=progress(mean_by_step(scalar(REWARD))),
        response_length=progress(mean_by_step(scalar(RESPONSE_LENGTH))),
        truncated_rate=spread([value for series in scalar(TRUNCATED_RATE) for value in series.values()]),
        **_acceptance(totals),
        **_speculation(engines, [segment for t in totals for segment in t.segments]),
    )


def _acceptance(totals: list[RolloutTotals]) -> dict[str, Any]:
    measured_drafts = [t.num_drafts for t in totals if t.num_drafts is not None]
    num_drafts = sum(measured_drafts)
    num_draft_tokens = sum(t.num_draft_tokens or 0 for t in totals)
    num_accepted_tokens = sum(t.num_accepted_tokens or 0 for t in totals)
    num_positions = max((len(t.acceptance_rate_by_pos) for t in totals), default=0)
    return {
        "num_drafts": num_drafts if measured_drafts else None,
        "acceptance_rate": acceptance_rate(num_accepted_tokens, num_draft_tokens),
        "mean_acceptance_length": mean_acceptance_length(num_accepted_tokens, num_drafts),
        "acceptance_rate_by_pos": [
            weighted_mean([(_at(t.acceptance_rate_by_pos, i), _at(t.num_drafts_by_pos, i)) for t in totals]) for i in range(num_positions)
        ],
    }


def _speculation(engines: list[EngineRollout], segments: list[Segment]) -> dict[str, Any]:
    return {
        "speculated_share_of_steps": speculated_share(segments, "num_steps"),
        "speculated_share_of_tokens": speculated_share(segments, "num_tokens"),
        "toggle_step": spread([engine.toggle_step for engine in engines]),
        "toggle_batch": spread([engine.toggle_batch for engine in engines]),
        "predicted_speedup": spread([engine.predicted_speedup for engine in engines]),
        "measured_speedup": spread([engine.measured_speedup for engine in engines]),
    }


def speculated_share(segments: list[Segment], quantity: str) -> float | None:
    """Of `quantity` (num_steps, num_tokens, seconds), the share in steps that drafted; None without any."""
    total = sum(getattr(segment, quantity) for segment in segments)
    return sum(getattr(segment, quantity) for segment in segments if segment.gamma) / total if total else None


def _tokens_and_seconds(run: RunRecords) -> dict[int, tuple[int, float]]:
    return {step: (run.rollouts[step].num_output_tokens, run.scalar(ROLLOUT_S)[step]) for step in s_per_token(run)}


def _flat(values_by_run: list[list[Any]]) -> list[Any]:
    return [value for values in values_by_run for value in values]


def _at(values: tuple, index: int):
    return values[index] if index < len(values) else None


def _median(values: list[float]) -> float | None:
    return float(np.median(values)) if values else None


def spread(values: list[float | None]) -> Spread | None:
    """Over the measured values; None when there is none."""
    measured = [value for value in values if value is not None]
    if not measured:
        return None
    p25, median, p75 = (float(q) for q in np.percentile(measured, (25, 50, 75)))
    return Spread(len(measured), float(sum(measured)), median, p25, p75)


def mean_by_step(series: list[dict[int, float]]) -> dict[int, float]:
    """Mean over the runs that logged the step."""
    steps = sorted({step for by_step in series for step in by_step})
    return {step: fmean(by_step[step] for by_step in series if step in by_step) for step in steps}


def progress(by_step: dict[int, float]) -> Progress | None:
    values = list(by_step.values())
    if not values:
        return None
    quarter = max(1, len(values) // 4)
    return Progress(len(values), values[0], values[-1], fmean(values[:quarter]), fmean(values[-quarter:]))
