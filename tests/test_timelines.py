"""The figures inside a rollout and the table of how much was speculated."""

import json

import pytest
from run_folders import FIXED, FLAGS, Page, make_run

from openrlhf_sd import report
from openrlhf_sd.metrics import append_row
from openrlhf_sd.report_arms import group_arms
from openrlhf_sd.report_summary import speculated_share, summarize
from openrlhf_sd.report_timelines import choose_rollouts
from openrlhf_sd.run_records import load_run
from openrlhf_sd.step_ledger import Segment

TOGGLE = {**FIXED, "mode": "toggle"}


def timeline(seconds):
    """Off for 8 steps and 80% of the time, then on for 2 steps."""
    return [[0, 0, 8, 16, 9, 0.8 * seconds, 100], [2, 8, 2, 4, 1, 0.2 * seconds, 25]]


def toggled(folder, seconds, flags=FLAGS):
    return make_run(folder, seconds, arm="toggle", self_spec=TOGGLE, flags=flags, timelines=[timeline(s) for s in seconds])


def test_the_rollout_of_median_time_and_the_last_are_chosen(tmp_path):
    # Steps 2..6 take 5, 1, 3, 2, 4 s: the median is step 4, the last step 6. Step 1 is warm-up.
    (arm,) = group_arms([load_run(toggled(tmp_path / "r", [9.0, 5.0, 1.0, 3.0, 2.0, 4.0]))])
    assert [(c.step, c.why) for c in choose_rollouts(arm, 1)] == [(4, "rollout of median time"), (6, "last rollout")]
    # 1, 2, 3, 4, 5, 6 s without warm-up steps: of the two in the middle the quicker, step 3.
    (arm,) = group_arms([load_run(toggled(tmp_path / "s", [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]))])
    assert [c.step for c in choose_rollouts(arm, 0)] == [3, 6]
    (arm,) = group_arms([load_run(toggled(tmp_path / "t", [9.0, 1.0]))])
    assert [(c.step, c.why) for c in choose_rollouts(arm, 1)] == [(2, "rollout of median time, and the last")]


def test_the_slowest_engine_of_a_rollout_is_drawn(tmp_path):
    folder = toggled(tmp_path / "r", [1.0, 1.0])
    append_row(folder / "metrics.jsonl", {"rollout": 1, "engine": 7, "timeline": timeline(2.0)})
    (arm,) = group_arms([load_run(folder)])
    (chosen,) = choose_rollouts(arm, 1)
    assert chosen.engine.engine == 7


def test_shares_of_what_was_speculated_and_where_it_began(tmp_path):
    folder = toggled(tmp_path / "r", [1.0, 1.0])
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    (folder / "metrics.jsonl").unlink()
    for row, predicted in zip(rows, (1.5, 1.25)):
        row |= {"rollout/sd/toggle_step": 8, "rollout/sd/toggle_batch": 4, "rollout/sd/predicted_speedup": predicted}
        append_row(folder / "metrics.jsonl", row | {"rollout/sd/measured_speedup": 1.2})
    arms = group_arms([load_run(folder)])
    summary = summarize(arms[0], 1)
    # 2 of 10 steps and 25 of 125 tokens; predicted 1.5 and 1.25.
    assert (summary.speculated_share_of_steps, summary.speculated_share_of_tokens) == (0.2, 0.2)
    assert (summary.toggle_step.median, summary.toggle_batch.median) == (8.0, 4.0)
    assert (summary.predicted_speedup.median, summary.measured_speedup.median) == (1.375, 1.2)
    report.write_report([str(folder)], tmp_path / "out", None, 1)
    markdown = (tmp_path / "out" / "report.md").read_text()
    for row in (
        "| speculated, of engine steps | 20.0% |",
        "| first speculating step | 8 |",
        "| … requests decoding in it | 4 |",
        "| measured speed-up, while on | 1.20× |",
    ):
        assert row in markdown, row


def test_a_share_of_nothing_is_missing():
    assert speculated_share([], "num_steps") is None
    assert speculated_share([Segment(3, 0, 1, 0, 0, 0.0, 0)], "seconds") is None


@pytest.mark.parametrize("with_vanilla_timeline", [True, False])
def test_the_page_holds_a_figure_per_chosen_rollout_and_one_over_batches(tmp_path, with_vanilla_timeline):
    plain = [[0, 0, 10, 16, 9, 1.0, 125]]
    vanilla = make_run(tmp_path / "v", [1.0] * 4, timelines=[plain] * 4 if with_vanilla_timeline else None)
    folder = toggled(tmp_path / "r", [9.0, 3.0, 1.0, 2.0])
    assert report.main([str(vanilla), str(folder), "--out", str(tmp_path / "out")]) == 0
    page = Page((tmp_path / "out" / "report.html").read_text()).text
    # Of steps 2..4 with 3, 1, 2 s the last is the median.
    assert page.count("γ and active batch in the rollout of median time, and the last: toggle γ=2 w8a8") == 1
    assert "Run r, training step 4, engine 0 (the slowest). Blue: steps that draft, 20% of the time." in page
    assert "Engine time per token against active batch" in page
    assert ("Missing, because no timeline was recorded: vanilla." in page) is not with_vanilla_timeline


def test_a_timeline_without_any_measured_time_draws_nothing_wrong(tmp_path):
    run = make_run(
        tmp_path / "r", [1.0] * 3, arm="toggle", self_spec=TOGGLE, timelines=[[[2, 0, 1, 0, 0, 0.0, 5]], [], [[0, 0, 1, 1, 1, 0.0, 5]]]
    )
    assert report.main([str(run), "--out", str(tmp_path / "out")]) == 0
    assert "γ and active batch" not in Page((tmp_path / "out" / "report.html").read_text()).text
