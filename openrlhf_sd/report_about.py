"""The rows of the comparison report that say where each arm was made and with what settings, as plain text cells."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from openrlhf_sd.report_arms import Arm
from openrlhf_sd.report_cells import MISSING, text
from openrlhf_sd.report_differences import shown
from openrlhf_sd.run_records import RunRecords

Section = tuple[str, list[tuple[str, list[str]]]]
"""A heading, and rows of (name, one cell per arm)."""


def run_sections(arms: list[Arm]) -> list[Section]:
    """Machine, versions, speculation settings, OpenRLHF flags. Where an arm's runs differ, every value in the order of the runs."""

    def row(name: str, value: Callable[[RunRecords], Any]) -> tuple[str, list[str]]:
        return name, [_cell([value(run) for run in arm.runs]) for arm in arms]

    def provenance(key: str) -> Callable[[RunRecords], Any]:
        return lambda run: (run.provenance or {}).get(key)

    def machine(key: str) -> Callable[[RunRecords], Any]:
        return lambda run: (run.provenance or {}).get("machine", {}).get(key)

    def version(name: str) -> Callable[[RunRecords], Any]:
        return lambda run: (run.provenance or {}).get("packages", {}).get(name)

    def self_spec(key: str) -> Callable[[RunRecords], Any]:
        return lambda run: "–" if run.config["self_spec"] is None else run.config["self_spec"].get(key)

    def flag(name: str) -> Callable[[RunRecords], Any]:
        return lambda run: shown(run.config["openrlhf"], name)

    runs = [run for arm in arms for run in arm.runs]
    versions = sorted({name for run in runs for name in (run.provenance or {}).get("packages", {})})
    keys = sorted({key for run in runs for key in run.config["self_spec"] or {}})
    flags = sorted({name for run in runs for name in run.config["openrlhf"]})
    return [
        (
            "Machine",
            [
                row("CPU", machine("cpu_model")),
                row("CPU cores", machine("num_cpus")),
                row("memory", lambda run: _gib(machine("memory_bytes")(run))),
                row("GPUs", lambda run: _joined(machine("gpus")(run))),
                row("platform", machine("platform")),
                row("git", provenance("git_sha")),
                row("started", lambda run: _utc(provenance("started_unix_s")(run))),
                row("status", provenance("status")),
                row("folder", lambda run: run.run_dir),
            ],
        ),
        ("Versions", [row(name, version(name)) for name in versions]),
        ("Speculation settings", [row(key, self_spec(key)) for key in keys]),
        ("OpenRLHF flags", [row(f"--{name}", flag(name)) for name in flags]),
    ]


def _cell(values: list[Any]) -> str:
    shown_values = [MISSING if value is None else text(value) for value in values]
    return shown_values[0] if len(set(shown_values)) == 1 else " · ".join(shown_values)


def _gib(num_bytes: Any) -> str | None:
    return f"{num_bytes / 2**30:.0f} GiB" if isinstance(num_bytes, (int, float)) else None


def _joined(names: Any) -> str | None:
    return (", ".join(map(str, names)) or "none") if isinstance(names, list) else None


def _utc(unix_s: Any) -> str | None:
    try:
        return datetime.fromtimestamp(unix_s, UTC).strftime("%Y-%m-%d %H:%M UTC")
    except (TypeError, ValueError, OverflowError, OSError):  # a damaged record
        return None
