"""Timings that cannot be what their row says, found without a model.

The published sweeps hold some: near the engine's length limit requests end, or their drafts are masked, while a point is being timed.

The rule. Take the timings of one kind at one batch and gamma in order of context. Attention makes a step's time a straight line in the
context, so a timing is contaminated when it lies more than 8% from the least-squares line through the shorter contexts that are not,
or more than 5% below the last of them. The line needs two points; for target and verify steps under identical prompts only contexts from
512 count, as vLLM's cascade attention begins between 256 and 512 and bends the line there.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from calib.sweep_csv import Timing

MAX_DEPARTURE = 0.08
MAX_FALL = 0.05
CASCADE_FREE_CONTEXT = 512


def contaminated(timings: Iterable[Timing], distinct_prompts: bool = False) -> set[Timing]:
    """Those of `timings` that the rule finds."""
    rows: dict[tuple[str, int, int], list[Timing]] = {}
    for timing in timings:
        rows.setdefault((timing.kind, timing.batch, timing.gamma), []).append(timing)
    found: set[Timing] = set()
    for (kind, _, _), row in rows.items():
        first_context = 0 if distinct_prompts or kind == "draft" else CASCADE_FREE_CONTEXT
        found.update(_contaminated_of_row(sorted(row, key=lambda timing: timing.context), first_context))
    return found


def _contaminated_of_row(row: list[Timing], first_context: int) -> list[Timing]:
    trusted: list[Timing] = []
    found: list[Timing] = []
    for timing in row:
        line = [earlier for earlier in trusted if earlier.context >= first_context]
        fell = bool(trusted) and timing.seconds < (1 - MAX_FALL) * trusted[-1].seconds
        departed = len(line) >= 2 and abs(timing.seconds / _line_at(line, timing.context) - 1) > MAX_DEPARTURE
        (found if fell or departed else trusted).append(timing)
    return found


def _line_at(points: list[Timing], context: int) -> float:
    slope, at_zero = np.polyfit([point.context for point in points], [point.seconds for point in points], 1)
    return slope * context + at_zero
