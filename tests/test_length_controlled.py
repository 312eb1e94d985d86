"""The length-controlled speed-up, by timelines and by response lengths, worked out by hand."""

import json

import numpy as np
import pytest
from run_folders import FIXED, FLAGS, Page, make_run

from openrlhf_sd import report
from openrlhf_sd.metrics import append_row
from openrlhf_sd.policy.observation import MeasuredStep
from openrlhf_sd.report_arms import group_arms
from openrlhf_sd.report_lengths import NUM_BINS, equal_batch_speedup, equal_work_speedup, sums_by_batch
from openrlhf_sd.report_stats import compare
from openrlhf_sd.run_records import load_run
from openrlhf_sd.step_ledger import Segment, StepLedger


def sums(*bins):
    """(k, tokens, seconds, steps, mean batch) -> the table of sums by batch."""
    table = np.zeros((NUM_BINS, 4))
    for k, tokens, seconds, steps, batch in bins:
        table[k] = tokens, seconds, steps, batch * steps
    return table


def test_bins_are_weighted_by_the_baselines_tokens():
    # Batch 8: baseline 800 tokens in 8 s (0.01 s), run 0.005 s. Batch 1: baseline 200 tokens in 20 s (0.1 s), run 0.1 s.
    base = sums((3, 800, 8.0, 100, 8), (0, 200, 20.0, 200, 1))
    run = sums((3, 100, 0.5, 10, 8), (0, 9000, 900.0, 3000, 1))
    # (800 * 0.01 + 200 * 0.1) / (800 * 0.005 + 200 * 0.1) = 28 / 24, whatever the run's own mix: its wall time is 32 times longer.
    speedup, share = equal_batch_speedup(run, base)
    assert (speedup, share) == (pytest.approx(28 / 24), 1.0)


def test_a_batch_that_only_one_arm_has_is_left_out_and_the_share_says_so():
    base = sums((3, 800, 8.0, 100, 8), (0, 200, 20.0, 200, 1))
    run = sums((3, 100, 0.5, 10, 8), (5, 50, 0.1, 1, 40))
    speedup, share = equal_batch_speedup(run, base)
    assert (speedup, share) == (pytest.approx(2.0), 0.8)
    none, share = equal_batch_speedup(sums((5, 50, 0.1, 1, 40)), base)
    assert np.isnan(none) and share == 0.0


def test_within_a_bin_the_run_is_taken_at_the_baselines_batch():
    # Both arms take 1 s per step at any batch, so at equal batch neither is faster. In the bin 8..15 the baseline sat at 10, the run
    # at 14: 0.1 s against 1/14 s per token. A line through the run's points (5, 1/5) and (14, 1/14) in logarithms gives 1/10 at 10.
    base = sums((3, 100, 10.0, 10, 10))
    run = sums((2, 50, 10.0, 10, 5), (3, 140, 10.0, 10, 14))
    assert equal_batch_speedup(run, base)[0] == pytest.approx(1.0)


def test_a_timeline_goes_into_bins_without_its_ramp_up_and_its_untimed_steps():
    timeline = [
        Segment(0, 0, 1, 0, 0, 0.0, 8),  # only prompts, and no time
        Segment(3, 1, 1, 8, 8, 0.5, 60),  # ramp-up: 8 of 32 decode, the other prompts are computed
        Segment(3, 2, 4, 32, 20, 2.0, 300),  # mean batch 26: bin 16..31, the highest
        Segment(0, 6, 5, 14, 10, 1.0, 60),  # 12: bin 8..15
        Segment(0, 11, 1, 10, 10, 0.0, 10),  # the engine had been idle: no step time
        Segment(3, 12, 2, 9, 9, 0.5, 40),  # bin 8..15
    ]
    table = sums_by_batch([timeline])
    assert table[4].tolist() == [300, 2.0, 4, 26.0 * 4]
    assert table[3].tolist() == [100, 1.5, 7, 12.0 * 5 + 9.0 * 2]
    assert table.sum(axis=0)[0] == 400
    # Engines add up.
    assert sums_by_batch([timeline, timeline])[3, 0] == 200


def plain_rollout(lengths, step_s):
    """What an engine records of a rollout without drafts: seconds and timeline."""
    ledger, seconds, left = StepLedger(None), 0.0, sorted(lengths)
    while left:
        seconds += step_s(len(left))
        ledger.add(MeasuredStep(len(left), 100.0, step_s(len(left)), 0, 0, 0, num_tokens=len(left)))
        left = [length - 1 for length in left if length > 1]
    return seconds, ledger.report()["timeline"]


