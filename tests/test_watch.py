"""The live view: what it shows of a run that has not begun, runs, was cut short, or has ended."""

import json
import subprocess
import sys

import pytest
from rich.console import Console
from run_folders import FIXED, FLAGS, make_run, write_description

from openrlhf_sd import launch, watch
from openrlhf_sd.config import SelfSpecError
from openrlhf_sd.metrics import SpecDecodeCounts, append_row
from openrlhf_sd.step_ledger import Segment
from openrlhf_sd.watch_view import sample_timeline, spark_line, view

TIMELINE = [[0, 0, 10, 8, 8, 1.0, 80], [2, 10, 5, 4, 2, 1.0, 20]]


def shown(run_dir, now_unix_s=1000.0, width=100):
    console = Console(width=width, record=True, force_terminal=False, file=open("/dev/null", "w"))
    console.print(view(watch.look(run_dir), now_unix_s))
    return console.export_text()


@pytest.fixture
def run_dir(tmp_path):
    # Ten drafts of two tokens per rollout, 15 of 20 accepted.
    counts = SpecDecodeCounts(10, 20, 15, [9, 6], [10, 10])
    return make_run(tmp_path / "r", [4.0, 2.0], arm="fixed", self_spec=FIXED, counts=counts, timelines=[TIMELINE] * 2, rewards=[0.25, 0.75])


def test_each_rollout_is_a_column_and_the_median_of_all_the_last(run_dir):
    output = shown(run_dir)
    assert output.splitlines()[0] == "fixed γ=2 w8a8 · finished · 2 rollouts recorded"
    lines = [line.split("  ") for line in output.splitlines()]
    table = {words[0].strip(): [word.strip() for word in words[1:] if word.strip()] for words in lines if len(words) > 1}
    assert table["training step"] == ["1", "2", "median"]
    # 100 tokens in 4 s and in 2 s; 15 of 20; 1 + 15/10; 5 of 15 steps and 20 of 100 tokens with γ above 0.
    assert table["rollout"] == ["4.00 s", "2.00 s", "3.00 s"]
    assert table["generated tokens/s"] == ["25.0", "50.0", "37.5"]
    assert table["acceptance"] == ["75.0%", "75.0%", "75.0%"]
    assert table["mean acceptance length"] == ["2.50", "2.50", "2.50"]
    assert table["γ, on"] == ["2.00", "2.00", "2.00"]
    assert table["on, of engine steps"] == ["33.3%", "33.3%", "33.3%"]
    assert table["on, of tokens"] == ["20.0%", "20.0%", "20.0%"]
    assert table["weight sync"] == ["0.25 s", "0.25 s", "0.25 s"]
    assert table["re-quantize"] == ["missing", "0.125 s", "0.125 s"]  # the first rollout of the builder has none
    assert table["predicted speed-up, on"] == ["missing", "missing", "missing"]
    assert table["mean reward"] == ["0.25", "0.75", "0.5"]


def test_the_last_rollout_is_drawn_against_time(run_dir):
    # One second at a batch of 8 without drafts, one second from 4 to 2 with a γ of 2: half of the width of 56 each. In eighths of 8
    # the slope reads 4 down to 3.5, 3 down to 2.5 and 2: a quarter, a half and a quarter of its 28 letters.
    lines = shown(run_dir).splitlines()
    place = next(index for index, line in enumerate(lines) if line.startswith("step 2 inside, engine 0, 2.00 s"))
    batch, gamma = lines[place + 1 : place + 3]
    assert batch == "batch " + "█" * 28 + "▄" * 7 + "▃" * 14 + "▂" * 7 + " up to 8"
    assert gamma == "γ     " + " " * 28 + "█" * 28 + " up to 2"


def test_samples_lie_at_the_middles_of_equal_stretches_of_time():
    timeline = [Segment(0, 0, 1, 0, 0, 0.0, 9), Segment(0, 1, 3, 8, 8, 3.0, 24), Segment(3, 4, 1, 4, 2, 1.0, 12)]
    # Four stretches of 1 s; the last sample is half way from 4 to 2. The segment without time has no place.
    assert sample_timeline(timeline, 4) == ([8.0, 8.0, 8.0, 3.0], [0.0, 0.0, 0.0, 3.0])


def test_a_blank_is_zero_and_nothing_else():
    assert spark_line([0, 0.01, 4, 8]) == " ▁▄█"
    assert spark_line([0, 0]) == "  "


def test_a_vanilla_run_has_no_rows_of_speculation(tmp_path):
    output = shown(make_run(tmp_path / "v", [4.0] * 3))
    assert "acceptance" not in output and "re-quantize" not in output
    assert "active batch and γ inside step 3: missing (no timeline recorded)" in output


def test_it_fits_into_eighty_columns(tmp_path):
    counts = SpecDecodeCounts(1000, 11000, 10900, [9] * 11, [10] * 11)
    run = make_run(tmp_path / "r", [1234.5] * 9, arm="auto", self_spec={**FIXED, "mode": "auto"}, counts=counts, timelines=[TIMELINE] * 9)
    output = shown(run, width=80)
    heading = next(line for line in output.splitlines() if "training step" in line)
    assert heading.split()[2:] == ["5", "6", "7", "8", "9", "median"]
    for line in output.splitlines():
        assert len(line) <= 80 and "…" not in line


