"""Reading run folders back and comparing them: numbers worked out by hand, records that are incomplete, hostile names.

The folders are made as a run makes them: TensorBoard events through OpenRLHF's writer class, rows through `append_row`.
"""

import json
import os
import random
import subprocess
import sys
from html.parser import HTMLParser

import pytest

from openrlhf_sd import report
from openrlhf_sd.config import SelfSpecError
from openrlhf_sd.metrics import SpecDecodeCounts, append_row, rollout_row
from openrlhf_sd.report_stats import compare, difference_of_means, ratio_of_medians
from openrlhf_sd.run_records import load_run

HOSTILE = '<script>alert("x")</script>'
FLAGS = {"actor.model_name_or_path": "tiny", "actor.adam.lr": 1e-6, "ckpt.path": "/a", "train.async_enable": False}
FIXED = {"mode": "fixed", "gamma": 2, "quant": "w8a8"}


def make_run(
    folder, rollout_s, *, arm="vanilla", self_spec=None, flags=FLAGS, counts=None, num_output_tokens=100, rewards=None
):
    """A finished run whose k-th step took rollout_s[k] seconds to generate, 3 s for the other three phases together."""
    write_description(folder, arm=arm, self_spec=self_spec, flags=flags)
    scalars = []
    for k, seconds in enumerate(rollout_s):
        scalars.append(
            {
                "timing/generation": seconds,
                "timing/make_experience": 0.5,
                "timing/ppo_train": 2.0,
                "timing/broadcast": 0.5,
                "timing/step_total": 999.0,
                "rollout/reward_mean": rewards[k] if rewards else 0.5,
                "rollout/response_length_mean": 20.0 + k,
                "rollout/truncated_rate": 0.25,
                "vllm_kl": 1e-4,
            }
        )
        append_row(
            folder / "metrics.jsonl",
            rollout_row(
                rollout=k,
                engine=0,
                time_unix_s=1000.0 + k,
                rollout_s=seconds,
                weight_sync_s=0.25,
                requantize_s=0.125 if counts and k else None,
                num_responses=5,
                num_prompt_tokens=50,
                num_output_tokens=num_output_tokens,
                counts=counts,
                gamma=2 if counts else None,
            ),
        )
    write_events(folder, scalars)
    return folder


def write_description(folder, *, arm="vanilla", self_spec=None, flags=FLAGS, status="finished"):
    folder.mkdir(parents=True)
    config = {"arm": arm, "self_spec": self_spec, "openrlhf": flags}
    provenance = {
        "git_sha": "abc123",
        "argv": ["--logger.wandb.key", "TOPSECRET"],
        "started_unix_s": 1.7e9,
        "packages": {"vllm": "0.29.0"},
        "machine": {"cpu_model": "Test CPU", "num_cpus": 2, "memory_bytes": 2**33, "gpus": [], "platform": "Linux"},
        "status": status,
        "ended_unix_s": None,
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "provenance.json").write_text(json.dumps(provenance))


def write_events(folder, scalars, run_name="run", first_step=1):
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(log_dir=str(folder / "tensorboard" / run_name))
    for step, values in enumerate(scalars, start=first_step):
        for tag, value in values.items():
            writer.add_scalar(f"train/{tag}", value, step)
    writer.close()


class Page(HTMLParser):
    """The tags and the visible text of an HTML document."""

    def __init__(self, markup):
        super().__init__()
        self.tags, self.text, self.images = set(), "", []
        self.feed(markup)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        if tag == "img":
            self.images.append(dict(attrs)["src"])

    def handle_data(self, data):
        self.text += data


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


def test_summary_numbers_worked_out_by_hand(two_runs):
    comparison = compare([load_run(folder) for folder in two_runs], baseline=0, num_warmup_steps=1)
    vanilla, fixed = comparison.arms

    # Vanilla, first step (30 s) left out: 6 steps of 4 s and one of 6 s: sum 30 s, median 4 s. Each step adds 3 s.
    assert (vanilla.rollout_s.n, vanilla.rollout_s.total, vanilla.rollout_s.median) == (7, 30.0, 4.0)
    assert (vanilla.step_s.total, vanilla.step_s.median) == (30.0 + 7 * 3, 7.0)
    assert vanilla.warmup_rollout_s == [30.0]
    assert (vanilla.num_steps, vanilla.broadcast_s.median, vanilla.weight_sync_s.median) == (8, 0.5, 0.25)
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
    assert versus.reward_difference.verdict == "too few steps for an interval (n = 4 steps each)"
    assert comparison.warnings == []


def test_an_interval_around_one_is_no_difference_detected():
    random.seed(0)
    noise = [random.gauss(5, 1) for _ in range(20)]
    estimate = ratio_of_medians(noise, [random.gauss(5, 1) for _ in range(15)])
    assert estimate.low < 1 < estimate.high
    assert estimate.verdict == "no difference detected at n = 20 and 15 steps"


def test_the_interval_of_a_difference_of_means_agrees_with_the_normal_one():
    # Two arms of 400 unit-variance values: standard error sqrt(1/400 + 1/400) = 0.0707, 95% half-width 0.139.
    random.seed(1)
    run, base = ([random.gauss(mean, 1) for _ in range(400)] for mean in (1, 0))
    estimate = difference_of_means(run, base)
    assert estimate.high - estimate.low == pytest.approx(2 * 0.139, rel=0.1)
    assert estimate.low < estimate.value < estimate.high
    assert estimate.verdict == "higher (n = 400 steps each)"


