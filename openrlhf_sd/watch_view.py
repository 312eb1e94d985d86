"""What `openrlhf-sd watch` shows: records in, a rich renderable out. Pure: no clock, no files.

Everything from a run folder is somebody else's text: it becomes `Text`, never markup, without control characters.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING

from openrlhf_sd.report_cells import MISSING, number, percent, plain, text
from openrlhf_sd.report_summary import speculated_share
from openrlhf_sd.run_records import REWARD, RunRecords
from openrlhf_sd.run_rollouts import EngineRollout, RolloutTotals
from openrlhf_sd.step_ledger import Segment

if TYPE_CHECKING:
    from rich.console import RenderableType

NUM_COLUMNS = 5  # rollouts side by side: with the names and the median they fit into 80 letters
SPARK_WIDTH = 56
SPARKS = " ▁▂▃▄▅▆▇█"


@dataclass(frozen=True)
class Watched:
    """A run folder at one moment.

    Attributes:
        run: None where not even its config.json is there.
        message: what it waits for, or why nothing will come; None once a rollout is recorded.
    """

    run_dir: str
    run: RunRecords | None
    message: str | None

    @property
    def status(self) -> str:
        """running, finished or failed; missing where nothing says so."""
        return (self.run and self.run.provenance or {}).get("status", MISSING)

    @property
    def is_over(self) -> bool:
        return self.status in ("finished", "failed")


def view(watched: Watched, now_unix_s: float) -> RenderableType:
    from rich.console import Group
    from rich.text import Text

    parts: list[RenderableType] = [Text(_headline(watched, now_unix_s), style="bold"), Text(text(watched.run_dir), style="dim")]
    if watched.message:
        parts.append(Text(text(watched.message), style="yellow"))
    run = watched.run
    if run is not None and run.rollouts:
        last_step = max(run.rollouts)
        parts += [Text(), _table(run), Text(), *map(Text, _last_rollout(last_step, run.rollouts[last_step]))]
    if run is not None:
        parts += [Text(text(note), style="dim") for note in run.notes if run.rollouts]
    return Group(*parts)


def _headline(watched: Watched, now_unix_s: float) -> str:
    run = watched.run
    if run is None:
        return "no run yet"
    spec = run.config["self_spec"] or {}
    words = [run.arm, f"γ={spec['gamma']}" if run.arm in ("fixed", "toggle") and "gamma" in spec else "", spec.get("quant") or ""]
    parts = [" ".join(str(word) for word in words if word), watched.status, f"{len(run.rollouts)} rollouts recorded"]
    ends = [e.time_unix_s for totals in run.rollouts.values() for e in totals.engines if e.time_unix_s is not None]
    if watched.status == "running" and ends:
        parts.append(f"the last {_ago(now_unix_s - max(ends))} ago")
    return text(" · ".join(parts))


def _ago(seconds: float) -> str:
    seconds = max(0, round(seconds))
    if seconds < 120:
        return f"{seconds} s"
    return f"{seconds // 60} min" if seconds < 7200 else f"{seconds // 3600} h"


def _table(run: RunRecords) -> RenderableType:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    steps = sorted(run.rollouts)
    shown = steps[-NUM_COLUMNS:]
    table = Table(box=SIMPLE_HEAD, padding=(0, 1), collapse_padding=True, pad_edge=False)
    table.add_column("training step", no_wrap=True)
    for step in shown:
        table.add_column(str(step), justify="right")
    table.add_column("median", justify="right")
    for name, value, show in _rows(is_vanilla=run.arm == "vanilla"):
        values = {step: value(run.rollouts[step]) for step in steps}
        _add_row(table, name, values, shown, show)
    _add_row(table, "mean reward", run.scalar(REWARD), shown, plain)
    return table


def _add_row(table, name: str, values: dict[int, float | None], shown: Sequence[int], show: Callable[[float | None], str]) -> None:
    from rich.text import Text

    measured = [value for value in values.values() if value is not None]
    cells = [show(values.get(step)) for step in shown] + [show(median(measured) if measured else None)]
    table.add_row(Text(name), *map(Text, cells))


Row = tuple[str, Callable[[RolloutTotals], float | None], Callable[[float | None], str]]


def _rows(is_vanilla: bool) -> list[Row]:
    """A vanilla run does not lack its acceptance, it has none: no rows for it."""

    def seconds(value: float | None) -> str:
        return plain(value, " s")

    def times(value: float | None) -> str:
        return plain(value, "×")

    rows: list[Row] = [
        ("rollout", lambda t: t.rollout_s, seconds),
        ("generated tokens/s", _tokens_per_s, plain),
        ("weight sync", lambda t: t.weight_sync_s, seconds),
    ]
    if is_vanilla:
        return rows
    return [
        *rows,
        ("re-quantize", lambda t: t.requantize_s, seconds),
        ("acceptance", lambda t: t.acceptance_rate, percent),
        ("mean acceptance length", lambda t: t.mean_acceptance_length, plain),
        ("γ, on", lambda t: t.gamma, plain),
        ("on, of engine steps", lambda t: speculated_share(t.segments, "num_steps"), percent),
        ("on, of tokens", lambda t: speculated_share(t.segments, "num_tokens"), percent),
        ("predicted speed-up, on", lambda t: _over_engines([e.predicted_speedup for e in t.engines]), times),
        ("measured speed-up, on", lambda t: _over_engines([e.measured_speedup for e in t.engines]), times),
    ]


def _tokens_per_s(totals: RolloutTotals) -> float | None:
    return totals.num_output_tokens / totals.rollout_s if totals.num_output_tokens and totals.rollout_s else None


def _over_engines(values: list[float | None]) -> float | None:
    measured = [value for value in values if value is not None]
    return median(measured) if measured else None


def _last_rollout(step: int, totals: RolloutTotals) -> list[str]:
    """Two spark lines over the seconds of the slowest engine: active batch and γ."""
    timed = [engine for engine in totals.engines if engine.timeline and _seconds(engine) > 0]
    if not timed:
        return [f"active batch and γ inside step {step}: {MISSING} (no timeline recorded)"]
    engine = max(timed, key=_seconds)
    batches, gammas = sample_timeline(engine.timeline, SPARK_WIDTH)
    return [
        f"step {step} inside, engine {engine.engine}, {number(_seconds(engine))} s from left to right",
        f"batch {spark_line(batches)} up to {max(batches):.0f}",
        f"γ     {spark_line(gammas)} up to {max(gammas):.0f}" + ("" if any(gammas) else " (never on)"),
    ]


def _seconds(engine: EngineRollout) -> float:
    return sum(segment.seconds for segment in engine.timeline)


def sample_timeline(timeline: Sequence[Segment], num_samples: int) -> tuple[list[float], list[float]]:
    """Active batch and γ at the middles of `num_samples` equal stretches of time; the batch is straight within a segment."""
    total = sum(segment.seconds for segment in timeline)
    batches, gammas = [], []
    timed = iter([segment for segment in timeline if segment.seconds > 0])
    segment, start = next(timed), 0.0
    for index in range(num_samples):
        at = (index + 0.5) / num_samples * total
        while at > start + segment.seconds and (following := next(timed, None)) is not None:
            start += segment.seconds
            segment = following
        share = min(1.0, (at - start) / segment.seconds)
        batches.append(segment.first_batch + share * (segment.last_batch - segment.first_batch))
        gammas.append(float(segment.gamma))
    return batches, gammas


def spark_line(values: Sequence[float]) -> str:
    """One letter per value, its height in eighths of the largest; a blank is 0 and nothing else."""
    top = max(values, default=0.0)
    return "".join(SPARKS[0] if value <= 0 else SPARKS[max(1, round(8 * value / top))] for value in values)
