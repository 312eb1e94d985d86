"""A real run's lengths, acceptance and seconds, read back from its metrics.jsonl for replay."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from openrlhf_sd.config import SelfSpecConfig, SelfSpecError
from openrlhf_sd.metrics import POSITION_KEY, read_rows
from openrlhf_sd.simulation.acceptance import AcceptanceProcess, ByPosition, Independent, conditional
from openrlhf_sd.simulation.lengths import LENGTHS_KEY
from openrlhf_sd.simulation.rollouts import PLAIN, EngineInput
from openrlhf_sd.step_ledger import TIMELINE_COLUMNS

SECONDS = TIMELINE_COLUMNS.index("seconds")


@dataclass(frozen=True)
class TracedRollout:
    rollout: int
    engines: tuple[EngineInput, ...]
    num_prompt_tokens: tuple[int, ...]
    """Per engine."""

    measured_s: float | None
    """Seconds of the slowest engine's rollout; None where one was not measured."""

    engine_s: float | None
    """Seconds of the engine steps in it: without the front end's start and end, which no step time knows of."""


@dataclass(frozen=True)
class Trace:
    """`RolloutInputs` of a recorded run: the seed changes only where in the requests the rejections fall."""

    rollouts: tuple[TracedRollout, ...]
    policy: str | None
    """What the run did: "ar" or a mode; None without a readable config.json beside the metrics."""

    config: SelfSpecConfig | None
    knows_acceptance: bool
    """Whether every engine drafted in some rollout, or an acceptance was given."""

    max_batch: int

    def __call__(self, seed: int, rollout: int) -> list[EngineInput]:
        return list(self.rollouts[rollout].engines)


def read_trace(path: Path, given: AcceptanceProcess | None) -> Trace:
    """Args:
        path: a metrics.jsonl whose rows hold `response_lengths`.
        given: acceptance to use in place of the recorded one.

    A rollout in which an engine drafted nothing takes the acceptance of that engine's next rollout with drafts, or of the last one.

    Raises:
        SelfSpecError: no such file, no rows, or rows without what a replay needs.
    """
    try:
        rows, num_unreadable = read_rows(path)
    except OSError as error:
        raise SelfSpecError(f"--trace: cannot read {path} ({error.strerror}); give the metrics.jsonl of a run folder") from None
    if not rows:
        unreadable = f", {num_unreadable} unreadable lines" if num_unreadable else ""
        raise SelfSpecError(f"--trace: {path}: no rows{unreadable}; give the metrics.jsonl of a run folder")
    by_place = {_place(row, path): row for row in rows}  # a repeated row is that of a resumed run: the later one counts
    by_place = {place: row for place, row in by_place.items() if _lengths(row, path)}
    if not by_place:
        raise SelfSpecError(f"--trace: {path}: no row holds a response")
    processes = {engine: _processes(by_place, engine, path) for _, engine in by_place}
    unknown = Independent(0.0)
    rollouts = []
    for rollout in sorted({rollout for rollout, _ in by_place}):
        found = [(engine, row) for (number, engine), row in sorted(by_place.items(), key=lambda item: item[0]) if number == rollout]
        engines = [
            EngineInput(
                np.array(_lengths(row, path), dtype=np.int64),
                _number(row, "num_prompt_tokens", path) / len(_lengths(row, path)),
                given or processes[engine].get(rollout) or unknown,
            )
            for engine, row in found
        ]
        seconds = [row.get("timing/rollout_s") for _, row in found]
        prompts = tuple(int(_number(row, "num_prompt_tokens", path)) for _, row in found)
        steps_s = [sum(segment[SECONDS] for segment in row.get("timeline") or []) for _, row in found]
        rollouts.append(TracedRollout(rollout, tuple(engines), prompts, _slowest(seconds), _slowest(steps_s)))
    policy, config = _what_ran(path.parent / "config.json")
    return Trace(
        tuple(rollouts),
        policy,
        config,
        given is not None or all(processes.values()),
        max(len(engine.lengths) for rollout in rollouts for engine in rollout.engines),
    )


def _slowest(seconds: list[Any]) -> float | None:
    return max(seconds) if all(isinstance(value, (int, float)) and value > 0 for value in seconds) else None


def _place(row: dict[str, Any], path: Path) -> tuple[int, int]:
    return int(_number(row, "rollout", path)), int(_number(row, "engine", path))


def _number(row: dict[str, Any], key: str, path: Path) -> float:
    if type(row.get(key)) not in (int, float) or row[key] < 0:
        raise SelfSpecError(f"--trace: {path}: a row's {key!r} is {row.get(key)!r}, not a number; is this a metrics.jsonl?")
    return row[key]


def _lengths(row: dict[str, Any], path: Path) -> list[int]:
    """Of the responses that have any token."""
    lengths = row.get(LENGTHS_KEY)
    if not isinstance(lengths, list) or not all(type(length) is int and length >= 0 for length in lengths):
        raise SelfSpecError(
            f"--trace: {path}: rollout {row.get('rollout')} has no list {LENGTHS_KEY!r}; record the run again with this version"
        )
    return [length for length in lengths if length > 0]


def _processes(by_place: dict[tuple[int, int], dict], engine: int, path: Path) -> dict[int, AcceptanceProcess]:
    """By rollout; empty where this engine never drafted."""
    known = {}
    rollouts = sorted(rollout for rollout, number in by_place if number == engine)
    for rollout in rollouts:
        row = by_place[rollout, engine]
        shares = []
        while row.get(f"{POSITION_KEY}{len(shares)}") is not None:
            shares.append(_number(row, f"{POSITION_KEY}{len(shares)}", path))
        if shares:
            known[rollout] = ByPosition(conditional(shares))
    if not known:
        return {}
    last = known[max(known)]
    return {rollout: next((known[later] for later in rollouts if later >= rollout and later in known), last) for rollout in rollouts}


def _what_ran(path: Path) -> tuple[str | None, SelfSpecConfig | None]:
    try:
        record = json.loads(path.read_text())
        if record["arm"] == "vanilla":
            return PLAIN, None
        return record["arm"], SelfSpecConfig.from_dict(record["self_spec"])
    except (OSError, ValueError, KeyError, TypeError):  # SelfSpecError, of another version's config, is a ValueError
        return None, None


def replay_rows(trace: Trace, predicted_s: list[list[float]]) -> list[dict[str, Any]]:
    """Per rollout what was predicted (mean over seeds), what the clock said of its engine steps and of the whole, and the errors.

    Args:
        predicted_s: seconds per seed and rollout.
    """
    rows = []
    for index, rollout in enumerate(trace.rollouts):
        predicted = float(np.mean([seed[index] for seed in predicted_s]))
        rows.append(
            {
                "rollout": rollout.rollout,
                "predicted_s": predicted,
                "engine_s": rollout.engine_s,
                "engine_error": predicted / rollout.engine_s - 1 if rollout.engine_s else None,
                "measured_s": rollout.measured_s,
                "error": predicted / rollout.measured_s - 1 if rollout.measured_s else None,
            }
        )
    return rows


def overall_error(rows: list[dict[str, Any]], measured: str) -> float | None:
    """Of the sum over all rollouts that have `measured`, "engine_s" or "measured_s"; None without any."""
    found = [row for row in rows if row[measured]]
    return sum(row["predicted_s"] for row in found) / sum(row[measured] for row in found) - 1 if found else None