def test_few_steps_give_a_value_without_an_interval():
    estimate = ratio_of_medians([1.0, 1.0], [2.0, 2.0])
    assert (estimate.value, estimate.low, estimate.high) == (2.0, None, None)
    assert "too few steps" in estimate.verdict


def test_engines_of_one_rollout_are_pooled_by_tokens(tmp_path):
    write_description(tmp_path / "r", arm="adaptive", self_spec={**FIXED, "mode": "adaptive"})
    engines = ((0, 1, SpecDecodeCounts(30, 30, 30, [30], [30])), (1, 2, SpecDecodeCounts(10, 20, 5, [5, 0], [10, 10])))
    for engine, gamma, counts in engines:
        append_row(
            tmp_path / "r" / "metrics.jsonl",
            rollout_row(
                rollout=0,
                engine=engine,
                time_unix_s=1.0,
                rollout_s=1.0,
                weight_sync_s=0.1 + engine,
                requantize_s=0.2,
                num_responses=1,
                num_prompt_tokens=1,
                num_output_tokens=50,
                counts=counts,
                gamma=gamma,
            ),
        )
    totals = load_run(tmp_path / "r").rollouts[1]
    assert (totals.num_output_tokens, totals.num_drafts, totals.num_draft_tokens, totals.num_accepted_tokens) == (
        100,
        40,
        50,
        35,
    )
    assert (totals.weight_sync_s, totals.requantize_s, totals.gamma) == (1.1, 0.2, 1.5)
    # First position: (30 drafts at 1.0 + 10 at 0.5) / 40 = 0.875; second: only the other engine, 0 of 10.
    assert totals.acceptance_rate_by_pos == (0.875, 0.0)


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


def test_two_runs_of_one_arm_are_told_apart_by_folder(tmp_path):
    runs = [load_run(make_run(tmp_path / name, [1.0] * 3)) for name in ("one", "two")]
    assert [arm.label for arm in compare(runs, 0, 1).arms] == ["vanilla (one)", "vanilla (two)"]
    twin = load_run(make_run(tmp_path / "elsewhere" / "one", [1.0] * 3))
    labels = [arm.label for arm in compare([*runs, twin], 0, 1).arms]
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
    (versus,) = compare([base, run], 0, 1).versus
    assert (versus.rollout_speedup.value, versus.rollout_speedup.n_baseline) == (1.0, 5)


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


def test_metrics_alone_without_tensorboard_are_read(two_runs, tmp_path):
    for file in (two_runs[1] / "tensorboard" / "run").iterdir():
        file.unlink()
    comparison = report.write_report(list(map(str, two_runs)), tmp_path / "out", None, 1)
    assert comparison.arms[1].acceptance_rate == 0.75
    assert comparison.arms[1].rollout_s is None
    assert comparison.versus[0].rollout_speedup.verdict == "missing"


def test_cut_files_keep_their_whole_records(two_runs):
    metrics = two_runs[1] / "metrics.jsonl"
    metrics.write_bytes(metrics.read_bytes()[:-30])
    (events,) = (two_runs[1] / "tensorboard" / "run").iterdir()
    events.write_bytes(events.read_bytes()[:-10])  # cuts the last scalar, vllm_kl of step 8
    run = load_run(two_runs[1])
    assert list(run.rollouts) == [1, 2, 3, 4, 5, 6, 7]
    assert len(run.scalar("train/vllm_kl")) == 7
    assert len(run.scalar("train/timing/generation")) == 8
    assert any("1 unreadable line" in note for note in run.notes)


def test_a_running_run_is_only_noted(tmp_path):
    write_description(tmp_path / "r", status="running")
    write_events(tmp_path / "r", [{"timing/generation": 1.0}] * 2)
    assert any("'running'" in note for note in load_run(tmp_path / "r").notes)


def test_a_resumed_run_counts_each_step_once_the_later_time(tmp_path):
    folder = make_run(tmp_path / "r", [1.0, 1.0, 1.0])
    write_events(folder, [{"timing/generation": 7.0}] * 2, run_name="again", first_step=3)
    append_row(folder / "metrics.jsonl", {"rollout": 2, "engine": 0, "num_output_tokens": 77})
    run = load_run(folder)
    assert run.scalar("train/timing/generation") == {1: 1.0, 2: 1.0, 3: 7.0, 4: 7.0}
    assert run.rollouts[3].num_output_tokens == 77
    assert any("logged more than once" in note for note in run.notes)
    assert any("replaced by a later row" in note for note in run.notes)


def test_skipped_steps_and_nan_values_are_noted(tmp_path):
    folder = tmp_path / "r"
    write_description(folder)
    write_events(folder, [{"timing/generation": 1.0, "vllm_kl": float("nan")}])
    write_events(folder, [{"timing/generation": 1.0}], run_name="more", first_step=10)
    run = load_run(folder)
    assert run.scalar("train/vllm_kl") == {}
    assert any("NaN or infinite" in note for note in run.notes)
    assert any("only 2 of the steps 1..10" in note for note in run.notes)


def test_asynchronous_steps_use_the_trainers_wall_clock(tmp_path):
    run = load_run(make_run(tmp_path / "r", [1.0, 1.0], flags={**FLAGS, "train.async_enable": True}))
    assert run.step_s() == {1: 999.0, 2: 999.0}


@pytest.mark.parametrize(
    ("break_it", "expected"),
    [
        (lambda run: "nowhere", "nowhere: no such run folder"),
        (lambda run: (run / "config.json").unlink(), "config.json: missing"),
        (lambda run: (run / "config.json").write_text("{"), "config.json: not valid JSON"),
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
