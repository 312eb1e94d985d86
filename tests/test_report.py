"""Reading run folders back and comparing them: numbers worked out by hand, records that are incomplete, hostile names."""

import json
import os
import random
import shutil
import subprocess
import sys

import pytest
from run_folders import FIXED, FLAGS, Page, make_run, write_description, write_events

from openrlhf_sd import report
from openrlhf_sd.config import SelfSpecError
from openrlhf_sd.metrics import SpecDecodeCounts, append_row
from openrlhf_sd.report_arms import group_arms
from openrlhf_sd.report_bootstrap import ratio_of_medians
from openrlhf_sd.report_stats import compare
from openrlhf_sd.run_records import load_run

HOSTILE = '<script>alert("x")</script>'


@pytest.fixture
def two_runs(tmp_path):
    # Ten drafts of two tokens per rollout: 9 accepted at the first position, 6 at the second.
    counts = SpecDecodeCounts(10, 20, 15, [9, 6], [10, 10])
    rewards = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8]
    return (
        make_run(tmp_path / "a", [30, 4, 4, 4, 6, 4, 4, 4], rewards=rewards),
        make_run(
            tmp_path / "b",
            [50, 5, 5, 5, 5, 5, 5, 8],
            arm="fixed",
            self_spec=FIXED,
            counts=counts,
            num_output_tokens=200,
            rewards=[reward + 0.5 for reward in rewards],
        ),
    )


def test_runs_of_equal_seconds_are_equally_fast_wherever_their_events_end(tmp_path):
    """TensorBoard keeps up to two minutes to itself: a run that was killed, or goes on, has more rows than events. Steps get longer
    here, so medians over different steps would differ."""
    seconds = [float(4 + step) for step in range(12)]
    whole, cut = make_run(tmp_path / "a", seconds), make_run(tmp_path / "b", seconds, arm="fixed", self_spec=FIXED)
    shutil.rmtree(cut / "tensorboard")
    write_events(cut, [{"timing/generation": value, "timing/make_experience": 1.0} for value in seconds[:6]])
    (cut_rows := (cut / "metrics.jsonl")).write_text("".join(cut_rows.read_text().splitlines(keepends=True)[2:]))
    (versus,) = compare(group_arms([load_run(folder) for folder in (whole, cut)]), baseline=0, num_warmup_steps=1).versus
    assert (versus.rollout_speedup.value, versus.per_token_speedup.value) == (1.0, 1.0)


def test_summary_numbers_worked_out_by_hand(two_runs):
    comparison = compare(group_arms([load_run(folder) for folder in two_runs]), baseline=0, num_warmup_steps=1)
    vanilla, fixed = comparison.arms

    # Vanilla, first step (30 s) left out: 6 steps of 4 s and one of 6 s: sum 30 s, median 4 s. Each step adds 3 s.
    assert (vanilla.rollout_s.n, vanilla.rollout_s.total, vanilla.rollout_s.median) == (7, 30.0, 4.0)
    assert (vanilla.step_s.total, vanilla.step_s.median) == (30.0 + 7 * 3, 7.0)
    assert vanilla.warmup_rollout_s == [30.0]
    assert (vanilla.num_steps_by_run, vanilla.broadcast_s.median, vanilla.weight_sync_s.median) == ([8], 0.5, 0.25)
    # 7 rollouts of 100 tokens in 30 s; median of 4 s / 100.
    assert vanilla.tokens_per_s == 700 / 30
    assert vanilla.s_per_token.median == 0.04
    assert (vanilla.acceptance_rate, vanilla.gamma, vanilla.requantize_s) == (None, None, None)
    # 8 rewards 0.1 .. 0.8: quarters of two steps.
    assert vanilla.reward.first_quarter == pytest.approx(0.15)
    assert vanilla.reward.last_quarter == pytest.approx(0.75)
    assert vanilla.response_length.last == 27.0

    # 15 of 20 accepted; 1 + 15/10; 9/10 and 6/10.
    assert (fixed.acceptance_rate, fixed.mean_acceptance_length) == (0.75, 2.5)
    assert fixed.acceptance_rate_by_pos == pytest.approx([0.9, 0.6])
    assert (fixed.gamma.median, fixed.requantize_s.median, fixed.requantize_s.n) == (2.0, 0.125, 7)
    assert fixed.label == "fixed γ=2 w8a8"

    # Medians 4 s against 5 s: 0.8; per token 4/100 against 5/200: 1.6; whole steps 7 s against 8 s.
    (versus,) = comparison.versus
    assert versus.rollout_speedup.value == 0.8
    assert versus.rollout_speedup.verdict == "slower (n = 7 steps each)"
    assert versus.per_token_speedup.value == pytest.approx(1.6)
    assert versus.step_speedup.value == 7 / 8
    # Last half of eight steps, each reward 0.5 higher.
    assert versus.reward_difference.value == pytest.approx(0.5)
    assert versus.reward_difference.verdict == "no interval from 1 and 1 runs: trainings differ by chance too; 3 runs of each give one"
    assert comparison.warnings == []


