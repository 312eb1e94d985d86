"""Sweeps of engine step times as CSV files, ours and the published one, read by explicit column names into one `Sweep`.

Ours (`python -m calib.sweep`) is wide: one row per (batch, context, gamma), times in seconds, an empty cell where a time was not taken:

    column              what was timed
    target_step_s       plain vLLM's decode step
    target_step_sd_s    the self-speculating engine's step at gamma 0
    draft_step_s        one draft step: what a cycle takes beyond its verify step, over gamma
    verify_step_s       the target on gamma + 1 tokens per request, no drafting
    cycle_s             a whole steady-state cycle; cycle_spread is its interquartile range over its median, num_cycles how many
    prompts             distinct, or identical (then prefix caching makes long contexts look cheap)
    logprobs            per sampled token that steps also computed and returned, 0 for none

The published one (EfficientRollout) is long: one row per (batch, seq, gamma, mode), milliseconds; its median is what we take. Rows of
batch 0 are its own aggregates and are left out. It was taken with identical prompts and one engine per gamma, and names no device.
"""

from __future__ import annotations

import csv
import hashlib
import io
import os
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from calib.csv_cells import (
    Cells,
    check_header,
    integer,
    number,
    positive_number,
    read_header,
    read_lines,
    read_text,
    text_of,
)
from openrlhf_sd.config import SelfSpecError

KINDS = ("target", "draft", "verify", "cycle", "target_sd")
PROMPTS = ("distinct", "identical")

PUBLISHED_MODES = {
    "target_decode": "target",
    "target_decode_sd": "target_sd",
    "drafter_decode": "draft",
    "target_verify": "verify",
}
PUBLISHED_COLUMNS = tuple("model,batch,seq,gamma,mode,mean_ms,median_ms,std_ms,min_ms,max_ms,n_samples".split(","))

KIND_COLUMNS = {
    "target": "target_step_s",
    "target_sd": "target_step_sd_s",
    "draft": "draft_step_s",
    "verify": "verify_step_s",
    "cycle": "cycle_s",
}
DRAFTING_KINDS = ("draft", "verify", "cycle")


@dataclass(frozen=True, slots=True)
class Timing:
    """One measured time. `gamma` is 0 for kind "target" and the row's own otherwise."""

    kind: str
    batch: int
    context: int
    gamma: int
    seconds: float

    @property
    def point(self) -> tuple[int, int, int]:
        return (self.batch, self.context, self.gamma)


@dataclass(frozen=True)
class Sweep:
    """All times of one file: one machine, one model, one drafter. None where the format does not say."""

    model: str
    device: str | None
    quant: str | None
    tensor_parallel_size: int | None
    distinct_prompts: bool
    timings: tuple[Timing, ...]
    sha256: str
    path: str
    engine_per_gamma: bool = False
    """Each gamma was timed in an engine built for it, whose CUDA graphs hold multiples of gamma + 1 rows. One engine drafts any gamma
    otherwise."""

    @property
    def prompts(self) -> str:
        """One of PROMPTS, the regime of the cost model in which these times were taken."""
        return "distinct" if self.distinct_prompts else "identical"


@dataclass(frozen=True)
class SweepRow:
    """One row of our own format; its fields are the columns, in order. None is an empty cell."""

    device: str
    model: str
    quant: str
    tensor_parallel_size: int
    vllm: str
    prompts: str
    logprobs: int
    batch: int
    context: int
    gamma: int
    target_step_s: float | None = None
    target_step_sd_s: float | None = None
    draft_step_s: float | None = None
    verify_step_s: float | None = None
    cycle_s: float | None = None
    cycle_spread: float | None = None
    num_cycles: int | None = None


OWN_COLUMNS = tuple(f.name for f in fields(SweepRow))
IDENTITY_COLUMNS = ("device", "model", "quant", "tensor_parallel_size", "vllm", "prompts", "logprobs")


