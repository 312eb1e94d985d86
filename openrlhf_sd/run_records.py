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
from openrlhf_sd.metrics import METRICS_FILE
from openrlhf_sd.rollout_record import LOG_PREFIX
from openrlhf_sd.run_rollouts import RolloutTotals, read_rollouts

ROLLOUT_S = "train/timing/generation"
BROADCAST_S = "train/timing/broadcast"
STEP_TOTAL_S = "train/timing/step_total"
REWARD = "train/rollout/reward_mean"
RESPONSE_LENGTH = "train/rollout/response_length_mean"
TRUNCATED_RATE = "train/rollout/truncated_rate"
VLLM_KL = "train/vllm_kl"

NO_RECORDS = f"no records yet (neither {METRICS_FILE} nor TensorBoard events); let the run finish a step"

STEP_PHASES_S = (ROLLOUT_S, "train/timing/make_experience", "train/timing/ppo_train", BROADCAST_S)
"""The phases of one synchronous step. Their sum is used instead of `timing/step_total`, which upstream computes as the
sum of every status key starting with `timing/` and so would count twice whatever else is logged under that name."""


@dataclass(frozen=True)
class RunRecords:
    """Everything read from one run folder.

    Attributes:
        config: config.json: "arm", "self_spec" (or null), "openrlhf" (flat dotted flags).
        provenance: provenance.json, or None when the file is missing.
        rollouts: global step -> what fed it (rollout `step - 1`).
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

    @property
    def seed(self) -> Any:
        return self.config["openrlhf"].get("train.seed")

    @property
    def has_records(self) -> bool:
        return bool(self.rollouts or self.scalars)

    def scalar(self, tag: str) -> dict[int, float]:
        """Values of one TensorBoard tag by global step, ascending; empty when it was never logged."""
        return self.scalars.get(tag, {})

    def step_s(self) -> dict[int, float]:
        """End-to-end seconds by global step. Asynchronous training overlaps its phases: there upstream's clock."""
        if self.config["openrlhf"].get("train.async_enable"):
            return self.scalar(STEP_TOTAL_S)
        phases = [self.scalar(tag) for tag in STEP_PHASES_S]
        return {step: sum(phase[step] for phase in phases) for step in phases[0] if all(step in p for p in phases)}


def load_run(run_dir: str | Path, may_be_empty: bool = False) -> RunRecords:
    """Read one run folder.

    Args:
        may_be_empty: a run that has recorded nothing is read too, with a note: it failed early, or has just begun.

    Raises:
        SelfSpecError: the folder or its config.json is missing or broken, or it holds no records. A run still going, a
            cut line or a missing file is a note instead.
    """
    folder = Path(run_dir)
    if not folder.is_dir():
        raise SelfSpecError(f"{folder}: no such run folder; give a folder written with --self-spec.run_dir")
    config = read_config(folder / "config.json")
    notes: list[str] = []
    provenance = _read_provenance(folder / "provenance.json", notes)
    rollouts = read_rollouts(folder / METRICS_FILE, notes)
    scalars = _read_scalars(events_folder(folder, config), notes)
    if not rollouts and not scalars:
        if not may_be_empty:
            raise SelfSpecError(f"{folder}: {NO_RECORDS}")
        notes.append(NO_RECORDS)
    return RunRecords(folder, config, provenance, rollouts, scalars, notes)


def events_folder(run_dir: Path, config: dict[str, Any]) -> Path:
    """Where OpenRLHF has written this run's TensorBoard events (`TensorboardLogger` in `openrlhf.utils.logging_utils`)."""
    flags, own = config["openrlhf"], run_dir / "tensorboard"
    elsewhere, run_name = flags.get("logger.tensorboard_dir"), flags.get("logger.wandb.run_name")
    if own.exists() or not isinstance(elsewhere, str) or not isinstance(run_name, str):
        return own
    return Path(elsewhere) / run_name


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"), parse_constant=str)  # OpenRLHF has defaults of infinity
    except (ValueError, RecursionError) as error:
        raise SelfSpecError(f"{path}: not valid JSON ({error}); restore the file or run again") from error
    if not isinstance(value, dict):
        raise SelfSpecError(f"{path}: expected a JSON object; restore the file or run again")
    return value


def read_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise SelfSpecError(f"{path}: missing, so this is no run folder; give a folder written with --self-spec.run_dir")
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


def _read_scalars(folder: Path, notes: list[str]) -> dict[str, dict[int, float]]:
    """Every `train/*` scalar below `folder`, by tag and global step; a step logged twice keeps the later wall time."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    files = sorted(folder.rglob("events.out.tfevents.*"))
    if not files:
        notes.append(f"{folder} holds no event files: no trainer times, no rewards")
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
                    # Ours are gaps on purpose where nothing has been drafted (ResponseCounts.logs).
                    num_not_finite += not tag.startswith(f"train/{LOG_PREFIX}")
                    continue
                if event.step in by_step:
                    repeated_steps.add(event.step)
                by_step[event.step] = max(by_step.get(event.step, (0.0, 0.0)), (event.wall_time, event.value))
    if repeated_steps:
        notes.append(f"{len(repeated_steps)} step(s) were logged more than once (a resumed run?): the latest value counts")
    if num_not_finite:
        notes.append(f"{num_not_finite} logged value(s) were NaN or infinite and are left out: the training may have diverged")
    scalars = {tag: {step: by_step[step][1] for step in sorted(by_step)} for tag, by_step in latest.items() if by_step}
    steps = list(scalars.get(ROLLOUT_S, ()))
    if steps and len(steps) != steps[-1] - steps[0] + 1:
        notes.append(f"only {len(steps)} of the steps {steps[0]}..{steps[-1]} were logged: sums cover those only")
    return scalars