def test_an_interval_around_one_is_no_difference_detected():
    random.seed(0)
    noise = [random.gauss(5, 1) for _ in range(20)]
    estimate = ratio_of_medians([(noise, [random.gauss(5, 1) for _ in range(15)])])
    assert estimate.low < 1 < estimate.high
    half_width = (estimate.high - estimate.low) / 2
    assert estimate.verdict == (f"no difference detected at n = 20 and 15 steps; one under about {half_width:.3f} would not show here")
    assert not estimate.is_claim


def test_few_steps_give_a_value_without_an_interval():
    estimate = ratio_of_medians([([1.0, 1.0], [2.0, 2.0])])
    assert (estimate.value, estimate.low, estimate.high) == (2.0, None, None)
    assert "too few steps" in estimate.verdict


def test_report_writes_a_self_contained_page_and_prints_the_table(two_runs, tmp_path, capsys):
    out = tmp_path / "out"
    assert report.main([*map(str, two_runs), "--out", str(out)]) == 0
    page = Page((out / "report.html").read_text())
    assert {"html", "table", "img"} <= page.tags
    assert not {"script", "link", "iframe"} & page.tags
    assert len(page.images) == 5
    assert all(source.startswith("data:image/svg+xml;base64,") for source in page.images)
    for piece in (
        "0.800×",
        "slower (n = 7 steps each)",
        "first 1 step(s)",
        "Test CPU",
        "0.29.0",
        "2.50",
        "90.0% 60.0%",
    ):
        assert piece in page.text, piece
    printed = capsys.readouterr().out
    assert "rollout speed-up" in printed and "report.html" in printed
    assert "acceptance by position" in (out / "report.md").read_text()
    document = json.loads((out / "report.json").read_text())
    assert document["versus"][0]["rollout_speedup"]["value"] == 0.8
    assert document["arms"][0]["acceptance_rate"] is None
    assert document["num_warmup_steps"] == 1


def test_no_secret_reaches_the_report(two_runs, tmp_path):
    config_file = two_runs[0] / "config.json"
    config = json.loads(config_file.read_text())
    config["openrlhf"]["logger.wandb.key"] = "TOPSECRET"
    config_file.write_text(json.dumps(config))
    assert report.main([*map(str, two_runs), "--out", str(tmp_path / "out")]) == 0
    for written in (tmp_path / "out").iterdir():
        assert "TOPSECRET" not in written.read_text(), written.name


