"""The report's figures inside a rollout: γ against active batch over time, and seconds per token against active batch."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

import numpy as np

from openrlhf_sd.report_arms import Arm
from openrlhf_sd.report_figure import Plot, finish, legend_text, look, new_figure
from openrlhf_sd.report_lengths import BATCH_STEPS, SECONDS, STEPS, TOKENS, sums_by_batch
from openrlhf_sd.report_summary import speculated_share, timed_steps
from openrlhf_sd.run_records import RunRecords
from openrlhf_sd.run_rollouts import EngineRollout
from openrlhf_sd.step_ledger import Segment

ON_COLOUR = "#56B4E9"


@dataclass(frozen=True)
class ChosenRollout:
    run: RunRecords
    step: int
    engine: EngineRollout
    why: str


def timeline_plots(arms: list[Arm], num_warmup_steps: int) -> list[Plot]:
    """Two rollouts of every speculating arm that recorded timelines."""
    return [
        _timeline_plot(arm.label, index, chosen)
        for index, arm in enumerate(arms)
        if arm.mode != "vanilla"
        for chosen in choose_rollouts(arm, num_warmup_steps)
    ]


def choose_rollouts(arm: Arm, num_warmup_steps: int) -> list[ChosenRollout]:
    """The rollout of median seconds over all the arm's runs (the lower of two), and the last of its first run with timelines;
    of each the slowest engine. One where the two are the same; none without timelines."""
    found = []
    for run in arm.runs:
        for step in timed_steps(run, num_warmup_steps):
            engines = [e for e in run.rollouts[step].engines if _seconds(e) > 0] if step in run.rollouts else []
            if engines:
                found.append((run, step, max(engines, key=_seconds)))
    if not found:
        return []
    by_seconds = sorted(found, key=lambda item: _seconds(item[2]))
    median = by_seconds[(len(by_seconds) - 1) // 2]
    last = [item for item in found if item[0] is found[0][0]][-1]
    if median is last:
        return [ChosenRollout(*median, "rollout of median time, and the last")]
    return [ChosenRollout(*median, "rollout of median time"), ChosenRollout(*last, "last rollout")]


def _seconds(engine: EngineRollout) -> float:
    return sum(segment.seconds for segment in engine.timeline or ())


def _timeline_plot(label: str, index: int, chosen: ChosenRollout) -> Plot:
    from matplotlib.ticker import MaxNLocator

    timeline = chosen.engine.timeline
    ends = list(accumulate(segment.seconds for segment in timeline))
    starts = [0.0, *ends[:-1]]
    colour = look(index)["color"]
    figure, (upper, lower) = new_figure(num_rows=2)
    for axes in (upper, lower):
        label_once = "speculating"
        for start, end, segment in zip(starts, ends, timeline):
            if segment.gamma and end > start:
                axes.axvspan(start, end, color=ON_COLOUR, alpha=0.25, linewidth=0, label=label_once)
                label_once = None
    decoding = [(start, end, segment) for start, end, segment in zip(starts, ends, timeline) if _batches(segment)]
    upper.plot(
        [t for start, end, _ in decoding for t in (start, end)],
        [batch for _, _, segment in decoding for batch in _batches(segment)],
        color="#000000",
        label="active batch",
    )
    upper.set_yscale("log", base=2)
    upper.yaxis.set_major_formatter("{x:.0f}")
    upper.set_ylim(bottom=0.8)
    upper.set_ylabel("requests decoding")
    lower.step([*starts, ends[-1]], [s.gamma for s in (*timeline, timeline[-1])], where="post", color=colour, label="γ")
    lower.set_ylim(0, max(1, *(segment.gamma for segment in timeline)) * 1.1)
    lower.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=5))
    lower.set_ylabel("γ [draft tokens]")
    lower.set_xlabel("time in the rollout [s]")
    share = speculated_share(list(timeline), "seconds")
    caption = (
        f"Run {chosen.run.run_dir.name}, training step {chosen.step}, engine {chosen.engine.engine} (the slowest). "
        f"Blue: steps that draft, {100 * share:.0f}% of the time. "
        "The batch is drawn straight between the first and the last step of each recorded stretch."
    )
    return finish(figure, upper, f"γ and active batch in the {chosen.why}: {label}", caption)


def _batches(segment: Segment) -> tuple[int, ...]:
    """Of the first and the last step; none where only prompts were computed, which a log scale could not show."""
    return (segment.first_batch, segment.last_batch) if min(segment.first_batch, segment.last_batch) > 0 else ()


def seconds_by_batch(arms: list[Arm], num_warmup_steps: int) -> Plot | None:
    """None where no arm recorded a timeline."""
    curves = [(index, arm, _curve(arm, num_warmup_steps)) for index, arm in enumerate(arms)]
    from matplotlib.ticker import LogLocator

    drawn = [(index, arm, curve) for index, arm, curve in curves if curve]
    if not drawn:
        return None
    figure, (axes,) = new_figure()
    for index, arm, curve in drawn:
        axes.plot([batch for batch, _ in curve], [1000 * s for _, s in curve], label=legend_text(arm.label), **look(index))
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.xaxis.set_major_formatter("{x:.0f}")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("")
    axes.set_xlabel("active batch [requests decoding on an engine]")
    axes.set_ylabel("engine time per token [ms]")
    caption = "All counted rollouts, ramp-up left out, in bins of batch that double, each at its mean batch."
    if lacking := [arm.label for _, arm, curve in curves if not curve]:
        caption += f" Missing, because no timeline was recorded: {', '.join(lacking)}."
    return finish(figure, axes, "Engine time per token against active batch", caption)


def _curve(arm: Arm, num_warmup_steps: int) -> list[tuple[float, float]]:
    """(mean active batch, seconds per token) of each bin with tokens."""
    sums = sum(
        (
            sums_by_batch([e.timeline for e in run.rollouts[step].engines if e.timeline])
            for run in arm.runs
            for step in timed_steps(run, num_warmup_steps)
            if step in run.rollouts
        ),
        np.zeros(1),
    )
    if sums.ndim == 1:
        return []
    return [(row[BATCH_STEPS] / row[STEPS], row[SECONDS] / row[TOKENS]) for row in sums if row[TOKENS] > 0]
