"""Read back one run folder: config.json, provenance.json, metrics.jsonl and OpenRLHF's own TensorBoard events.

Times of rollouts and steps come from OpenRLHF's trainer clock (`train/timing/*`, written by
`openrlhf.trainer.ppo_trainer`), because that clock is the same code in every arm; token counts and acceptance come
from metrics.jsonl.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from openrlhf_sd.config import SelfSpecError
from openrlhf_sd.metrics import METRICS_FILE, NUM_DRAFTS_KEY, POSITION_KEY, read_rows

ROLLOUT_S = "train/timing/generation"
BROADCAST_S = "train/timing/broadcast"
STEP_TOTAL_S = "train/timing/step_total"
REWARD = "train/rollout/reward_mean"
RESPONSE_LENGTH = "train/rollout/response_length_mean"
TRUNCATED_RATE = "train/rollout/truncated_rate"
VLLM_KL = "train/vllm_kl"

STEP_PHASES_S = (ROLLOUT_S, "train/timing/make_experience", "train/timing/ppo_train", BROADCAST_S)
"""The phases of one synchronous step. Their sum is used instead of `timing/step_total`, which upstream computes as the
sum of every status key starting with `timing/` and so would count twice whatever else is logged under that name."""

_NUMBERS = (
    "timing/rollout_s",
    "timing/weight_sync_s",
    "timing/requantize_s",
    "num_output_tokens",
    "rollout/sd/gamma",
    "rollout/sd/num_drafts",
    "rollout/sd/num_draft_tokens",
    "rollout/sd/num_accepted_tokens",
)
"""The columns of metrics.jsonl that are computed with, besides the per-position ones."""


@dataclass(frozen=True)
class RolloutTotals:
    """One rollout, pooled over its engines. None is not measured.

    Engines work side by side: tokens and counts add up, seconds are those of the slowest engine.
    """

    num_output_tokens: int | None
    weight_sync_s: float | None
    requantize_s: float | None
    gamma: float | None  # mean over engines: each may sit on its own rung
    num_drafts: int | None
    num_draft_tokens: int | None
    num_accepted_tokens: int | None
    acceptance_rate_by_pos: tuple[float | None, ...]
    num_drafts_by_pos: tuple[int, ...]  # drafts that long: the weights of those rates


@dataclass(frozen=True)
class RunRecords:
    """Everything read from one run folder.

    Attributes:
        config: config.json: "arm", "self_spec" (or null), "openrlhf" (flat dotted flags).
        provenance: provenance.json, or None when the file is missing.
        rollouts: global step -> totals of the rollout that fed it (`rollout + 1`).
        scalars: TensorBoard tag -> global step -> finite value.
        notes: one sentence each, for the reader of a report: what is incomplete.
    """

    run_dir: Path
    config: dict[str, Any]
    provenance: dict[str, Any] | None
    rollouts: dict[int, RolloutTotals]
    scalars: dict[str, dict[int, float]]
    notes: list[str] = field(default_factory=list)

    @property
    def arm(self) -> str:
        return self.config["arm"]

    def scalar(self, tag: str) -> dict[int, float]:
        """Values of one TensorBoard tag by global step, ascending; empty when it was never logged."""
        return self.scalars.get(tag, {})

    def step_s(self) -> dict[int, float]:
        """End-to-end seconds by global step. Asynchronous training overlaps its phases: there upstream's clock."""
        if self.config["openrlhf"].get("train.async_enable"):
            return self.scalar(STEP_TOTAL_S)
        phases = [self.scalar(tag) for tag in STEP_PHASES_S]
        return {step: sum(phase[step] for phase in phases) for step in phases[0] if all(step in p for p in phases)}


def load_run(run_dir: str | Path) -> RunRecords:
    """Read one run folder.

    Raises:
        SelfSpecError: the folder or its config.json is missing or broken, or it holds no records. A run still going, a
            cut line or a missing file is a note instead.
    """
    folder = Path(run_dir)
    if not folder.is_dir():
        raise SelfSpecError(f"{folder}: no such run folder; give a folder written with --self-spec.run_dir")
    config = _read_config(folder / "config.json")
    notes: list[str] = []
    provenance = _read_provenance(folder / "provenance.json", notes)
    rollouts = _read_rollouts(folder / METRICS_FILE, notes)
    scalars = _read_scalars(folder / "tensorboard", notes)
    if not rollouts and not scalars:
        raise SelfSpecError(
            f"{folder}: no records yet (neither {METRICS_FILE} nor tensorboard/); let the run finish a step"
        )
    return RunRecords(folder, config, provenance, rollouts, scalars, notes)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"), parse_constant=str)  # OpenRLHF has defaults of infinity
    except ValueError as error:
        raise SelfSpecError(f"{path}: not valid JSON ({error}); restore the file or run again") from error
    if not isinstance(value, dict):
        raise SelfSpecError(f"{path}: expected a JSON object; restore the file or run again")
    return value


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise SelfSpecError(
            f"{path}: missing, so this is no run folder; give a folder written with --self-spec.run_dir"
        )
    config = _read_json(path)
    for key, kinds in (("arm", str), ("self_spec", (dict, type(None))), ("openrlhf", dict)):
        if key not in config or not isinstance(config[key], kinds):
            raise SelfSpecError(f"{path}: {key!r} is missing or of the wrong type; restore the file or run again")
    return config