def test_hostile_names_are_shown_as_text_everywhere(tmp_path, capsys):
    flags = {**FLAGS, "actor.model_name_or_path": HOSTILE + "\x1b[31m\n| pipe"}
    hostile_spec = {**FIXED, "quant": f"{HOSTILE} [red] $\\frac"}
    base = make_run(tmp_path / "a", [3.0] * 6, flags=flags)
    run = make_run(tmp_path / "_b", [3.0] * 6, arm="fixed", self_spec=hostile_spec, flags={**flags, HOSTILE: HOSTILE})
    provenance = json.loads((run / "provenance.json").read_text())
    provenance["machine"]["cpu_model"] = f"<img src=x onerror=alert(1)>{HOSTILE}"
    provenance["packages"][HOSTILE] = HOSTILE
    (run / "provenance.json").write_text(json.dumps(provenance))

    assert report.main([str(base), str(run), "--out", str(tmp_path / "out")]) == 0
    page = Page((tmp_path / "out" / "report.html").read_text())
    assert "script" not in page.tags
    assert HOSTILE in page.text
    assert all(source.startswith("data:") for source in page.images)
    markdown = (tmp_path / "out" / "report.md").read_text()
    assert "<script" not in markdown and "<img" not in markdown
    assert "\x1b[31m" not in capsys.readouterr().out + markdown + page.text
    tables = [block.splitlines() for block in markdown.split("\n\n") if block.startswith("|")]
    for table in tables:  # a pipe in a name must not add a column
        assert len({line.replace("\\|", "").count("|") for line in table}) == 1


def test_a_single_run_needs_no_baseline_and_says_nothing_about_speed(two_runs, tmp_path):
    assert report.main([str(two_runs[1]), "--out", str(tmp_path / "out")]) == 0
    page = Page((tmp_path / "out" / "report.html").read_text())
    assert "75.0%" in page.text
    assert "speed-up:" not in page.text
    assert json.loads((tmp_path / "out" / "report.json").read_text())["versus"] == []


def test_without_a_vanilla_run_a_baseline_must_be_named(two_runs, tmp_path):
    other = make_run(tmp_path / "c", [2.5] * 8, arm="toggle", self_spec={**FIXED, "mode": "toggle"})
    comparison = report.write_report([str(two_runs[1]), str(other)], tmp_path / "out", None, 1)
    assert comparison.versus == []
    assert "--baseline" in comparison.warnings[0]
    comparison = report.write_report([str(other)], tmp_path / "out", str(two_runs[1]), 1)
    assert comparison.baseline == "fixed γ=2 w8a8"
    assert comparison.versus[0].rollout_speedup.value == 2.0  # 5 s against 2.5 s


def test_arms_of_one_mode_with_different_settings_are_told_apart_by_folder(tmp_path):
    def run(folder, temperature):
        return load_run(make_run(folder, [1.0] * 3, flags={**FLAGS, "rollout.temperature": temperature}))

    runs = [run(tmp_path / "one", 1.0), run(tmp_path / "two", 0.6)]
    assert [arm.label for arm in group_arms(runs)] == ["vanilla (one)", "vanilla (two)"]
    twin = run(tmp_path / "elsewhere" / "one", 0.8)
    labels = [arm.label for arm in group_arms([*runs, twin])]
    assert labels == [f"vanilla ({runs[0].run_dir})", "vanilla (two)", f"vanilla ({twin.run_dir})"]


def test_a_folder_given_twice_is_an_error(two_runs, tmp_path, capsys):
    assert report.main([str(two_runs[0]), f"{two_runs[0]}/", "--out", str(tmp_path / "out")]) == 2
    assert "given twice" in capsys.readouterr().err


def test_the_number_of_warmup_steps_is_an_option(two_runs, tmp_path):
    comparison = report.write_report([str(two_runs[0])], tmp_path / "out", None, 4)
    assert comparison.arms[0].rollout_s.total == 6 + 4 + 4 + 4
    assert comparison.arms[0].warmup_rollout_s == [30.0, 4.0, 4.0, 4.0]
    comparison = report.write_report([str(two_runs[0])], tmp_path / "out", None, 0)
    assert comparison.arms[0].rollout_s.total == 60.0
    with pytest.raises(SelfSpecError, match="--warmup-steps"):
        report.write_report([str(two_runs[0])], tmp_path / "out", None, 8)


