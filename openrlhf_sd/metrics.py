"""The per-rollout record: what one row of `run_dir/metrics.jsonl` holds, how it is written and read back.

One JSON object per rollout and engine. Words for speculation counts are those of vLLM's `SpecDecodingStats`
(`vllm.v1.spec_decode.metrics`). Not measured is null, never 0 or -1. Pure: no clock, no logging, no heavy imports.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from openrlhf_sd.policy.observation import acceptance_rate, mean_acceptance_length

METRICS_FILE = "metrics.jsonl"

POSITION_KEY = "rollout/sd/acceptance_rate_pos_"
"""Prefix of the per-position keys: `rollout/sd/acceptance_rate_pos_0`, `..._1`, up to the last position drafted."""

NUM_DRAFTS_KEY = "rollout/sd/num_drafts_pos_"
"""Prefix of the weights of those rates: the drafts that reached the position's length."""


class SpecDecodeStats(Protocol):
    """What `SpecDecodeCounts.add` takes: vLLM's `SpecDecodingStats`, or another `SpecDecodeCounts`."""

    num_drafts: int
    num_draft_tokens: int
    num_accepted_tokens: int
    num_accepted_tokens_per_pos: Sequence[int]
    num_draft_tokens_per_pos: Sequence[int]


@dataclass
class SpecDecodeCounts:
    """Draft and acceptance counts summed over engine steps; the per-position lists grow with the largest gamma seen."""

    num_drafts: int = 0
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    num_accepted_tokens_per_pos: list[int] = field(default_factory=list)
    num_draft_tokens_per_pos: list[int] = field(default_factory=list)

    def add(self, stats: SpecDecodeStats) -> None:
        self.num_drafts += stats.num_drafts
        self.num_draft_tokens += stats.num_draft_tokens
        self.num_accepted_tokens += stats.num_accepted_tokens
        _add_per_position(self.num_accepted_tokens_per_pos, stats.num_accepted_tokens_per_pos)
        _add_per_position(self.num_draft_tokens_per_pos, stats.num_draft_tokens_per_pos)

    @property
    def acceptance_rate(self) -> float | None:
        return acceptance_rate(self.num_accepted_tokens, self.num_draft_tokens)

    @property
    def mean_acceptance_length(self) -> float | None:
        return mean_acceptance_length(self.num_accepted_tokens, self.num_drafts)

    def acceptance_rate_pos(self, position: int) -> float | None:
        """Share of the drafts reaching `position` (0-based) whose token there was accepted; None when none reached it.

        vLLM divides by all drafts, which reads as rejection wherever gamma was smaller at that moment; with a constant
        gamma the two agree.
        """
        if position >= len(self.num_draft_tokens_per_pos) or not self.num_draft_tokens_per_pos[position]:
            return None
        return self.num_accepted_tokens_per_pos[position] / self.num_draft_tokens_per_pos[position]


def _add_per_position(totals: list[int], counts: Sequence[int]) -> None:
    totals.extend([0] * (len(counts) - len(totals)))
    for position, count in enumerate(counts):
        totals[position] += count


def rollout_row(
    *,
    rollout: int,
    engine: int,
    time_unix_s: float,
    rollout_s: float | None,
    weight_sync_s: float | None,
    requantize_s: float | None,
    num_responses: int,
    num_prompt_tokens: int,
    num_output_tokens: int,
    counts: SpecDecodeCounts | None = None,
    gamma: float | None = None,
    toggle_step: int | None = None,
    toggle_batch: int | None = None,
    predicted_speedup: float | None = None,
    measured_speedup: float | None = None,
) -> dict[str, Any]:
    """One row of metrics.jsonl.

    Args:
        rollout: 0-based training rollout of the run; OpenRLHF logs the step it feeds as global step `rollout + 1`.
        rollout_s, weight_sync_s, requantize_s: this engine's own clock, seconds.
        counts: None in a run without speculation, which makes every `rollout/sd/*` value null. With counts but no
            drafts (the toggle never fired) the counts are 0 and the rates null.
    """
    row = {
        "rollout": rollout,
        "engine": engine,
        "time": time_unix_s,
        "timing/rollout_s": rollout_s,
        "timing/weight_sync_s": weight_sync_s,
        "timing/requantize_s": requantize_s,
        "num_responses": num_responses,
        "num_prompt_tokens": num_prompt_tokens,
        "num_output_tokens": num_output_tokens,
        "rollout/sd/acceptance_rate": counts and counts.acceptance_rate,
        "rollout/sd/mean_acceptance_length": counts and counts.mean_acceptance_length,
        "rollout/sd/toggle_step": toggle_step,
        "rollout/sd/toggle_batch": toggle_batch,
        "rollout/sd/gamma": gamma,
        "rollout/sd/num_drafts": counts and counts.num_drafts,
        "rollout/sd/num_draft_tokens": counts and counts.num_draft_tokens,
        "rollout/sd/num_accepted_tokens": counts and counts.num_accepted_tokens,
        "rollout/sd/predicted_speedup": predicted_speedup,
        "rollout/sd/measured_speedup": measured_speedup,
    }
    for position in range(len(counts.num_draft_tokens_per_pos) if counts else 0):
        row[f"{POSITION_KEY}{position}"] = counts.acceptance_rate_pos(position)
        row[f"{NUM_DRAFTS_KEY}{position}"] = counts.num_draft_tokens_per_pos[position]
    return row


def append_row(path: str | os.PathLike[str], row: dict[str, Any]) -> None:
    """Append `row` as one line in a single write, so that engines writing to one file cannot interleave.

    A line that an earlier, killed run left cut is closed first, so it cannot swallow this row.

    Raises:
        ValueError: a value is NaN or infinite. Not measured is null.
        OSError: the disk takes nothing, or only the beginning of the line, as one that has just become full does.
    """
    try:
        line = json.dumps(row, allow_nan=False).encode() + b"\n"
    except ValueError as error:
        raise ValueError(f"metrics row for {path} holds NaN or infinity; write null for not measured: {row}") from error
    with open(path, "ab+", buffering=0) as file:
        if file.seek(0, os.SEEK_END):
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                line = b"\n" + line
        if file.write(line) < len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), os.fspath(path))


def read_rows(path: str | os.PathLike[str]) -> tuple[list[dict[str, Any]], int]:
    """All whole rows of a metrics.jsonl, in file order, and the number of lines that could not be read.

    An unreadable line is cut short by a killed run, holds NaN, or is no JSON object. Raises OSError as `open` does.
    """
    rows, num_unreadable = [], 0
    for line in Path(path).read_bytes().split(b"\n"):
        if not line.strip():
            continue
        try:
            row = json.loads(line, parse_constant=_refuse_constant)
        except (ValueError, RecursionError):  # JSONDecodeError and UnicodeDecodeError are both ValueError
            num_unreadable += 1
            continue
        if isinstance(row, dict):
            rows.append(row)
        else:
            num_unreadable += 1
    return rows, num_unreadable


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a measurement")
