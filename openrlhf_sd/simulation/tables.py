"""What a simulation prints: the document of `openrlhf_sd.simulator` as tables."""

from __future__ import annotations

import sys
from typing import Any


def print_tables(document: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console() if sys.stdout.isatty() else Console(width=120)
    table = Table(title="Rollout time saved against plain vLLM: mean over seeds, lowest..highest", title_justify="left")
    for heading in ("policy", "after the first", "first rollout", "steps on", "gamma when on", "length", "extrapolated"):
        table.add_column(heading, justify="left" if heading == "policy" else "right")
    for name, found in document["policies"].items():
        table.add_row(
            name,
            _spread_text(found["reduction_after_first"]),
            _spread_text(found["reduction_first"]),
            f"{found['speculating_share']:.0%}",
            _number_text(found["mean_gamma_when_on"]),
            _number_text(found["mean_acceptance_length"]),
            f"{found['extrapolated_share']:.0%}",
        )
    console.print(table)
    for name, replay in document.get("replay", {}).items():
        heading = f"Replay as {name}" + ("" if replay["ran"] in (name, None) else f" (the run was {replay['ran']})")
        table = Table(title=heading, title_justify="left")
        for column in ("rollout", "predicted s", "engine steps s", "error", "rollout s", "error"):
            table.add_column(column, justify="right")
        for row in replay["rollouts"]:
            table.add_row(
                str(row["rollout"]),
                f"{row['predicted_s']:.3f}",
                _number_text(row["engine_s"], 3),
                _percent_text(row["engine_error"]),
                _number_text(row["measured_s"], 3),
                _percent_text(row["error"]),
            )
        console.print(table)
        for name, key in (
            ("engine steps", "overall_engine_error"),
            ("engine steps after the first rollout, which holds the engine's start", "engine_error_after_first"),
            ("whole rollouts", "overall_error"),
        ):
            console.print(f"predicted against measured, {name}: {_percent_text(replay[key])}")


def _percent_text(value: float | None) -> str:
    return "-" if value is None else f"{value:+.1%}"


def _spread_text(spread: dict[str, Any] | None) -> str:
    return "-" if spread is None else f"{spread['mean']:+.1%} ({spread['low']:+.1%}..{spread['high']:+.1%})"


def _number_text(value: float | None, digits: int = 1) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