def test_engines_of_equal_speed_are_equal_by_both_methods_however_long_their_answers(tmp_path):
    random = np.random.default_rng(0)
    arms = []
    for name, mean, with_timelines in (("base", 4.0, True), ("base_without", 4.0, False), ("run", 4.6, True)):
        lengths = [np.maximum(1, random.lognormal(mean, 0.9, size=48).astype(int)).tolist() for _ in range(12)]
        # Steps as on real engines: weights are streamed whatever the batch, and every request adds to it.
        measured = [plain_rollout(of_rollout, lambda batch: 0.01 + 0.0002 * batch) for of_rollout in lengths]
        is_run = name == "run"
        folder = make_run(
            tmp_path / name,
            [seconds for seconds, _ in measured],
            arm="fixed" if is_run else "vanilla",
            self_spec=FIXED if is_run else None,
            lengths=lengths,
            timelines=[timeline for _, timeline in measured] if with_timelines else None,
        )
        arms.append(load_run(folder))
    base, base_without, run = arms
    for baseline, method in ((base, "timelines"), (base_without, "response lengths")):
        (versus,) = compare(group_arms([baseline, run]), 0, 1).versus
        assert versus.length_controlled.method == method
        assert versus.length_controlled.estimate.value == pytest.approx(1.0, abs=0.02)
        # Answers nearly twice as long: by wall time the same engine looks slow.
        assert versus.rollout_speedup.value < 0.8


TWICE_AS_FAST = [[3, 0, 2, 8, 8, 0.4, 80], [3, 2, 4, 2, 2, 0.4, 16]]
PLAIN = [[0, 0, 10, 8, 8, 0.8, 80], [0, 10, 10, 2, 2, 1.0, 20]]


def test_equal_lengths_are_no_requirement_where_both_arms_have_timelines(tmp_path):
    # Plain 0.01 s per token at batch 8 and 0.05 s at batch 2; the run 0.005 s and 0.025 s: twice as fast at either, although it has
    # only 16 tokens in the tail. By wall time (2 s against 1.9 s) there is nothing to see. Batches are exact, so bins are too.
    base = load_run(make_run(tmp_path / "a", [2.0] * 7, timelines=[PLAIN] * 7))
    run = load_run(make_run(tmp_path / "b", [1.9] * 7, arm="fixed", self_spec=FIXED, timelines=[TWICE_AS_FAST] * 7))
    (versus,) = compare(group_arms([base, run]), 0, 1).versus
    found = versus.length_controlled
    assert found.method == "timelines"
    assert found.estimate.value == pytest.approx(2.0)
    assert found.estimate.verdict == "faster (n = 6 steps each)"
    assert found.explanation == "from timelines, at equal active batch; covers 100% of the baseline's tokens"
    by_batch = {(bin.low_batch, bin.high_batch): bin for bin in found.bins}
    assert by_batch[2, 3].baseline_s_per_token == pytest.approx(0.05)
    assert by_batch[8, 15].s_per_token == pytest.approx(0.005)
    assert by_batch[8, 15].baseline_share == pytest.approx(0.8)
    assert versus.rollout_speedup.value == pytest.approx(2.0 / 1.9)


def test_work_is_the_longest_response_and_the_tokens_in_the_baselines_seconds():
    # A plain step of 0.1 + 0.01 * batch seconds: 10 steps and 40 tokens take 1.4 s, 20 and 50 take 2.5 s, 40 and 90 take 4.9 s.
    base = np.array([[10, 40, 1.4], [20, 50, 2.5], [40, 90, 4.9]])
    # The run has a longer tail, 100 steps and 120 tokens: the baseline would need 11.2 s; it took 5.6 s.
    assert equal_work_speedup(np.array([[100, 120, 5.6]]), base) == pytest.approx(2.0)
    # Same lengths: the ratio of the seconds, whatever the fit.
    noisy = base.copy()
    noisy[:, 2] = [3.0, 2.0, 4.0]
    assert equal_work_speedup(base, noisy) == pytest.approx(9.0 / 8.8)


