"""The rows and sentences of the comparison report, as plain text cells: one home for terminal, Markdown and HTML."""

from __future__ import annotations

from collections.abc import Callable

from openrlhf_sd.report_about import Section
from openrlhf_sd.report_cells import (
    COUNT,
    MISSING,
    controlled,
    difference,
    each,
    ends,
    median,
    number,
    percent,
    plain,
    quarters,
    ratio,
    total,
)
from openrlhf_sd.report_stats import Comparison, Versus
from openrlhf_sd.report_summary import ArmSummary


def _positions(arm: ArmSummary) -> str:
    return " ".join(percent(rate) for rate in arm.acceptance_rate_by_pos) or MISSING


def _runs(arm: ArmSummary) -> str:
    seeds = [str(seed) for seed in arm.seeds if seed is not None]
    return f"{len(arm.run_dirs)} (seed {', '.join(seeds)})" if seeds else str(len(arm.run_dirs))


def _speculating(cell: Callable[[ArmSummary], str]) -> Callable[[ArmSummary], str]:
    """A vanilla run does not lack this, it has none."""
    return lambda arm: "–" if arm.arm == "vanilla" else cell(arm)


def _drafted(cell: Callable[[ArmSummary], str]) -> Callable[[ArmSummary], str]:
    """Nor does an arm lack its acceptance that never drafted."""
    return _speculating(lambda arm: "no drafts" if arm.num_drafts == 0 else cell(arm))


def summary_sections(comparison: Comparison) -> list[Section]:
    """The table of the terminal, report.md and report.html; with a baseline its first section holds the comparisons."""
    arms = comparison.arms

    def row(name: str, cell: Callable[[ArmSummary], str]) -> tuple[str, list[str]]:
        return name, [cell(arm) for arm in arms]

    times = [
        row("runs", _runs),
        row("steps logged", lambda a: " + ".join(map(str, a.num_steps_by_run))),
        row("rollout, sum", lambda a: total(a.rollout_s, len(a.run_dirs))),
        row("rollout per step", lambda a: median(a.rollout_s)),
        row("whole step, sum", lambda a: total(a.step_s, len(a.run_dirs))),
        row("whole step per step", lambda a: median(a.step_s)),
        row("weight sync per step", lambda a: median(a.broadcast_s)),
        row("… as the engine saw it", lambda a: median(a.weight_sync_s)),
        row("re-quantize per sync", _speculating(lambda a: median(a.requantize_s))),
        row("generated tokens/s", lambda a: plain(a.tokens_per_s)),
        row("rollout per 1000 tokens", lambda a: median(a.s_per_token, scale=1000)),
        row(
            "left out as warm-up",
            lambda a: " ".join(number(s) for s in a.warmup_rollout_s) + " s" if a.warmup_rollout_s else "–",
        ),
    ]
    if any(len(arm.run_dirs) > 1 for arm in arms):
        times += [
            row("rollout, median of each run", lambda a: each(a.median_rollout_s_by_run)),
            row("whole step, median of each run", lambda a: each(a.median_step_s_by_run)),
        ]
    drafting = [
        row("γ, draft tokens", _drafted(lambda a: median(a.gamma, unit=""))),
        row("acceptance rate, by tokens", _drafted(lambda a: percent(a.acceptance_rate))),
        row("mean acceptance length", _drafted(lambda a: plain(a.mean_acceptance_length))),
        row("acceptance by position", _drafted(_positions)),
        row("speculated, of engine steps", _speculating(lambda a: percent(a.speculated_share_of_steps))),
        row("speculated, of tokens", _speculating(lambda a: percent(a.speculated_share_of_tokens))),
        row("first speculating step", _drafted(lambda a: median(a.toggle_step, unit="", show=COUNT))),
        row("… requests decoding in it", _drafted(lambda a: median(a.toggle_batch, unit="", show=COUNT))),
        row("predicted speed-up, while on", _drafted(lambda a: median(a.predicted_speedup, unit="×"))),
        row("measured speed-up, while on", _drafted(lambda a: median(a.measured_speedup, unit="×"))),
    ]
    learning = [
        row("reward, first → last quarter", lambda a: quarters(a.reward)),
        row("reward, first → last step", lambda a: ends(a.reward)),
        row("length, first → last quarter", lambda a: quarters(a.response_length)),
        row("truncated responses", lambda a: MISSING if a.truncated_rate is None else percent(a.truncated_rate.median)),
        row("vllm_kl", lambda a: median(a.vllm_kl, unit="")),
    ]
    sections = [("Time", times), ("Speculation", drafting), ("Learning", learning)]
    if batches := _by_batch(comparison):
        sections.insert(1, batches)
    if comparison.baseline is not None:
        sections.insert(0, (f"Against {comparison.baseline} (above 1 is faster)", _against(comparison)))
    return sections