def _read_provenance(path: Path, notes: list[str]) -> dict[str, Any] | None:
    if not path.is_file():
        notes.append("provenance.json is missing: machine and versions are unknown")
        return None
    provenance = _read_json(path)
    for key, kind in (("status", str), ("packages", dict), ("machine", dict)):
        if not isinstance(provenance.get(key), kind):
            raise SelfSpecError(f"{path}: {key!r} is missing or of the wrong type; restore the file or run again")
    if provenance["status"] != "finished":
        notes.append(f"the run's status is {provenance['status']!r}: its records may be incomplete")
    return provenance


def _read_rollouts(path: Path, notes: list[str]) -> dict[int, RolloutTotals]:
    """Global step -> pooled totals; of a (rollout, engine) written twice, as after a resume, the later row counts."""
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
        for key in row:
            if (key in _NUMBERS or key.startswith((POSITION_KEY, NUM_DRAFTS_KEY))) and type(row[key]) not in (int, float, type(None)):
                raise SelfSpecError(f"{path}: {key!r} of rollout {rollout} is no number; remove that row")
        by_rollout.setdefault(rollout, {})[engine] = row
    num_repeated = len(rows) - sum(len(engines) for engines in by_rollout.values())
    if num_repeated:
        notes.append(f"{METRICS_FILE}: {num_repeated} row(s) replaced by a later row of the same rollout and engine")
    return {rollout + 1: _pool_engines(list(by_rollout[rollout].values())) for rollout in sorted(by_rollout)}


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
        num_output_tokens=total("num_output_tokens"),
        weight_sync_s=slowest("timing/weight_sync_s"),
        requantize_s=slowest("timing/requantize_s"),
        gamma=sum(gammas) / len(gammas) if gammas else None,
        num_drafts=total("rollout/sd/num_drafts"),
        num_draft_tokens=total("rollout/sd/num_draft_tokens"),
        num_accepted_tokens=total("rollout/sd/num_accepted_tokens"),
        acceptance_rate_by_pos=tuple(
            weighted_mean([(row.get(f"{POSITION_KEY}{i}"), row.get(f"{NUM_DRAFTS_KEY}{i}")) for row in rows])
            for i in range(num_positions)
        ),
        num_drafts_by_pos=tuple(total(f"{NUM_DRAFTS_KEY}{i}") or 0 for i in range(num_positions)),
    )


def weighted_mean(values_and_weights: list[tuple[float | None, float | None]]) -> float | None:
    """Mean of the measured values by weight; None when nothing was measured."""
    pairs = [(value, weight) for value, weight in values_and_weights if value is not None and weight]
    return sum(value * weight for value, weight in pairs) / sum(w for _, w in pairs) if pairs else None


def _read_scalars(folder: Path, notes: list[str]) -> dict[str, dict[int, float]]:
    """Every `train/*` scalar below `folder`, by tag and global step; a step logged twice keeps the later wall time."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    files = sorted(folder.rglob("events.out.tfevents.*"))
    if not files:
        notes.append("tensorboard/ holds no event files: no trainer times, no rewards")
    latest: dict[str, dict[int, tuple[float, float]]] = {}  # tag -> step -> (wall time, value)
    repeated_steps, num_not_finite = set(), 0
    for file in files:
        events = EventAccumulator(str(file), size_guidance={"scalars": 0})  # 0: keep every event, no sampling
        events.Reload()
        for tag in events.Tags()["scalars"]:
            if not tag.startswith("train/"):
                continue
            by_step = latest.setdefault(tag, {})
            for event in events.Scalars(tag):
                if not math.isfinite(event.value):
                    num_not_finite += 1
                    continue
                if event.step in by_step:
                    repeated_steps.add(event.step)
                by_step[event.step] = max(by_step.get(event.step, (0.0, 0.0)), (event.wall_time, event.value))
    if repeated_steps:
        notes.append(
            f"{len(repeated_steps)} step(s) were logged more than once (a resumed run?): the latest value counts"
        )
    if num_not_finite:
        notes.append(
            f"{num_not_finite} logged value(s) were NaN or infinite and are left out: the training may have diverged"
        )
    scalars = {tag: {step: by_step[step][1] for step in sorted(by_step)} for tag, by_step in latest.items() if by_step}
    steps = list(scalars.get(ROLLOUT_S, ()))
    if steps and len(steps) != steps[-1] - steps[0] + 1:
        notes.append(f"only {len(steps)} of the steps {steps[0]}..{steps[-1]} were logged: sums cover those only")
    return scalars