def read_sweep(path: str | Path) -> Sweep:
    """Read either format.

    A target time that our format holds at several gammas of one (batch, context) becomes one timing, the median.

    Raises:
        SelfSpecError: no such file, no rows, unknown, missing or repeated column, unknown mode, a time that is not a positive number,
            a point given twice, rows of more than one model or machine. The message names file and line.
    """
    text, sha256 = read_text(path)
    published = _is_published(read_header(text, path))
    if published:
        identity, timings = _published_timings(text, path)
    else:
        rows = _own_rows(text, path)
        first = rows[0]
        identity = (first.model, first.device, first.quant, first.tensor_parallel_size, first.prompts == "distinct")
        timings = _own_timings(rows)
    if not timings:
        raise SelfSpecError(f"{path}: no times in it (rows of batch 0 are aggregates and do not count); give a whole sweep")
    return Sweep(*identity, timings=tuple(timings), sha256=sha256, path=str(path), engine_per_gamma=published)


def read_rows(path: str | Path) -> list[SweepRow]:
    """Rows of a file of our own format, for resuming a sweep. Raises SelfSpecError as `read_sweep` does."""
    text, _ = read_text(path)
    return _own_rows(text, path)


def write(path: str | Path, rows: Iterable[SweepRow]) -> None:
    """Write a new file of our own format, in one step: a reader sees the old file or the whole new one."""
    partial = Path(f"{path}.partial")
    partial.write_text(",".join(OWN_COLUMNS) + "\n" + "".join(map(_as_line, rows)), encoding="utf-8")
    os.replace(partial, path)


