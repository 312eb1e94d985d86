"""Runs of one arm as replicates: which are pooled, which are compared with which, and what is said when luck is as large as the claim."""

import json

import pytest
from run_folders import FIXED, FLAGS, Page, make_run, write_description

from openrlhf_sd import report
from openrlhf_sd.report_arms import group_arms, pair_by_seed
from openrlhf_sd.report_stats import compare
from openrlhf_sd.run_records import load_run


def seeded(folder, seed, rollout_s, arm="vanilla", **settings):
    """A run with its own seed and folders, as examples/compare.sh makes them; the first step is warm-up."""
    self_spec = None if arm == "vanilla" else {**FIXED, "mode": arm}
    flags = {**FLAGS, "train.seed": seed, "ckpt.path": f"{folder}/ckpt", "logger.tensorboard_dir": f"{folder}/tb"}
    return make_run(folder, [9.0, *rollout_s], arm=arm, self_spec=self_spec, flags=flags, **settings)


def arms_of(folders):
    return group_arms([load_run(folder) for folder in folders])


def test_runs_that_differ_in_seed_and_folders_only_are_one_arm(tmp_path):
    folders = [
        seeded(tmp_path / "v0", 0, [4.0] * 3),
        seeded(tmp_path / "f0", 0, [2.0] * 3, "fixed"),
        seeded(tmp_path / "v1", 1, [5.0] * 3),
        seeded(tmp_path / "f1", 1, [2.0] * 3, "fixed"),
    ]
    arms = arms_of(folders)
    assert [(arm.label, arm.seeds) for arm in arms] == [("vanilla", [0, 1]), ("fixed γ=2 w8a8", [0, 1])]
    summary = compare(arms, 0, 1).arms[0]
    # 3 steps of 4 s and 3 of 5 s: sum 27 s, median 4.5 s; 600 tokens in 27 s.
    assert (summary.rollout_s.n, summary.rollout_s.total, summary.rollout_s.median) == (6, 27.0, 4.5)
    assert (summary.median_rollout_s_by_run, summary.tokens_per_s) == ([4.0, 5.0], 600 / 27)
    assert (summary.num_steps_by_run, summary.warmup_rollout_s) == ([4, 4], [9.0, 9.0])


def test_a_different_setting_makes_a_different_arm(tmp_path):
    one = seeded(tmp_path / "one", 0, [2.0] * 3, "fixed")
    config = json.loads((one / "config.json").read_text())
    other = make_run(tmp_path / "other", [2.0] * 4, arm="fixed", self_spec={**FIXED, "gamma": 5}, flags=config["openrlhf"])
    hotter = make_run(tmp_path / "hot", [2.0] * 4, arm="fixed", self_spec=FIXED, flags={**config["openrlhf"], "rollout.temperature": 0.6})
    assert [len(arm.runs) for arm in arms_of([one, other, hotter])] == [1, 1, 1]


def test_speedups_are_formed_within_pairs_of_one_seed_in_whatever_order_the_folders_come(tmp_path):
    arms = arms_of(
        [
            seeded(tmp_path / "v0", 0, [4.0] * 6),
            seeded(tmp_path / "v1", 1, [8.0] * 6),
            seeded(tmp_path / "f1", 1, [2.0] * 6, "fixed", rewards=[0.7] * 7),
            seeded(tmp_path / "f0", 0, [4.0] * 6, "fixed", rewards=[0.6] * 7),
        ]
    )
    (versus,) = compare(arms, 0, 1).versus
    # Seed 1: 8 s / 2 s = 4; seed 0: 4 s / 4 s = 1; geometric mean 2. All against all would give 6 s / 3 s.
    assert versus.rollout_speedup.by_pair == (4.0, 1.0)
    assert versus.rollout_speedup.value == pytest.approx(2.0)
    # Each run's steps are all alike, so the bootstrap over steps has no width: that is why the pairs are shown beside it.
    assert (versus.rollout_speedup.low, versus.rollout_speedup.high) == pytest.approx((2.0, 2.0))
    assert versus.rollout_speedup.verdict == "faster (n = 12 steps each, 2 pairs of runs)"
    # Whole steps add 3 s: 11/5 and 7/7. Rewards 0.7 and 0.6 against 0.5: mean difference 0.15.
    assert versus.step_speedup.by_pair == (2.2, 1.0)
    assert versus.reward_difference.value == pytest.approx(0.15)
    assert (versus.by_seed, versus.num_left_out) == (True, 0)


def test_runs_of_the_same_seed_pair_in_the_order_given(tmp_path):
    arms = arms_of(
        [
            seeded(tmp_path / "v_first", 0, [6.0] * 3),
            seeded(tmp_path / "v_again", 0, [8.0] * 3),
            seeded(tmp_path / "f_first", 0, [3.0] * 3, "fixed"),
            seeded(tmp_path / "f_again", 0, [2.0] * 3, "fixed"),
        ]
    )
    assert compare(arms, 0, 1).versus[0].rollout_speedup.by_pair == (2.0, 4.0)


def test_a_run_without_a_partner_is_left_out_and_named(tmp_path):
    arms = arms_of(
        [
            seeded(tmp_path / "v0", 0, [4.0] * 3),
            seeded(tmp_path / "v1", 1, [40.0] * 3),
            seeded(tmp_path / "f0", 0, [2.0] * 3, "fixed"),
        ]
    )
    comparison = compare(arms, 0, 1)
    assert comparison.versus[0].rollout_speedup.by_pair == (2.0,)
    assert any("1 run(s) of fixed γ=2 w8a8 and vanilla have no partner of the same seed" in w for w in comparison.warnings)


