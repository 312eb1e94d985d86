"""metrics.jsonl read back: one `RolloutTotals` per training rollout, pooled over its engines, with each engine's own record."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from openrlhf_sd.config import SelfSpecError
from openrlhf_sd.metrics import METRICS_FILE, NUM_DRAFTS_KEY, POSITION_KEY, read_rows
from openrlhf_sd.policy.observation import acceptance_rate, mean_acceptance_length
from openrlhf_sd.step_ledger import TIMELINE_COLUMNS, Segment

_NUMBERS = (
    "time",
    "timing/rollout_s",
    "timing/weight_sync_s",
    "timing/requantize_s",
    "num_output_tokens",
    "rollout/sd/gamma",
    "rollout/sd/num_drafts",
    "rollout/sd/num_draft_tokens",
    "rollout/sd/num_accepted_tokens",
    "rollout/sd/toggle_step",
    "rollout/sd/toggle_batch",
    "rollout/sd/predicted_speedup",
    "rollout/sd/measured_speedup",
)
"""The columns of metrics.jsonl that are computed with, besides the per-position ones."""

_AUDIT_NUMBERS = ("num_tokens", "mean_abs_diff", "max_abs_diff")


@dataclass(frozen=True)
class EngineRollout:
    """One engine's part of a rollout, by its own clock. None is not measured.

    Attributes:
        timeline: consecutive steps with one gamma, in order; see step_ledger.py.
        response_lengths: output tokens per request, in the order they ended.
        toggle_step, toggle_batch: the first step that drafted, and how many requests decoded in it.
        predicted_speedup, measured_speedup: of the speculating steps over plain decoding of the same tokens.
    """

    engine: int
    time_unix_s: float | None
    rollout_s: float | None
    num_output_tokens: int | None
    timeline: tuple[Segment, ...] | None
    response_lengths: tuple[int, ...] | None
    toggle_step: int | None
    toggle_batch: int | None
    predicted_speedup: float | None
    measured_speedup: float | None


@dataclass(frozen=True)
class RolloutTotals:
    """One rollout, pooled over its engines. None is not measured.

    Engines work side by side: tokens and counts add up, seconds are those of the slowest engine.
    """

    engines: tuple[EngineRollout, ...]
    rollout_s: float | None
    num_output_tokens: int | None
    weight_sync_s: float | None
    requantize_s: float | None
    gamma: float | None  # mean over engines: each may sit on its own rung
    num_drafts: int | None
    num_draft_tokens: int | None
    num_accepted_tokens: int | None
    acceptance_rate_by_pos: tuple[float | None, ...]
    num_drafts_by_pos: tuple[int, ...]  # drafts that long: the weights of those rates

    @property
    def acceptance_rate(self) -> float | None:
        return acceptance_rate(self.num_accepted_tokens, self.num_draft_tokens)

    @property
    def mean_acceptance_length(self) -> float | None:
        return mean_acceptance_length(self.num_accepted_tokens, self.num_drafts)

    @property
    def segments(self) -> list[Segment]:
        """Of all engines, one engine after the other."""
        return [segment for engine in self.engines for segment in engine.timeline or ()]


def read_rollouts(path: Path, notes: list[str]) -> dict[int, RolloutTotals]:
    """Global step -> the rollout that fed it. Of a (rollout, engine) written twice, as after a resume, the later row counts.

    Args:
        notes: gets one sentence for whatever is incomplete, and for what a reader should know of the drafter and the audits.

    Raises:
        SelfSpecError: a row that no run of ours writes.
    """
    if not path.is_file():
        notes.append(f"{METRICS_FILE} is missing: no token counts, no acceptance")
        return {}
    rows, num_unreadable = read_rows(path)
    if num_unreadable:
        notes.append(f"{METRICS_FILE}: {num_unreadable} unreadable line(s) left out")
    by_rollout: dict[int, dict[int, dict[str, Any]]] = {}
    for row in rows:
        rollout, engine = row.get("rollout"), row.get("engine")
        if type(rollout) is not int or type(engine) is not int:
            raise SelfSpecError(f"{path}: a row has no integer 'rollout' and 'engine'; remove that row")
        _check_row(row, f"{path}: ", rollout)
        by_rollout.setdefault(rollout, {})[engine] = row
    num_repeated = len(rows) - sum(len(engines) for engines in by_rollout.values())
    if num_repeated:
        notes.append(f"{METRICS_FILE}: {num_repeated} row(s) replaced by a later row of the same rollout and engine")
    counted = [by_rollout[rollout][engine] for rollout in sorted(by_rollout) for engine in sorted(by_rollout[rollout])]
    notes += [*_collapse_notes(counted), *_audit_notes(counted)]
    return {rollout + 1: _pool_engines(list(by_rollout[rollout].values())) for rollout in sorted(by_rollout)}


def _collapse_notes(rows: list[dict[str, Any]]) -> list[str]:
    collapsed = [row for row in rows if row.get("rollout/sd/collapse")]
    if not collapsed:
        return []
    last = collapsed[-1]
    return [
        f"speculation went off in {len(collapsed)} of {len(rows)} rollouts because drafts were hardly accepted; the last time in rollout "
        f"{last['rollout']} of engine {last['engine']}: {last['rollout/sd/collapse']}"
    ]


def _audit_notes(rows: list[dict[str, Any]]) -> list[str]:
    audits = [row["audit"] for row in rows if row.get("audit") and row["audit"]["num_tokens"]]
    if not audits:
        return []
    num_tokens = sum(audit["num_tokens"] for audit in audits)
    mean = sum(audit["mean_abs_diff"] * audit["num_tokens"] for audit in audits) / num_tokens
    return [
        f"audit: {num_tokens} sampled tokens of {len(audits)} rollouts scored again without speculation: mean |logprob difference| "
        f"{mean:.4f}, at most {max(audit['max_abs_diff'] for audit in audits):.3f}"
    ]


def _check_row(row: dict[str, Any], where: str, rollout: int) -> None:
    for key, value in row.items():
        if (key in _NUMBERS or key.startswith((POSITION_KEY, NUM_DRAFTS_KEY))) and not (value is None or _is_number(value)):
            raise SelfSpecError(f"{where}{key!r} of rollout {rollout} is no number; remove that row")
    lengths, timeline = row.get("response_lengths"), row.get("timeline")
    if lengths is not None and not (isinstance(lengths, list) and all(type(value) is int for value in lengths)):
        raise SelfSpecError(f"{where}'response_lengths' of rollout {rollout} is no list of whole numbers; remove that row")
    if not isinstance(row.get("rollout/sd/collapse"), (str, type(None))):
        raise SelfSpecError(f"{where}'rollout/sd/collapse' of rollout {rollout} is no text; remove that row")
    audit = row.get("audit")
    if audit is not None and not (isinstance(audit, dict) and all(_is_number(audit.get(key)) for key in _AUDIT_NUMBERS)):
        raise SelfSpecError(f"{where}'audit' of rollout {rollout} is no object of {', '.join(_AUDIT_NUMBERS)}; remove that row")
    if timeline is not None and not (isinstance(timeline, list) and all(map(_is_segment, timeline))):
        columns = ", ".join(TIMELINE_COLUMNS)
        raise SelfSpecError(f"{where}'timeline' of rollout {rollout} is no list of [{columns}]; remove that row")


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and -math.inf < value < math.inf  # JSON's 1e999 is an infinity


def _is_segment(value: Any) -> bool:
    return isinstance(value, list) and len(value) == len(TIMELINE_COLUMNS) and all(_is_number(v) and v >= 0 for v in value)


def _pool_engines(rows: list[dict[str, Any]]) -> RolloutTotals:
    def measured(key: str) -> list[Any]:
        return [row[key] for row in rows if row.get(key) is not None]

    def total(key: str) -> Any:
        return sum(measured(key)) if measured(key) else None

    def slowest(key: str) -> float | None:
        return max(measured(key), default=None)

    gammas = measured("rollout/sd/gamma")
    num_positions = max(sum(key.startswith(POSITION_KEY) for key in row) for row in rows)
    return RolloutTotals(
        engines=tuple(map(_engine_rollout, rows)),
        rollout_s=slowest("timing/rollout_s"),
        num_output_tokens=total("num_output_tokens"),
        weight_sync_s=slowest("timing/weight_sync_s"),
        requantize_s=slowest("timing/requantize_s"),
        gamma=sum(gammas) / len(gammas) if gammas else None,
        num_drafts=total("rollout/sd/num_drafts"),
        num_draft_tokens=total("rollout/sd/num_draft_tokens"),
        num_accepted_tokens=total("rollout/sd/num_accepted_tokens"),
        acceptance_rate_by_pos=tuple(
            weighted_mean([(row.get(f"{POSITION_KEY}{i}"), row.get(f"{NUM_DRAFTS_KEY}{i}")) for row in rows]) for i in range(num_positions)
        ),
        num_drafts_by_pos=tuple(total(f"{NUM_DRAFTS_KEY}{i}") or 0 for i in range(num_positions)),
    )


def _engine_rollout(row: dict[str, Any]) -> EngineRollout:
    timeline, lengths = row.get("timeline"), row.get("response_lengths")
    return EngineRollout(
        engine=row["engine"],
        time_unix_s=row.get("time"),
        rollout_s=row.get("timing/rollout_s"),
        num_output_tokens=row.get("num_output_tokens"),
        timeline=None if timeline is None else tuple(Segment(*columns) for columns in timeline),
        response_lengths=None if lengths is None else tuple(lengths),
        toggle_step=row.get("rollout/sd/toggle_step"),
        toggle_batch=row.get("rollout/sd/toggle_batch"),
        predicted_speedup=row.get("rollout/sd/predicted_speedup"),
        measured_speedup=row.get("rollout/sd/measured_speedup"),
    )


def weighted_mean(values_and_weights: list[tuple[float | None, float | None]]) -> float | None:
    """Mean of the measured values by weight; None when nothing was measured."""
    pairs = [(value, weight) for value, weight in values_and_weights if value is not None and weight]
    return sum(value * weight for value, weight in pairs) / sum(w for _, w in pairs) if pairs else None