def test_different_flags_steps_machines_and_versions_are_warned_about(two_runs, tmp_path):
    other = make_run(
        tmp_path / "c",
        [5.0] * 6,
        arm="fixed",
        self_spec=FIXED,
        flags={**FLAGS, "actor.adam.lr": 1e-5, "ckpt.path": "/b", "logger.wandb.run_name": "c", "rollout.top_p": 0.9},
    )
    provenance = json.loads((other / "provenance.json").read_text())
    provenance["machine"]["num_cpus"] = 64
    provenance["packages"]["vllm"] = "0.30.0"
    (other / "provenance.json").write_text(json.dumps(provenance))
    assert report.main([str(two_runs[0]), str(other), "--out", str(tmp_path / "out")]) == 0
    page = Page((tmp_path / "out" / "report.html").read_text()).text
    assert "--actor.adam.lr: 1e-05 against 1e-06; --rollout.top_p: 0.9 against not set" in page
    assert "different OpenRLHF flags: --actor.adam.lr" in page  # neither paths nor run names
    assert "different machines" in page
    assert "different versions of vllm" in page
    assert "logged 6 steps, vanilla 8" in page


def test_speedups_cover_only_steps_both_runs_logged(tmp_path):
    base = load_run(make_run(tmp_path / "a", [1.0] * 6 + [100.0] * 20))
    run = load_run(make_run(tmp_path / "b", [1.0] * 6, arm="fixed", self_spec=FIXED))
    (versus,) = compare(group_arms([base, run]), 0, 1).versus
    assert (versus.rollout_speedup.value, versus.rollout_speedup.n_baseline) == (1.0, 5)


def test_asynchronous_runs_have_no_time_per_token(tmp_path):
    """The engines' row of a sync may hold two batches or none, and the trainer's clock times one batch a step."""
    flags = {**FLAGS, "train.async_enable": True}
    base = load_run(make_run(tmp_path / "a", [1.0] * 8, flags=flags))
    run = load_run(make_run(tmp_path / "b", [1.0] * 8, flags=flags, arm="fixed", self_spec=FIXED, num_output_tokens=200))
    comparison = compare(group_arms([base, run]), 0, 1)
    assert comparison.arms[1].s_per_token is None
    assert comparison.versus[0].per_token_speedup.value is None
    assert comparison.versus[0].rollout_speedup.value == 1.0


def test_missing_metrics_are_called_missing(tmp_path):
    folder = tmp_path / "r"
    write_description(folder, arm="fixed", self_spec=FIXED)
    write_events(folder, [{"timing/generation": 2.0}] * 3)  # no metrics.jsonl, no rewards, no other phase
    (folder / "provenance.json").unlink()
    assert report.main([str(folder), "--out", str(tmp_path / "out")]) == 0
    rows = dict(
        line.strip("| \n").split(" | ", 1)
        for line in (tmp_path / "out" / "report.md").read_text().splitlines()
        if line.startswith("| ") and not line.startswith("|  ")  # rows, not the heading with its empty first cell
    )
    assert rows["rollout, sum"] == "4.00 s in 2"
    for name in (
        "whole step, sum",
        "generated tokens/s",
        "acceptance rate, by tokens",
        "reward, first → last step",
        "CPU",
    ):
        assert rows[name] == "missing", name
    page = Page((tmp_path / "out" / "report.html").read_text()).text
    assert "metrics.jsonl is missing" in page and "provenance.json is missing" in page
    assert len(Page((tmp_path / "out" / "report.html").read_text()).images) == 1


