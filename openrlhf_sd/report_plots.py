"""The report's figures, each as one SVG document (bytes).

Matplotlib is imported inside and used without pyplot: no display, no global state. Arms keep one colour (Okabe-Ito),
marker and dash through all figures, so they stay apart in grey too.
"""

from __future__ import annotations

import io
from dataclasses import dataclass

from openrlhf_sd.report_stats import Comparison, timed_steps
from openrlhf_sd.run_records import RESPONSE_LENGTH, REWARD, ROLLOUT_S, RunRecords

OKABE_ITO = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
"""Okabe and Ito's palette without its yellow, which is too pale for lines on white. Black goes to the first run."""
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
DASHES = ("-", "--", "-.", ":")

SIZE_INCHES = (4.6, 3.2)  # narrow: scaled to a 390 px phone the letters stay readable
LEGEND_LETTERS = 38  # as many as fit beside a line sample in one column
OFF_SCALE = 1.5  # a warm-up step this many times above every other would flatten the rest of the curve

STYLE = {
    "font.size": 10.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.5,
    "lines.markersize": 4,
    "svg.hashsalt": "openrlhf_sd",  # reproducible ids
    "axes.formatter.useoffset": False,
}


@dataclass(frozen=True)
class Plot:
    title: str
    caption: str
    svg: bytes


def draw_plots(runs: list[RunRecords], comparison: Comparison) -> list[Plot]:
    """Every figure that has data."""
    import matplotlib

    labels = [arm.label for arm in comparison.arms]
    with matplotlib.rc_context(STYLE):
        plots = [
            _rollout_seconds(runs, labels, comparison.num_warmup_steps),
            _per_step(runs, labels, REWARD, "Reward per step", "mean reward", "Mean reward of the step's responses."),
            _per_step(runs, labels, RESPONSE_LENGTH, "Response length per step", "mean length [tokens]",
                      "Mean response length. Wall times compare fairly only where these agree; see seconds per token."),
            _acceptance_and_gamma(runs, labels),
            _acceptance_by_position(comparison),
        ]  # fmt: skip
    return [plot for plot in plots if plot is not None]


