"""Numbers as text: one home for how terminal, Markdown, HTML and the live view write a value."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from openrlhf_sd.config import printable
from openrlhf_sd.report_bootstrap import Estimate
from openrlhf_sd.report_lengths import LengthControlled
from openrlhf_sd.report_summary import Progress, Spread

MISSING = "missing"


def text(value: Any) -> str:
    """One printable line: terminal escapes and line breaks of a hostile name become '?'."""
    return printable(str(value)).replace("\n", "?")


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


def plain(value: float | None, unit: str = "") -> str:
    return MISSING if value is None else number(value) + unit


def percent(value: float | None) -> str:
    return MISSING if value is None else f"{100 * value:.1f}%"


def total(spread: Spread | None, num_runs: int) -> str:
    if spread is None:
        return MISSING
    return f"{number(spread.total)} s in {spread.n}" + (f" of {num_runs} runs" if num_runs > 1 else "")


def median(spread: Spread | None, unit: str = " s", scale: float = 1.0, show: Callable[[float], str] = number) -> str:
    if spread is None:
        return MISSING
    middle, p25, p75 = (show(value * scale) for value in (spread.median, spread.p25, spread.p75))
    return f"{middle}{unit}" if p25 == p75 else f"{middle}{unit} [{p25}, {p75}]"


def each(values: list[float | None], unit: str = " s") -> str:
    """One value per run."""
    return " · ".join(plain(value) for value in values) + unit if any(value is not None for value in values) else MISSING


def quarters(progress: Progress | None) -> str:
    return MISSING if progress is None else f"{number(progress.first_quarter)} → {number(progress.last_quarter)}"


def ends(progress: Progress | None) -> str:
    return MISSING if progress is None else f"{number(progress.first)} → {number(progress.last)}"


COUNT = "{:.0f}".format
RATIO = "{:.3f}".format  # two digits would show an interval ending at 0.996 as touching 1
DIFFERENCE = "{:+.3f}".format


def ratio(estimate: Estimate) -> str:
    return _estimate(estimate, RATIO, "×")


def difference(estimate: Estimate) -> str:
    return _estimate(estimate, DIFFERENCE, "")


def controlled(found: LengthControlled) -> str:
    """Never without its method."""
    return f"{MISSING}: {found.explanation}" if found.method is None else f"{ratio(found.estimate)}; {found.explanation}"


def _estimate(estimate: Estimate, show: Callable[[float], str], unit: str) -> str:
    if estimate.value is None:
        return MISSING
    return f"{with_interval(estimate, show, unit)}: {estimate.verdict}{between_runs(estimate, show, unit)}"


def with_interval(estimate: Estimate, show: Callable[[float], str], unit: str) -> str:
    interval = "" if estimate.low is None else f" [{show(estimate.low)}, {show(estimate.high)}]"
    return f"{show(estimate.value)}{unit}{interval}"


def between_runs(estimate: Estimate, show: Callable[[float], str], unit: str) -> str:
    """The run-to-run spread, where there is more than one pair of runs."""
    if len(estimate.by_pair) < 2:
        return ""
    return f"; run to run {show(min(estimate.by_pair))} to {show(max(estimate.by_pair))}{unit}"
