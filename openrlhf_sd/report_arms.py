"""Run folders into arms: runs with the same settings are replicates of one arm, and two arms are compared seed by seed."""

from __future__ import annotations

import json
from dataclasses import dataclass

from openrlhf_sd.report_differences import is_compared
from openrlhf_sd.run_records import RunRecords


@dataclass(frozen=True)
class Arm:
    """Replicates: runs that differ at most in their seed, their folders and their names."""

    label: str
    runs: tuple[RunRecords, ...]

    @property
    def mode(self) -> str:
        return self.runs[0].arm

    @property
    def config(self) -> dict:
        return self.runs[0].config

    @property
    def seeds(self) -> list:
        return [run.seed for run in self.runs]


@dataclass(frozen=True)
class Pairing:
    """Which runs of an arm are compared with which of the baseline.

    Attributes:
        pairs: (runs of the arm, runs of the baseline). One of each where seeds match; else all against all in one pair.
        by_seed: whether seeds match.
        num_left_out: runs of either arm whose seed the other lacks; 0 when not paired by seed.
    """

    pairs: list[tuple[tuple[RunRecords, ...], tuple[RunRecords, ...]]]
    by_seed: bool
    num_left_out: int


def group_arms(runs: list[RunRecords]) -> list[Arm]:
    """In the order of each arm's first run."""
    groups: dict[str, list[RunRecords]] = {}
    for run in runs:
        groups.setdefault(_settings_key(run), []).append(run)
    members = list(groups.values())
    return [Arm(label, tuple(group)) for label, group in zip(_labels([group[0] for group in members]), members)]


def _settings_key(run: RunRecords) -> str:
    """Equal for replicates: everything that can change what is generated or how fast, but for the seed."""
    flags = {flag: value for flag, value in run.config["openrlhf"].items() if is_compared(flag)}
    return json.dumps([run.arm, run.config["self_spec"], flags], sort_keys=True)


def _labels(runs: list[RunRecords]) -> list[str]:
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
    return [f"{label} ({run.run_dir})" if named.count(name) > 1 else name for label, name, run in zip(labels, named, runs)]


def pair_by_seed(arm: Arm, base: Arm) -> Pairing:
    """The k-th run of a seed goes with the baseline's k-th of that seed, in the order the folders were given."""
    waiting = list(base.runs)
    pairs = []
    for run in arm.runs:
        partner = next((other for other in waiting if other.seed == run.seed), None)
        if partner is not None:
            waiting.remove(partner)
            pairs.append(((run,), (partner,)))
    if not pairs:
        return Pairing([(arm.runs, base.runs)], by_seed=False, num_left_out=0)
    return Pairing(pairs, by_seed=True, num_left_out=len(arm.runs) - len(pairs) + len(waiting))