def test_without_a_timeline_in_the_baseline_response_lengths_are_used_and_named(tmp_path):
    # As above, a plain step of 0.1 + 0.01 * batch: lengths (10, 10, 10, 10) take 1.4 s, (20, 30) take 3.5 s; the first step is warm-up.
    base_lengths = [[10] * 4, [10] * 4, [20, 30], [10] * 4, [20, 30], [10] * 4, [20, 30]]
    base_s = [9.0, 1.4, 3.5, 1.4, 3.5, 1.4, 3.5]
    base = load_run(make_run(tmp_path / "a", base_s, lengths=base_lengths))
    # The run's answers are longer, (100, 20): 0.1 * 100 + 0.01 * 120 = 11.2 s of plain decoding in 2.8 s. By wall time it is slower.
    run = make_run(tmp_path / "b", [9.0] + [2.8] * 6, arm="fixed", self_spec=FIXED, lengths=[[100, 20]] * 7, timelines=[TWICE_AS_FAST] * 7)
    (versus,) = compare(group_arms([base, load_run(run)]), 0, 1).versus
    assert versus.length_controlled.method == "response lengths"
    assert versus.length_controlled.explanation == "modelled from response lengths (no timeline in the baseline)"
    assert versus.length_controlled.estimate.value == pytest.approx(4.0)
    assert versus.rollout_speedup.value < 1
    assert report.main([str(tmp_path / "a"), str(run), "--out", str(tmp_path / "out")]) == 0
    page = Page((tmp_path / "out" / "report.html").read_text()).text
    assert "4.000×" in page
    assert "faster (n = 6 steps each); modelled from response lengths (no timeline in the baseline)" in page


def test_without_timelines_and_lengths_it_is_missing_with_the_reason(tmp_path):
    base = load_run(make_run(tmp_path / "a", [2.0] * 7))
    run = load_run(make_run(tmp_path / "b", [1.0] * 7, arm="fixed", self_spec=FIXED, timelines=[TWICE_AS_FAST] * 7))
    (versus,) = compare(group_arms([base, run]), 0, 1).versus
    found = versus.length_controlled
    assert (found.method, found.estimate.value) == (None, None)
    assert found.explanation.startswith("no timeline in the baseline, and too few rollouts with response lengths")
    report.write_report([str(tmp_path / "a"), str(tmp_path / "b")], tmp_path / "out", None, 1)
    assert "| … length-controlled | baseline | missing: no timeline in the baseline" in (tmp_path / "out" / "report.md").read_text()


def test_requests_that_do_not_start_together_are_not_modelled_by_their_lengths(tmp_path):
    flags = {**FLAGS, "train.partial_rollout_enable": True}
    base = load_run(make_run(tmp_path / "a", [2.0] * 7, lengths=[[10, 20]] * 7, flags=flags))
    run = load_run(make_run(tmp_path / "b", [1.0] * 7, arm="fixed", self_spec=FIXED, lengths=[[10, 20]] * 7, flags=flags))
    found = compare(group_arms([base, run]), 0, 1).versus[0].length_controlled
    assert (found.method, found.estimate.value) == (None, None)
    assert found.explanation == (
        "no timeline in the run and the baseline, and with --train.partial_rollout_enable response lengths do not tell the active batch"
    )


def test_timelines_without_a_common_batch_are_missing_too(tmp_path):
    base = load_run(make_run(tmp_path / "a", [2.0] * 3, timelines=[[[0, 0, 9, 64, 64, 1.0, 576]]] * 3))
    run = load_run(make_run(tmp_path / "b", [1.0] * 3, arm="fixed", self_spec=FIXED, timelines=[TWICE_AS_FAST] * 3))
    found = compare(group_arms([base, run]), 0, 1).versus[0].length_controlled
    assert (found.method, found.explanation) == (None, "the timelines of the two arms have no active batch in common")


def test_the_tables_of_page_and_markdown_show_seconds_per_token_by_batch(tmp_path):
    make_run(tmp_path / "a", [2.0] * 7, timelines=[PLAIN] * 7)
    make_run(tmp_path / "b", [1.0] * 7, arm="fixed", self_spec=FIXED, timelines=[TWICE_AS_FAST] * 7)
    report.write_report([str(tmp_path / "a"), str(tmp_path / "b")], tmp_path / "out", None, 1)
    row = "| 8 to 15 active | baseline | 5.00 / 10.0 · 80.0% |"
    assert row in (tmp_path / "out" / "report.md").read_text()
    document = json.loads((tmp_path / "out" / "report.json").read_text())
    assert document["versus"][0]["length_controlled"]["method"] == "timelines"


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"timeline": [[3, 0, 1]]}, "'timeline' of rollout 9 is no list of [gamma, first_step"),
        ({"timeline": [[3, 0, 1, 1, 1, -1.0, 4]]}, "'timeline' of rollout 9"),
        ({"timeline": "long"}, "'timeline' of rollout 9"),
        ({"response_lengths": [1, "two"]}, "'response_lengths' of rollout 9 is no list of whole numbers"),
    ],
)
def test_rows_that_no_run_writes_end_with_one_line_and_code_2(tmp_path, capsys, row, expected):
    folder = make_run(tmp_path / "r", [1.0, 1.0])
    append_row(folder / "metrics.jsonl", {"rollout": 9, "engine": 0, **row})
    assert report.main([str(folder), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert expected in error and error.count("\n") == 1