def append(path: str | Path, row: SweepRow) -> None:
    """Add one row, with the header if the file is new. The line is on disk when this returns, so an interrupt loses no row."""
    path = Path(path)
    text = _as_line(row)
    if not path.exists() or path.stat().st_size == 0:
        text = ",".join(OWN_COLUMNS) + "\n" + text
    with path.open("a", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def point_digests(timings: Iterable[Timing]) -> dict[tuple[int, int, int], str]:
    """For each (batch, context, gamma) eight hex digits of what was measured there. A calibration keeps those of the points that it was
    fitted on, so that a measurement is recognised in whichever file it comes back."""
    by_point: dict[tuple[int, int, int], list[str]] = {}
    for timing in timings:
        by_point.setdefault(timing.point, []).append(f"{timing.kind} {timing.seconds!r}")
    return {point: hashlib.sha256("\n".join(sorted(parts)).encode()).hexdigest()[:8] for point, parts in by_point.items()}


def _as_line(row: SweepRow) -> str:
    cells = ["" if value is None else repr(value) if isinstance(value, float) else str(value) for value in _values(row)]
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerow(cells)
    return buffer.getvalue()


def _values(row: SweepRow) -> list:
    return [getattr(row, column) for column in OWN_COLUMNS]


def _is_published(header: list[str]) -> bool:
    return "mode" in header or "median_ms" in header


def _published_timings(text: str, path: str | Path) -> tuple[tuple, list[Timing]]:
    check_header(read_header(text, path), PUBLISHED_COLUMNS, path)
    models: set[str] = set()
    timings: dict[tuple, Timing] = {}
    for where, row in read_lines(text, path):
        if row["mode"] not in PUBLISHED_MODES:
            raise SelfSpecError(f"{where}: unknown mode {row['mode']!r}; the modes are {', '.join(PUBLISHED_MODES)}")
        kind = PUBLISHED_MODES[row["mode"]]
        models.add(text_of(row, "model", where))
        if len(models) > 1:
            raise SelfSpecError(f"{where}: model {row['model']!r} in a sweep of another model; keep one model per file")
        batch = integer(row, "batch", where, least=0)
        if batch == 0:
            continue
        for column in ("mean_ms", "min_ms", "max_ms"):
            positive_number(row, column, where)
        gamma = integer(row, "gamma", where, least=0)
        _check_gamma(kind, gamma, where)
        timing = Timing(kind, batch, integer(row, "seq", where, least=1), gamma, positive_number(row, "median_ms", where) / 1000)
        _add_once(timings, (kind, *timing.point), timing, where)
    identity = (next(iter(models)), None, None, None, False)
    return identity, list(timings.values())


def _own_rows(text: str, path: str | Path) -> list[SweepRow]:
    header = read_header(text, path)
    if _is_published(header):
        raise SelfSpecError(f"{path}: is a published sweep; name one that `python -m calib.sweep` wrote")
    check_header(header, OWN_COLUMNS, path)
    rows: dict[tuple, SweepRow] = {}
    for where, cells in read_lines(text, path):
        row = _own_row(cells, where)
        first = next(iter(rows.values()), row)
        for column in IDENTITY_COLUMNS:
            if getattr(row, column) != getattr(first, column):
                raise SelfSpecError(
                    f"{where}: {column} {getattr(row, column)!r} in a sweep of {getattr(first, column)!r}; "
                    "keep one machine, model and drafter per file"
                )
        _add_once(rows, (row.batch, row.context, row.gamma), row, where)
    return list(rows.values())


def _own_row(cells: Cells, where: str) -> SweepRow:
    prompts = cells["prompts"]
    if prompts not in PROMPTS:
        raise SelfSpecError(f"{where}: unknown prompts {prompts!r}; they are {' or '.join(PROMPTS)}")
    gamma = integer(cells, "gamma", where, least=0)
    times = {column: positive_number(cells, column, where) if cells[column] else None for column in KIND_COLUMNS.values()}
    for kind in DRAFTING_KINDS:
        if times[KIND_COLUMNS[kind]] is not None:
            _check_gamma(kind, gamma, where)
    if all(seconds is None for seconds in times.values()):
        raise SelfSpecError(f"{where}: no time in it; measure the point or delete the line")
    return SweepRow(
        device=text_of(cells, "device", where),
        model=text_of(cells, "model", where),
        quant=text_of(cells, "quant", where),
        tensor_parallel_size=integer(cells, "tensor_parallel_size", where, least=1),
        vllm=text_of(cells, "vllm", where),
        prompts=prompts,
        logprobs=integer(cells, "logprobs", where, least=0),
        batch=integer(cells, "batch", where, least=1),
        context=integer(cells, "context", where, least=1),
        gamma=gamma,
        **times,
        cycle_spread=number(cells, "cycle_spread", where) if cells["cycle_spread"] else None,
        num_cycles=integer(cells, "num_cycles", where, least=1) if cells["num_cycles"] else None,
    )


def _own_timings(rows: Sequence[SweepRow]) -> list[Timing]:
    targets: dict[tuple[int, int], list[float]] = {}
    timings = []
    for row in rows:
        for kind, column in KIND_COLUMNS.items():
            seconds = getattr(row, column)
            if seconds is None:
                continue
            if kind == "target":
                targets.setdefault((row.batch, row.context), []).append(seconds)
            else:
                timings.append(Timing(kind, row.batch, row.context, row.gamma, seconds))
    return [Timing("target", *cell, 0, statistics.median(seconds)) for cell, seconds in targets.items()] + timings


def _add_once(found: dict, key: tuple, item, where: str) -> None:
    if key in found:
        raise SelfSpecError(f"{where}: {' '.join(map(str, key))} is given twice; delete one of the lines")
    found[key] = item


def _check_gamma(kind: str, gamma: int, where: str) -> None:
    if kind == "target" and gamma != 0:
        raise SelfSpecError(f"{where}: a plain decode step at gamma {gamma}; it has gamma 0")
    if kind in DRAFTING_KINDS and gamma == 0:
        raise SelfSpecError(f"{where}: a {kind} time at gamma 0; nothing is drafted there, give gamma 1 or more")