def test_an_arm_that_never_drafted_is_said_to_be_plain_decoding(tmp_path):
    seconds = [9, 4, 4, 4]
    base = make_run(tmp_path / "a", seconds)
    idle = make_run(tmp_path / "b", seconds, arm="adaptive", self_spec={**FIXED, "mode": "adaptive"}, counts=SpecDecodeCounts())
    assert report.main([str(base), str(idle), "--out", str(tmp_path / "out")]) == 0
    text = (tmp_path / "out" / "report.md").read_text()
    assert "drafted nothing in any rollout, so this arm is plain decoding" in text
    assert "| acceptance rate, by tokens | – | no drafts |" in text


def test_metrics_alone_without_tensorboard_are_read(two_runs, tmp_path):
    for file in (two_runs[1] / "tensorboard" / "run").iterdir():
        file.unlink()
    comparison = report.write_report(list(map(str, two_runs)), tmp_path / "out", None, 1)
    assert comparison.arms[1].acceptance_rate == 0.75
    assert comparison.arms[1].rollout_s is None
    assert comparison.versus[0].rollout_speedup.verdict == "missing"


@pytest.mark.parametrize(
    ("break_it", "expected"),
    [
        (lambda run: "nowhere", "nowhere: no such run folder"),
        (lambda run: (run / "config.json").unlink(), "config.json: missing"),
        (lambda run: (run / "config.json").write_text("{"), "config.json: not valid JSON"),
        (lambda run: (run / "config.json").write_text("[" * 100_000), "config.json: not valid JSON"),
        (
            lambda run: (run / "config.json").write_text('{"arm": 3}'),
            "config.json: 'arm' is missing or of the wrong type",
        ),
        (lambda run: (run / "provenance.json").write_text("[]"), "provenance.json: expected a JSON object"),
        (lambda run: append_row(run / "metrics.jsonl", {"engine": 0}), "metrics.jsonl: a row has no integer 'rollout'"),
        (
            lambda run: append_row(run / "metrics.jsonl", {"rollout": 9, "engine": 0, "num_output_tokens": "many"}),
            "metrics.jsonl: 'num_output_tokens' of rollout 9 is no number",
        ),
        (
            lambda run: (run / "metrics.jsonl").open("a").write('{"rollout": 9, "engine": 0, "timing/rollout_s": 1e999}\n'),
            "metrics.jsonl: 'timing/rollout_s' of rollout 9 is no number",
        ),
    ],
)
def test_bad_folders_end_with_one_line_and_code_2(tmp_path, capsys, break_it, expected):
    folder = make_run(tmp_path / "r", [1.0, 1.0])
    named = break_it(folder)
    assert report.main([named if isinstance(named, str) else str(folder), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert expected in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_folder_without_records_and_a_file_as_out_are_errors(tmp_path, capsys):
    write_description(tmp_path / "r")
    assert report.main([str(tmp_path / "r"), "--out", str(tmp_path / "out")]) == 2
    assert "no records yet" in capsys.readouterr().err
    folder = make_run(tmp_path / "s", [1.0, 1.0])
    (tmp_path / "file").write_text("")
    assert report.main([str(folder), "--out", str(tmp_path / "file")]) == 2
    assert "--out" in capsys.readouterr().err


def test_importing_the_report_loads_nothing_heavy():
    heavy = ("torch", "vllm", "ray", "transformers", "openrlhf", "deepspeed", "tensorboard", "matplotlib")
    code = f"import sys, openrlhf_sd.report; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_report_is_made_without_torch_and_in_a_plain_locale(two_runs, tmp_path):
    code = (
        "import sys; from openrlhf_sd import report; code = report.main(sys.argv[1:]); "
        "print('heavy:', [m for m in ('torch', 'vllm', 'ray', 'openrlhf') if m in sys.modules]); sys.exit(code)"
    )
    command = [sys.executable, "-c", code, *map(str, two_runs), "--out", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "LC_ALL": "C"})
    assert done.returncode == 0, done.stderr
    assert "heavy: []" in done.stdout