def test_without_a_common_seed_all_are_compared_with_all_and_it_is_said(tmp_path):
    arms = arms_of([seeded(tmp_path / "v0", 0, [4.0] * 3), seeded(tmp_path / "f7", 7, [2.0] * 3, "fixed")])
    pairing = pair_by_seed(arms[1], arms[0])
    assert (pairing.by_seed, len(pairing.pairs)) == (False, 1)
    comparison = compare(arms, 0, 1)
    assert comparison.versus[0].rollout_speedup.value == 2.0
    assert any("have no seed in common" in warning for warning in comparison.warnings)


def test_a_baseline_that_differs_from_itself_by_more_than_the_speedup_is_warned_about(tmp_path):
    def warnings(seconds_of_second_baseline):
        folder = tmp_path / str(seconds_of_second_baseline)
        comparison = compare(
            arms_of(
                [
                    seeded(folder / "v0", 0, [4.0] * 5),
                    seeded(folder / "v1", 1, [seconds_of_second_baseline] * 5),
                    seeded(folder / "f0", 0, [2.0] * 5, "fixed"),
                    seeded(folder / "f1", 1, [seconds_of_second_baseline / 2] * 5, "fixed"),
                ]
            ),
            0,
            1,
        )
        assert comparison.versus[0].rollout_speedup.value == pytest.approx(2.0)
        return [warning for warning in comparison.warnings if "own runs differ" in warning]

    # Twice as fast in both pairs. Baseline runs of 4 s and 5 s: 1.25 times apart. Of 4 s and 10 s: 2.5 times; per token the same;
    # whole steps of 7 s and 13 s (1.86 times) against 7/5 and 13/8 (geometric mean 1.51).
    assert warnings(5.0) == []
    found = warnings(10.0)
    assert [warning.partition(",")[0] for warning in found] == [
        "vanilla's own runs differ by 2.50× in their median rollout time",
        "vanilla's own runs differ by 2.50× in their median per-token time",
        "vanilla's own runs differ by 1.86× in their median whole-step time",
    ]
    assert "no less than fixed γ=2 w8a8's rollout speed-up of 2.00×" in found[0]


def test_replicates_from_different_machines_are_warned_about(tmp_path):
    folders = [seeded(tmp_path / "v0", 0, [4.0] * 3), seeded(tmp_path / "v1", 1, [4.0] * 3)]
    provenance = json.loads((folders[1] / "provenance.json").read_text())
    provenance["machine"]["num_cpus"] = 64
    (folders[1] / "provenance.json").write_text(json.dumps(provenance))
    (warning,) = compare(arms_of(folders), 0, 1).warnings
    assert warning.startswith("vanilla's run v1 and vanilla's run v0 ran on different machines")


def test_the_page_states_runs_pairs_spread_and_the_baselines_settings_beside_every_speedup(tmp_path, capsys):
    flags = {"rollout.n_samples_per_prompt": 8, "vllm.num_engines": 2}
    folders = []
    for arm, seconds in (("vanilla", (4.0, 8.0)), ("fixed", (4.0, 2.0)), ("toggle", (4.0, 4.0))):
        for seed in (0, 1):
            folder = seeded(tmp_path / f"{arm}{seed}", seed, [seconds[seed]] * 6, arm)
            config = json.loads((folder / "config.json").read_text())
            config["openrlhf"] |= flags
            (folder / "config.json").write_text(json.dumps(config))
            folders.append(str(folder))
    assert report.main([*folders, "--out", str(tmp_path / "out")]) == 0
    page = Page((tmp_path / "out" / "report.html").read_text())
    assert page.text.count("2 pairs of equal seed") == 2
    assert page.text.count("model tiny; n_samples_per_prompt 8; num_engines 2; async_enable False; vllm 0.29.0; seed 0, 1") == 2
    assert "2.000× [2.000, 2.000]" in page.text
    assert "faster (n = 12 steps each, 2 pairs of runs); run to run 1.000 to 4.000×" in page.text
    assert "2 (seed 0, 1)" in page.text
    document = json.loads((tmp_path / "out" / "report.json").read_text())
    assert document["versus"][0]["rollout_speedup"]["by_pair"] == [1.0, 4.0]
    assert [len(arm["provenance_by_run"]) for arm in document["arms"]] == [2, 2, 2]
    assert "run to run" in capsys.readouterr().out


def test_a_baseline_may_be_named_by_any_of_its_runs(tmp_path):
    folders = [
        seeded(tmp_path / "v0", 0, [4.0] * 3),
        seeded(tmp_path / "f0", 0, [2.0] * 3, "fixed"),
        seeded(tmp_path / "f1", 1, [2.0] * 3, "fixed"),
    ]
    comparison = report.write_report(list(map(str, folders)), tmp_path / "out", str(folders[2]), 1)
    assert comparison.baseline == "fixed γ=2 w8a8"
    assert comparison.versus[0].label == "vanilla"


def test_an_arm_that_recorded_nothing_is_missing_beside_the_others(tmp_path):
    vanilla = seeded(tmp_path / "v", 0, [4.0] * 3)
    write_description(tmp_path / "died", arm="fixed", self_spec=FIXED, flags={**FLAGS, "train.seed": 0}, status="failed")
    assert report.main([str(vanilla), str(tmp_path / "died"), "--out", str(tmp_path / "out")]) == 0
    markdown = (tmp_path / "out" / "report.md").read_text()
    for row in ("| rollout speed-up | baseline | missing |", "| rollout, sum | 12.0 s in 3 | missing |"):
        assert row in markdown
    assert "| reward difference | baseline | missing |" in markdown
    assert "no records yet" in markdown and "status is 'failed'" in markdown
