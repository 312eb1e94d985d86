"""The report's figures over training steps, and the list of all figures."""

from __future__ import annotations

from openrlhf_sd.report_arms import Arm
from openrlhf_sd.report_figure import STYLE, Plot, finish, legend_text, look, new_figure, step_axis
from openrlhf_sd.report_stats import Comparison
from openrlhf_sd.report_summary import timed_steps
from openrlhf_sd.report_timelines import seconds_by_batch, timeline_plots
from openrlhf_sd.run_records import RESPONSE_LENGTH, REWARD, ROLLOUT_S

OFF_SCALE = 1.5  # a warm-up step this many times above every other would flatten the rest of the curve


def draw_plots(arms: list[Arm], comparison: Comparison) -> list[Plot]:
    """Every figure that has data. Each run is one line, in its arm's colour."""
    import matplotlib

    with matplotlib.rc_context(STYLE):
        plots = [
            _rollout_seconds(arms, comparison.num_warmup_steps),
            seconds_by_batch(arms, comparison.num_warmup_steps),
            *timeline_plots(arms, comparison.num_warmup_steps),
            _acceptance_and_gamma(arms),
            _acceptance_by_position(comparison),
            _per_step(arms, REWARD, "Reward per step", "mean reward", "Mean reward of the step's responses."),
            _per_step(arms, RESPONSE_LENGTH, "Response length per step", "mean length [tokens]",
                      "Mean response length. Wall times compare fairly only where these agree; see the length-controlled "
                      "speed-up."),
        ]  # fmt: skip
    return [plot for plot in plots if plot is not None]


def _once(arm: Arm, number: int) -> str | None:
    """An arm's replicates share one entry of the legend."""
    return legend_text(arm.label) if number == 0 else None


def _per_step(arms: list[Arm], tag: str, title: str, unit: str, caption: str) -> Plot | None:
    if not any(run.scalar(tag) for arm in arms for run in arm.runs):
        return None
    figure, (axes,) = new_figure()
    for index, arm in enumerate(arms):
        for number, run in enumerate(run for run in arm.runs if run.scalar(tag)):
            series = run.scalar(tag)
            axes.plot(list(series), list(series.values()), label=_once(arm, number), **look(index))
    axes.set_ylabel(unit)
    step_axis(axes, "training step")
    return finish(figure, axes, title, caption)


def _rollout_seconds(arms: list[Arm], num_warmup_steps: int) -> Plot | None:
    if not any(run.scalar(ROLLOUT_S) for arm in arms for run in arm.runs):
        return None
    figure, (axes,) = new_figure()
    top, warmup_top = 0.0, 0.0
    for index, arm in enumerate(arms):
        for number, run in enumerate(run for run in arm.runs if run.scalar(ROLLOUT_S)):
            timed = set(timed_steps(run, num_warmup_steps))
            counted = {step: s for step, s in run.scalar(ROLLOUT_S).items() if step in timed}
            warmup = {step: s for step, s in run.scalar(ROLLOUT_S).items() if step not in timed}
            axes.plot(list(counted), list(counted.values()), label=_once(arm, number), **look(index))
            axes.plot(list(warmup), list(warmup.values()), **{**look(index), "linestyle": "none"}, markerfacecolor="white")
            top, warmup_top = max([top, *counted.values()]), max([warmup_top, *warmup.values()])
    caption = "Seconds of each rollout by OpenRLHF's trainer clock."
    if num_warmup_steps:
        caption += f" Hollow: the first {num_warmup_steps} step(s) of each run, warm-up, left out of all times."
    if warmup_top > OFF_SCALE * top > 0:
        caption += f" Some of those lie above the scale (up to {warmup_top:.1f} s)."
        axes.set_ylim(0, top * 1.08)
    else:
        axes.set_ylim(0, max(top, warmup_top) * 1.08)
    axes.set_ylabel("rollout time [s]")
    step_axis(axes, "training step")
    return finish(figure, axes, "Rollout time per step", caption)


def _acceptance_and_gamma(arms: list[Arm]) -> Plot | None:
    if not any(totals.gamma is not None for arm in arms for run in arm.runs for totals in run.rollouts.values()):
        return None
    figure, (upper, lower) = new_figure(num_rows=2)
    for index, arm in enumerate(arms):
        drafting = [run for run in arm.runs if any(t.gamma is not None for t in run.rollouts.values())]
        for number, run in enumerate(drafting):
            gamma = {step: t.gamma for step, t in run.rollouts.items() if t.gamma is not None}
            rate = {step: t.acceptance_rate for step, t in run.rollouts.items() if t.acceptance_rate is not None}
            upper.plot(list(rate), list(rate.values()), label=_once(arm, number), **look(index))
            lower.step(list(gamma), list(gamma.values()), where="mid", **look(index))
    upper.set_ylabel("accepted /\ndrafted tokens")
    lower.set_ylabel("γ [draft tokens]")
    lower.set_ylim(bottom=0)
    step_axis(lower, "training step")
    return finish(figure, upper, "Acceptance and γ per rollout", "Pooled over engines; γ is the mean over the steps that drafted.")


def _acceptance_by_position(comparison: Comparison) -> Plot | None:
    drafting = [(index, arm) for index, arm in enumerate(comparison.arms) if any(arm.acceptance_rate_by_pos)]
    if not drafting:
        return None
    figure, (axes,) = new_figure()
    width = 0.8 / len(drafting)
    for slot, (index, arm) in enumerate(drafting):
        bars = [(pos, rate) for pos, rate in enumerate(arm.acceptance_rate_by_pos) if rate is not None]
        places = [pos + 1 + (slot - (len(drafting) - 1) / 2) * width for pos, _ in bars]
        axes.bar(places, [rate for _, rate in bars], width * 0.92, color=look(index)["color"], label=legend_text(arm.label))
    axes.set_ylim(0, 1)
    axes.grid(axis="x", visible=False)
    axes.set_ylabel("accepted / drafts that\nreached the position")
    step_axis(axes, "draft position")
    return finish(figure, axes, "Acceptance by draft position", "A position counts as accepted only if all before it were.")