def _look(index: int) -> dict[str, str]:
    count = len(OKABE_ITO)
    return {
        "color": OKABE_ITO[index % count],
        "marker": MARKERS[index % count],
        "linestyle": DASHES[(index + index // count) % len(DASHES)],
    }


def _legend_text(label: str) -> str:
    """Run folders are named by others: `$` would start matplotlib's math mode, a leading `_` would hide the entry."""
    text = "".join(c if c.isprintable() else "?" for c in label)
    if len(text) > LEGEND_LETTERS:
        text = text[: LEGEND_LETTERS // 2] + "…" + text[-LEGEND_LETTERS // 2 + 1 :]
    return ("…" + text[1:] if text.startswith("_") else text).replace("$", r"\$")


def _figure(num_rows: int = 1):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(SIZE_INCHES[0], SIZE_INCHES[1] * (1.0 if num_rows == 1 else 1.35)), layout="constrained")
    axes = figure.subplots(num_rows, 1, sharex=True, squeeze=False)[:, 0]
    return figure, axes


def _step_axis(axes, name: str) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel(name)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _finish(figure, axes, title: str, caption: str) -> Plot:
    handles, labels = axes.get_legend_handles_labels()
    columns = 2 if len(labels) > 1 and max(map(len, labels)) < LEGEND_LETTERS / 2 else 1
    figure.legend(handles, labels, loc="outside upper center", ncols=columns, frameon=False)  # outside: covers no data
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    return Plot(title, caption, buffer.getvalue())


def _per_step(runs: list[RunRecords], labels: list[str], tag: str, title: str, unit: str, caption: str) -> Plot | None:
    if not any(run.scalar(tag) for run in runs):
        return None
    figure, (axes,) = _figure()
    for index, (run, label) in enumerate(zip(runs, labels)):
        if series := run.scalar(tag):
            axes.plot(list(series), list(series.values()), label=_legend_text(label), **_look(index))
    axes.set_ylabel(unit)
    _step_axis(axes, "training step")
    return _finish(figure, axes, title, caption)


def _rollout_seconds(runs: list[RunRecords], labels: list[str], num_warmup_steps: int) -> Plot | None:
    if not any(run.scalar(ROLLOUT_S) for run in runs):
        return None
    figure, (axes,) = _figure()
    top, warmup_top = 0.0, 0.0
    for index, (run, label) in enumerate(zip(runs, labels)):
        timed, look = set(timed_steps(run, num_warmup_steps)), _look(index)
        counted = {step: s for step, s in run.scalar(ROLLOUT_S).items() if step in timed}
        warmup = {step: s for step, s in run.scalar(ROLLOUT_S).items() if step not in timed}
        if counted:
            axes.plot(list(counted), list(counted.values()), label=_legend_text(label), **look)
        axes.plot(
            list(warmup), list(warmup.values()), **{**look, "linestyle": "none"}, markerfacecolor="white", clip_on=True
        )
        top, warmup_top = max([top, *counted.values()]), max([warmup_top, *warmup.values()])
    caption = "Seconds of each rollout by OpenRLHF's trainer clock."
    if num_warmup_steps:
        caption += f" Hollow: the first {num_warmup_steps} step(s) of each run, warm-up, left out of all times."
    if warmup_top > OFF_SCALE * top:
        caption += f" Some of those lie above the scale (up to {warmup_top:.1f} s)."
        axes.set_ylim(0, top * 1.08)
    else:
        axes.set_ylim(0, max(top, warmup_top) * 1.08)
    axes.set_ylabel("rollout time [s]")
    _step_axis(axes, "training step")
    return _finish(figure, axes, "Rollout time per step", caption)


def _acceptance_and_gamma(runs: list[RunRecords], labels: list[str]) -> Plot | None:
    if not any(totals.gamma is not None for run in runs for totals in run.rollouts.values()):
        return None
    figure, (upper, lower) = _figure(num_rows=2)
    for index, (run, label) in enumerate(zip(runs, labels)):
        gamma = {step - 1: t.gamma for step, t in run.rollouts.items() if t.gamma is not None}
        rate = {
            step - 1: t.num_accepted_tokens / t.num_draft_tokens
            for step, t in run.rollouts.items()
            if t.num_draft_tokens
        }
        if gamma:
            upper.plot(list(rate), list(rate.values()), label=_legend_text(label), **_look(index))
            lower.step(list(gamma), list(gamma.values()), where="mid", **_look(index))
    upper.set_ylabel("accepted /\ndrafted tokens")
    lower.set_ylabel("γ [draft tokens]")
    lower.set_ylim(bottom=0)
    _step_axis(lower, "rollout")
    return _finish(figure, upper, "Acceptance and γ per rollout", "Pooled over engines; γ is the mean over engines.")


def _acceptance_by_position(comparison: Comparison) -> Plot | None:
    drafting = [(index, arm) for index, arm in enumerate(comparison.arms) if any(arm.acceptance_rate_by_pos)]
    if not drafting:
        return None
    figure, (axes,) = _figure()
    width = 0.8 / len(drafting)
    for slot, (index, arm) in enumerate(drafting):
        bars = [(pos, rate) for pos, rate in enumerate(arm.acceptance_rate_by_pos) if rate is not None]
        places = [pos + 1 + (slot - (len(drafting) - 1) / 2) * width for pos, _ in bars]
        axes.bar(
            places, [rate for _, rate in bars], width * 0.92, color=_look(index)["color"], label=_legend_text(arm.label)
        )
    axes.set_ylim(0, 1)
    axes.grid(axis="x", visible=False)
    axes.set_ylabel("accepted / drafts that\nreached the position")
    _step_axis(axes, "draft position")
    return _finish(
        figure, axes, "Acceptance by draft position", "A position counts as accepted only if all before it were."
    )