def _against(comparison: Comparison) -> list[tuple[str, list[str]]]:
    by_label = {versus.label: versus for versus in comparison.versus}

    def row(name: str, cell: Callable[[Versus], str]) -> tuple[str, list[str]]:
        return name, [cell(by_label[a.label]) if a.label in by_label else "baseline" for a in comparison.arms]

    return [
        row("rollout speed-up", lambda v: ratio(v.rollout_speedup)),
        row("… per generated token", lambda v: ratio(v.per_token_speedup)),
        row("… length-controlled", lambda v: controlled(v.length_controlled)),
        row("whole-step speed-up", lambda v: ratio(v.step_speedup)),
        row("reward difference", lambda v: difference(v.reward_difference)),
        row("runs compared", paired),
        ("baseline's settings", ["–" if a.label in by_label else comparison.baseline_settings for a in comparison.arms]),
    ]


def paired(versus: Versus) -> str:
    if not versus.by_seed:
        return "no seed in common: all runs against all"
    num_pairs = max(1, len(versus.rollout_speedup.by_pair))
    left_out = f", {versus.num_left_out} run(s) without a partner left out" if versus.num_left_out else ""
    return f"{num_pairs} pair{'s' if num_pairs > 1 else ''} of equal seed{left_out}"


def _by_batch(comparison: Comparison) -> Section | None:
    """None where no arm was compared by timelines."""
    by_label = {versus.label: versus.length_controlled for versus in comparison.versus}
    lows = sorted({bin.low_batch for found in by_label.values() for bin in found.bins})
    if not lows:
        return None

    def cell(label: str, low: int) -> str:
        if label not in by_label:
            return "baseline"
        bin = next((bin for bin in by_label[label].bins if bin.low_batch == low), None)
        if bin is None:
            return MISSING
        own, of_baseline = (MISSING if s is None else number(1000 * s) for s in (bin.s_per_token, bin.baseline_s_per_token))
        return f"{own} / {of_baseline} · {percent(bin.baseline_share)}"

    rows = [
        (f"{low} to {2 * low - 1} active" if low > 1 else "1 active", [cell(arm.label, low) for arm in comparison.arms]) for low in lows
    ]
    return "Engine milliseconds per token by active batch: arm / baseline · share of the baseline's tokens", rows


def reading_notes(comparison: Comparison) -> list[str]:
    """How to read the numbers; the same sentences in every output."""
    return [
        f"Warm-up: the first {comparison.num_warmup_steps} step(s) of each run (start-up and compilation) are excluded "
        "from all times, throughput and speed-ups. Reward, length, acceptance and vllm_kl use all steps.",
        "Rollout and whole-step times are OpenRLHF's own trainer clock, the same code in every run. A whole step is "
        "rollout, making experience, training and weight sync (upstream's wall clock with asynchronous training); "
        "evaluation and checkpoints are not in it. With asynchronous training nothing is said per token: a record of the engines "
        "holds what lies between two weight syncs, which is not what one step trained on. Token counts, acceptance and re-quantize "
        "times are the engine's own records.",
        "Cells read median [25th, 75th percentile] over steps. A speed-up is the ratio of medians over the steps both "
        "runs logged, in brackets its 95% bootstrap interval; below 1 the run is slower. The reward difference is the "
        "run minus the baseline, means over the last half of the common steps; its interval is Student's t over pairs of runs, three "
        "at least: steps of one training follow from each other and say nothing about the next training.",
        "Two arms may write answers of different length, and then wall times do not compare. The length-controlled speed-up "
        "asks how fast the same work was done. From timelines: seconds per token at equal active batch (requests decoding at "
        "once on an engine), in bins that double, weighted by the baseline's tokens; the ramp-up of each rollout and batches that "
        "only one arm has are left out, and the share of the baseline's tokens that remains is given. Where an arm recorded no "
        "timeline it is modelled from response lengths instead, and says so: engine seconds against what the baseline would "
        "have needed for those lengths, if the requests of a rollout all start together and a plain step takes a + b × batch "
        "seconds, fitted to the baseline's rollouts.",
        "Runs that differ only in seed, folders and names are replicates of one arm. Where seeds match, each run is compared "
        "with the baseline's run of its seed: a speed-up is then the geometric mean over the pairs, a reward difference their "
        'mean, and "run to run" gives the lowest and the highest pair.',
        "The intervals cover the spread between steps of these runs, taken as independent, which they are not quite; "
        "they say nothing about how another seed or another day would turn out, and runs made one after the other are "
        "compared together with whatever the machine did meanwhile: a speed is shown only by runs repeated in turns.",
        '"No difference detected" does not mean the same: at this number of steps none could be told from noise. The number '
        "with it, half the width of the interval, is about the smallest difference that would have shown.",
        "Predicted and measured speed-up, while on: the speculating steps alone against plain decoding of the same tokens, by "
        "the calibration and by the rollout's own plain steps; a rollout without plain steps cannot measure it. "
        "Active batch, γ and shares of steps and tokens are the engines' own timelines.",
    ]


def all_warnings(comparison: Comparison) -> list[str]:
    return comparison.warnings + [f"{arm.label}: {note}" for arm in comparison.arms for note in arm.notes]
