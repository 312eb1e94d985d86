"""The rows and sentences of the comparison report, as plain text cells: one home for terminal, Markdown and HTML."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime, timezone
from typing import Any

from openrlhf_sd.report_differences import shown
from openrlhf_sd.report_stats import ArmSummary, Comparison, Estimate, Progress, Spread, Versus
from openrlhf_sd.run_records import RunRecords

MISSING = "missing"

Section = tuple[str, list[tuple[str, list[str]]]]
"""A heading, and rows of (name, one cell per run)."""


def text(value: Any) -> str:
    """One printable line: terminal escapes and line breaks of a hostile name become '?'."""
    return "".join(char if char.isprintable() else "?" for char in str(value))


def number(value: float) -> str:
    """Three significant digits, no exponent where a reader can do without."""
    size = abs(value)
    if size >= 100:
        return f"{value:,.0f}"
    if size >= 10:
        return f"{value:.1f}"
    if size >= 1:
        return f"{value:.2f}"
    return f"{value:.3g}" if size >= 1e-3 or size == 0 else f"{value:.2e}"


def _total(spread: Spread | None, unit: str = " s") -> str:
    return MISSING if spread is None else f"{number(spread.total)}{unit} in {spread.n}"


def _median(spread: Spread | None, unit: str = " s", scale: float = 1.0) -> str:
    if spread is None:
        return MISSING
    median, p25, p75 = (number(value * scale) for value in (spread.median, spread.p25, spread.p75))
    return f"{median}{unit}" if p25 == p75 else f"{median}{unit} [{p25}, {p75}]"


def _quarters(progress: Progress | None) -> str:
    return MISSING if progress is None else f"{number(progress.first_quarter)} → {number(progress.last_quarter)}"


def _ends(progress: Progress | None) -> str:
    return MISSING if progress is None else f"{number(progress.first)} → {number(progress.last)}"


def _plain(value: float | None) -> str:
    return MISSING if value is None else number(value)


def _percent(value: float | None) -> str:
    return MISSING if value is None else f"{100 * value:.1f}%"


def _positions(arm: ArmSummary) -> str:
    return " ".join(_percent(rate) for rate in arm.acceptance_rate_by_pos) or MISSING


def _drafted(cell: Callable[[ArmSummary], str]) -> Callable[[ArmSummary], str]:
    """A vanilla run does not lack its acceptance, it has none."""
    return lambda arm: "–" if arm.arm == "vanilla" else cell(arm)


RATIO = "{:.3f}".format  # two digits would show an interval ending at 0.996 as touching 1


def ratio(estimate: Estimate) -> str:
    return _estimate(estimate, RATIO, "×")


def difference(estimate: Estimate) -> str:
    return _estimate(estimate, "{:+.3f}".format, "")


def _estimate(estimate: Estimate, show: Callable[[float], str], unit: str) -> str:
    return MISSING if estimate.value is None else f"{with_interval(estimate, show, unit)}: {estimate.verdict}"


def with_interval(estimate: Estimate, show: Callable[[float], str], unit: str) -> str:
    interval = "" if estimate.low is None else f" [{show(estimate.low)}, {show(estimate.high)}]"
    return f"{show(estimate.value)}{unit}{interval}"


def summary_sections(comparison: Comparison) -> list[Section]:
    """The table of the terminal, report.md and report.html; with a baseline its first section holds the comparisons."""
    arms = comparison.arms

    def row(name: str, cell: Callable[[ArmSummary], str]) -> tuple[str, list[str]]:
        return name, [cell(arm) for arm in arms]

    times = [
        row("steps logged", lambda a: str(a.num_steps)),
        row("rollout, sum", lambda a: _total(a.rollout_s)),
        row("rollout per step", lambda a: _median(a.rollout_s)),
        row("whole step, sum", lambda a: _total(a.step_s)),
        row("whole step per step", lambda a: _median(a.step_s)),
        row("weight sync per step", lambda a: _median(a.broadcast_s)),
        row("… as the engine saw it", lambda a: _median(a.weight_sync_s)),
        row("re-quantize per sync", _drafted(lambda a: _median(a.requantize_s))),
        row("generated tokens/s", lambda a: _plain(a.tokens_per_s)),
        row("rollout per 1000 tokens", lambda a: _median(a.s_per_token, scale=1000)),
        row(
            "left out as warm-up",
            lambda a: " ".join(number(s) for s in a.warmup_rollout_s) + " s" if a.warmup_rollout_s else "–",
        ),
    ]
    drafting = [
        row("γ, draft tokens", _drafted(lambda a: _median(a.gamma, unit=""))),
        row("acceptance rate, by tokens", _drafted(lambda a: _percent(a.acceptance_rate))),
        row("mean acceptance length", _drafted(lambda a: _plain(a.mean_acceptance_length))),
        row("acceptance by position", _drafted(_positions)),
    ]
    learning = [
        row("reward, first → last quarter", lambda a: _quarters(a.reward)),
        row("reward, first → last step", lambda a: _ends(a.reward)),
        row("length, first → last quarter", lambda a: _quarters(a.response_length)),
        row(
            "truncated responses", lambda a: MISSING if a.truncated_rate is None else _percent(a.truncated_rate.median)
        ),
        row("vllm_kl", lambda a: _median(a.vllm_kl, unit="")),
    ]
    sections = [("Time", times), ("Speculation", drafting), ("Learning", learning)]
    if comparison.baseline is not None:
        by_label = {versus.label: versus for versus in comparison.versus}

        def against(name: str, cell: Callable[[Versus], str]) -> tuple[str, list[str]]:
            return name, [cell(by_label[a.label]) if a.label in by_label else "baseline" for a in arms]

        sections.insert(
            0,
            (
                f"Against {comparison.baseline} (above 1 is faster)",
                [
                    against("rollout speed-up", lambda v: ratio(v.rollout_speedup)),
                    against("… per generated token", lambda v: ratio(v.per_token_speedup)),
                    against("whole-step speed-up", lambda v: ratio(v.step_speedup)),
                    against("reward difference", lambda v: difference(v.reward_difference)),
                ],
            ),
        )
    return sections


def reading_notes(comparison: Comparison) -> list[str]:
    """How to read the numbers; the same sentences in every output."""
    return [
        f"Warm-up: the first {comparison.num_warmup_steps} step(s) of each run (start-up and compilation) are excluded "
        "from all times, throughput and speed-ups. Reward, length, acceptance and vllm_kl use all steps.",
        "Rollout and whole-step times are OpenRLHF's own trainer clock, the same code in every run. A whole step is "
        "rollout, making experience, training and weight sync (upstream's wall clock with asynchronous training); "
        "evaluation and checkpoints are not in it. Token counts, acceptance and re-quantize times are the engine's own "
        "records.",
        "Cells read median [25th, 75th percentile] over steps. A speed-up is the ratio of medians over the steps both "
        "runs logged, in brackets its 95% bootstrap interval; below 1 the run is slower. The reward difference is the "
        "run minus the baseline, means over the last half of the common steps.",
        "Two runs may write answers of different length: read wall times next to the time per generated token.",
        "The intervals cover the spread between steps of these runs, taken as independent, which they are not quite; "
        "they say nothing about how another seed or another day would turn out, and runs made one after the other are "
        "compared together with whatever the machine did meanwhile: a speed is shown only by runs repeated in turns. "
        '"No difference detected" means only that: at this number of steps none could be told from noise.',
    ]


def run_sections(runs: list[RunRecords], comparison: Comparison) -> list[Section]:
    """Where each run was made and with what settings."""
    provenances = [run.provenance or {} for run in runs]
    machines = [provenance.get("machine", {}) for provenance in provenances]
    packages = [provenance.get("packages", {}) for provenance in provenances]

    def row(name: str, values: list[Any]) -> tuple[str, list[str]]:
        return name, [MISSING if value is None else text(value) for value in values]

    machine = [
        row("CPU", [m.get("cpu_model") for m in machines]),
        row("CPU cores", [m.get("num_cpus") for m in machines]),
        row("memory", [_gib(m.get("memory_bytes")) for m in machines]),
        row("GPUs", [_joined(m.get("gpus")) for m in machines]),
        row("platform", [m.get("platform") for m in machines]),
        row("git", [p.get("git_sha") for p in provenances]),
        row("started", [_utc(p.get("started_unix_s")) for p in provenances]),
        row("status", [p.get("status") for p in provenances]),
        row("folder", [run.run_dir for run in runs]),
    ]
    names = sorted({name for found in packages for name in found})
    versions = [row(name, [found.get(name) for found in packages]) for name in names]
    keys = sorted({key for run in runs for key in run.config["self_spec"] or {}})
    self_spec = [
        row(key, ["–" if run.config["self_spec"] is None else run.config["self_spec"].get(key) for run in runs])
        for key in keys
    ]
    flags = sorted({flag for run in runs for flag in run.config["openrlhf"]})
    openrlhf = [row(f"--{flag}", [shown(run.config["openrlhf"], flag) for run in runs]) for flag in flags]
    return [
        ("Machine", machine),
        ("Versions", versions),
        ("Speculation settings", self_spec),
        ("OpenRLHF flags", openrlhf),
    ]


def _gib(num_bytes: Any) -> str | None:
    return f"{num_bytes / 2**30:.0f} GiB" if isinstance(num_bytes, (int, float)) else None


def _joined(names: Any) -> str | None:
    return (", ".join(map(str, names)) or "none") if isinstance(names, list) else None


def _utc(unix_s: Any) -> str | None:
    if not isinstance(unix_s, (int, float)):
        return None
    return datetime.fromtimestamp(unix_s, timezone.utc).strftime("%Y-%m-%d %H:%M UTC")


def all_warnings(comparison: Comparison) -> list[str]:
    return comparison.warnings + [f"{arm.label}: {note}" for arm in comparison.arms for note in arm.notes]