def test_what_it_waits_for_is_said(tmp_path):
    folder = tmp_path / "r"
    assert "waiting for the folder" in shown(folder)
    folder.mkdir()
    assert "waiting for" in shown(folder) and "config.json: a run writes it when it starts" in " ".join(shown(folder).split())
    (folder / "config.json").write_text(json.dumps({"arm": "vanilla", "self_spec": None, "openrlhf": FLAGS}))
    assert "vanilla · missing · 0 rollouts recorded" in shown(folder)
    assert "waiting for the first rollout" in shown(folder)


def test_a_run_that_died_early_is_not_waited_for(tmp_path):
    write_description(tmp_path / "r", status="failed")
    output = shown(tmp_path / "r")
    assert "the run ended before its first rollout was recorded" in output and "waiting" not in output


def test_a_running_run_says_how_long_ago_it_was_heard_of(tmp_path):
    folder = make_run(tmp_path / "r", [4.0] * 3)
    provenance = json.loads((folder / "provenance.json").read_text())
    (folder / "provenance.json").write_text(json.dumps({**provenance, "status": "running"}))
    # The last row's time is 1002; 180 s later.
    assert shown(folder, now_unix_s=1182.0).startswith("vanilla · running · 3 rollouts recorded · the last 3 min ago")


def test_cut_lines_and_files_are_tolerated(run_dir):
    metrics = run_dir / "metrics.jsonl"
    metrics.write_bytes(metrics.read_bytes()[:-30])
    (events,) = (run_dir / "tensorboard" / "run").iterdir()
    events.write_bytes(b"not an event file")
    output = shown(run_dir)
    assert "1 rollouts recorded" in output and "1 unreadable line" in output
    assert ["missing", "missing"] == next(line for line in output.splitlines() if "mean reward" in line).split()[2:]


def test_hostile_names_are_text(tmp_path):
    spec = {**FIXED, "quant": "[red]w4[/red]\x1b[31m<script>"}
    folder = make_run(tmp_path / "[bold]r", [1.0] * 2, arm="fixed", self_spec=spec, timelines=[TIMELINE] * 2)
    output = shown(folder)
    assert "[red]w4[/red]?[31m<script>" in output and "[bold]r" in output
    assert "\x1b" not in output


def test_once_into_a_pipe_has_no_escape_codes_and_ends(run_dir):
    command = [sys.executable, "-m", "openrlhf_sd.watch", str(run_dir)]
    for flags in (["--once"], []):  # without a terminal there is nothing to keep drawing on
        done = subprocess.run([*command, *flags], capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stderr) == (0, "")
        assert "mean acceptance length" in done.stdout and "\x1b" not in done.stdout


def test_it_draws_until_the_run_has_ended(run_dir, monkeypatch, capsys):
    provenance = json.loads((run_dir / "provenance.json").read_text())
    (run_dir / "provenance.json").write_text(json.dumps({**provenance, "status": "running"}))
    slept = []

    def sleep(seconds):
        slept.append(seconds)
        append_row(run_dir / "metrics.jsonl", {"rollout": 1 + len(slept), "engine": 0, "num_output_tokens": 77})
        if len(slept) == 2:
            (run_dir / "provenance.json").write_text(json.dumps({**provenance, "status": "finished"}))

    monkeypatch.setattr(watch.time, "sleep", sleep)
    monkeypatch.setattr(Console, "is_terminal", True)
    assert watch.main([str(run_dir), "--interval", "0.5"]) == 0
    assert slept == [0.5, 0.5]
    assert "finished · 4 rollouts recorded" in capsys.readouterr().out


def test_ctrl_c_ends_it_with_130(run_dir, monkeypatch, capsys):
    (run_dir / "provenance.json").unlink()

    def interrupt(seconds):
        raise KeyboardInterrupt

    monkeypatch.setattr(watch.time, "sleep", interrupt)
    monkeypatch.setattr(Console, "is_terminal", True)
    assert launch.main(["watch", str(run_dir)]) == 130
    assert "Traceback" not in capsys.readouterr().err


def test_bad_input_ends_with_one_line_and_code_2(run_dir, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    append_row(run_dir / "metrics.jsonl", {"rollout": 5, "engine": 0, "num_output_tokens": "many"})
    for argv, expected in (
        ([str(tmp_path / "file")], "file is a file; give the folder of a run"),
        ([str(run_dir), "--interval", "0"], "--interval: 0.0 must be at least 0.1 seconds"),
        ([str(run_dir), "--interval", "nan"], "--interval: nan must be at least"),
        ([str(run_dir), "--once"], "'num_output_tokens' of rollout 5 is no number"),
    ):
        assert launch.main(["watch", *argv]) == 2
        error = capsys.readouterr().err
        assert expected in error and error.count("\n") == 1


def test_a_folder_that_breaks_while_watched_is_an_error_of_ours(run_dir):
    (run_dir / "config.json").write_text("[]")
    with pytest.raises(SelfSpecError, match="expected a JSON object"):
        watch.look(run_dir)


def test_a_changed_file_is_noticed(run_dir):
    before = watch.signature(run_dir)
    assert watch.signature(run_dir) == before
    append_row(run_dir / "metrics.jsonl", {"rollout": 2, "engine": 0})
    assert watch.signature(run_dir) != before


def test_the_view_loads_nothing_heavy():
    heavy = ("torch", "vllm", "ray", "transformers", "openrlhf", "tensorboard", "matplotlib")
    code = f"import sys, openrlhf_sd.watch; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
