"""The commands that read a calibration: what they print, when they refuse, how they exit."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
from calibrations import BATCHES, CONTEXTS, GAMMAS, MODEL, make_calibration, make_rows, write_sweep

from calib import plot, predict, validate
from calib.sweep_csv import append, read_sweep, write

ROOT = Path(__file__).parents[1]

NUM_CELLS = len(BATCHES) * len(CONTEXTS)
NUM_POINTS = NUM_CELLS * (len(GAMMAS) + 1)  # the target step of a cell is a point of gamma 0


def saved(tmp_path, **changed):
    """A calibration file that has seen no measurement, unless `fitted_on` says so."""
    path = tmp_path / "cal.json"
    make_calibration(**changed).save(path)
    return path


def run(main, capsys, *argv):
    """(exit code, stdout, stderr)"""
    code = main([str(token) for token in argv])
    shown = capsys.readouterr()
    return code, shown.out, shown.err


def run_json(main, capsys, *argv):
    code, out, _ = run(main, capsys, *argv, "--json")
    return code, json.loads(out)


# validate


def test_perfect_predictions_pass_with_every_decision_right(tmp_path, capsys):
    cal, sweep = saved(tmp_path), write_sweep(tmp_path / "sweep.csv", make_calibration())
    code, report = run_json(validate.main, capsys, "--calibration", cal, "--sweep", sweep)
    assert code == 0 and report["passed"] and report["failures"] == []
    for kind, num_times in {"target": 12, "draft": 24, "verify": 24, "cycle": 24}.items():
        assert report["scores"][kind] == {
            "mape": pytest.approx(0, abs=1e-12),
            "r2": pytest.approx(1),
            "num_scored": num_times,
        }
    # 24 cycles x 18 acceptances
    assert report["toggle"]["overall"] == 1.0 and report["toggle"]["num_decisions"] == 24 * 18
    assert report["toggle"]["num_near_boundary"] > 0 and report["toggle"]["near_boundary"] == 1.0
    assert (report["num_points_scored"], report["num_points_fitted_on"], report["num_points_left_out"]) == (
        NUM_POINTS,
        0,
        0,
    )


def test_the_mape_is_the_error_that_was_put_in_and_common_errors_leave_decisions_right(tmp_path, capsys):
    # every prediction is 5% above its measured time, the same for all, so all speed-ups are right
    cal, sweep = saved(tmp_path), write_sweep(tmp_path / "sweep.csv", make_calibration(), too_high=0.05)
    code, report = run_json(validate.main, capsys, "--calibration", cal, "--sweep", sweep)
    assert code == 0
    assert [report["scores"][kind]["mape"] for kind in report["scores"]] == pytest.approx([0.05] * 4)
    assert report["toggle"]["overall"] == 1.0


@pytest.mark.parametrize(
    ("flag", "value", "failing"),
    [
        ("--max-target-mape", "0.049", "target: MAPE 5.00% is above --max-target-mape 4.90%"),
        ("--max-draft-mape", "0.049", "draft: MAPE"),
        ("--max-verify-mape", "0.049", "verify: MAPE"),
        ("--max-cycle-mape", "0.049", "cycle: MAPE"),
        ("--min-r2", "0.99999", "R2"),
    ],
)
def test_a_missed_threshold_is_exit_code_1_and_named(tmp_path, capsys, flag, value, failing):
    cal, sweep = saved(tmp_path), write_sweep(tmp_path / "sweep.csv", make_calibration(), too_high=0.05)
    code, out, err = run(validate.main, capsys, "--calibration", cal, "--sweep", sweep, flag, value)
    assert code == 1 and failing in err and "OUTSIDE" in out


def test_wrong_decisions_fail_even_where_times_are_within_their_thresholds(tmp_path, capsys):
    # measured cycles twice as long as predicted: speculation is believed to pay where it does not
    rows = [dataclasses.replace(row, cycle_s=2 * row.cycle_s) for row in make_rows(make_calibration())]
    for row in rows:
        append(tmp_path / "sweep.csv", row)
    argv = [
        "--calibration",
        saved(tmp_path),
        "--sweep",
        tmp_path / "sweep.csv",
        "--max-cycle-mape",
        1,
        "--min-r2",
        -1e9,
    ]
    code, report = run_json(validate.main, capsys, *argv)
    assert code == 1 and report["toggle"]["overall"] < 0.93
    assert [failure.partition(":")[0] for failure in report["failures"]] == ["toggle"]
    assert run(validate.main, capsys, *argv, "--min-toggle-accuracy", 0)[0] == 0


def test_contaminated_times_are_scored_apart_and_do_not_decide_unless_asked_to(tmp_path, capsys):
    # one draft step of a long context in a third of its time: a step does not get faster with its context
    rows = [
        dataclasses.replace(row, draft_step_s=row.draft_step_s / 3) if (row.batch, row.context, row.gamma) == (8, 4096, 7) else row
        for row in make_rows(make_calibration())
    ]
    write(tmp_path / "sweep.csv", rows)
    argv = ["--calibration", saved(tmp_path), "--sweep", tmp_path / "sweep.csv", "--max-draft-mape", 0.01]
    code, report = run_json(validate.main, capsys, *argv)
    clean = report["without_contaminated"]
    assert (code, report["judged"], clean["num_contaminated_times"]) == (0, "without contaminated", 1)
    # predicted is 3 times the measured, an error of 2 among 24 times
    assert report["scores"]["draft"] == {"mape": pytest.approx(2 / 24), "r2": pytest.approx(0, abs=1), "num_scored": 24}
    assert clean["scores"]["draft"] == {"mape": pytest.approx(0, abs=1e-12), "r2": pytest.approx(1), "num_scored": 23}
    code, report = run_json(validate.main, capsys, *argv, "--all-times")
    assert (code, report["judged"]) == (1, "all times") and "draft: MAPE 8.33%" in report["failures"][0]


def test_it_refuses_to_score_the_points_of_the_fit(tmp_path, capsys):
    sweep = write_sweep(tmp_path / "sweep.csv", make_calibration())
    cal = saved(tmp_path, fitted_on=read_sweep(sweep).timings)
    code, out, err = run(validate.main, capsys, "--calibration", cal, "--sweep", sweep, "--json")
    assert code == 1 and out == ""
    assert f"fitted on all of its {NUM_POINTS} points" in err and "--in-sample" in err and err.count("\n") == 1
    code, report = run_json(validate.main, capsys, "--calibration", cal, "--sweep", sweep, "--in-sample")
    assert code == 0 and report["in_sample"] and report["num_points_fitted_on"] == NUM_POINTS
    assert "IN SAMPLE" in run(validate.main, capsys, "--calibration", cal, "--sweep", sweep, "--in-sample")[1]


def test_of_a_sweep_fitted_in_part_it_scores_the_rest_and_says_how_many(tmp_path, capsys):
    path = write_sweep(tmp_path / "sweep.csv", make_calibration())
    # all target steps and gamma 3 were fitted, gamma 7 held out
    fitted = [timing for timing in read_sweep(path).timings if timing.gamma in (0, 3)]
    cal = saved(tmp_path, fitted_on=fitted)
    code, report = run_json(validate.main, capsys, "--calibration", cal, "--sweep", path)
    assert code == 0
    assert (report["num_points_scored"], report["num_points_left_out"]) == (NUM_CELLS, 2 * NUM_CELLS)
    assert {kind: scores["num_scored"] for kind, scores in report["scores"].items()} == dict.fromkeys(("draft", "verify", "cycle"), 12)
    assert report["toggle"]["num_decisions"] == 12 * 18  # by the measured target steps of the cells
    assert f"{NUM_CELLS} scored; {2 * NUM_CELLS} left out" in run(validate.main, capsys, "--calibration", cal, "--sweep", path)[1]


def test_a_fitted_point_is_known_again_in_another_file_and_a_new_measurement_of_it_is_not(tmp_path, capsys):
    rows = make_rows(make_calibration())
    for row in rows[: len(rows) // 2]:
        append(tmp_path / "first.csv", row)
    cal = saved(tmp_path, fitted_on=read_sweep(tmp_path / "first.csv").timings)
    for row in reversed(rows):  # the sweep went on, and was sorted anew
        append(tmp_path / "whole.csv", row)
    _, report = run_json(validate.main, capsys, "--calibration", cal, "--sweep", tmp_path / "whole.csv")
    assert report["num_points_left_out"] == NUM_POINTS / 2
    again = write_sweep(tmp_path / "again.csv", make_calibration(), too_high=0.01)
    _, report = run_json(validate.main, capsys, "--calibration", cal, "--sweep", again)
    assert report["num_points_left_out"] == 0 and report["num_points_scored"] == NUM_POINTS


@pytest.mark.parametrize(
    ("column", "value"),
    [("model", "Other-8B"), ("device", "Other GPU"), ("quant", "w8a8"), ("tensor_parallel_size", 2)],
)
@pytest.mark.parametrize("module", [validate, plot])
def test_a_sweep_of_something_else_is_refused(tmp_path, capsys, column, value, module):
    sweep = write_sweep(tmp_path / "sweep.csv", make_calibration(), **{column: value})
    argv = [
        "--calibration",
        saved(tmp_path),
        "--sweep",
        sweep,
        *(["--out", tmp_path / "map.png"] if module is plot else []),
    ]
    code, out, err = run(module.main, capsys, *argv)
    assert code == (2 if module is plot else 1) and out == ""
    assert f"{sweep}: {column} is {value!r}, the calibration is for" in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--calibration", "none.json", "--sweep", "sweep.csv"], "none.json: cannot be read"),
        (["--calibration", "cal.json", "--sweep", "none.csv"], "none.csv: cannot be read"),
        (["--calibration", "cal.json", "--sweep", "cal.json"], "cal.json, line 1: unknown column"),
        (["--calibration", "sweep.csv", "--sweep", "sweep.csv"], "sweep.csv: no calibration: line 1 is not JSON"),
        (["--calibration", "cal.json", "--sweep", "nan.csv"], "nan.csv, line 2: cycle_s is 'nan'"),
        (["--calibration", "cal.json"], "required: --sweep"),
        (["--calibration", "cal.json", "--sweep", "sweep.csv", "--min-r2", "two"], "--min-r2: 'two' is no number"),
        (["--calibration", "cal.json", "--sweep", "sweep.csv", "--in-sampel"], "unrecognized arguments: --in-sampel"),
    ],
)
def test_every_error_of_validate_is_one_line_and_exit_code_1(tmp_path, capsys, monkeypatch, argv, expected):
    saved(tmp_path)
    text = write_sweep(tmp_path / "sweep.csv", make_calibration()).read_text()
    header, first = text.splitlines()[:2]
    cells = dict(zip(header.split(","), first.split(","), strict=True)) | {"cycle_s": "nan"}
    (tmp_path / "nan.csv").write_text(f"{header}\n{','.join(cells.values())}\n")
    monkeypatch.chdir(tmp_path)
    code, out, err = run(validate.main, capsys, *argv, "--json")
    assert (code, out) == (1, "") and expected in err and err.count("\n") == 1 and err.startswith("calib.validate: ")


# predict

POINT = ("--batch", 16, "--seq", 2048, "--gamma", 7, "--acceptance", 0.9)


def test_predict_prints_what_the_cost_model_says(tmp_path, capsys):
    code, shown = run_json(predict.main, capsys, "--calibration", saved(tmp_path), *POINT)
    costs = make_calibration().cost_model
    target_s, draft_s, verify_s = (
        costs.target_step_s(16, 2048),
        costs.draft_step_s(16, 2048),
        costs.verify_step_s(16, 2048, 7),
    )
    assert code == 0
    assert (shown["target_step_s"], shown["draft_step_s"], shown["verify_step_s"]) == (target_s, draft_s, verify_s)
    assert shown["cycle_s"] == pytest.approx(7 * draft_s + verify_s)
    # (1 - 0.9^8) / (1 - 0.9)
    assert shown["mean_acceptance_length"] == pytest.approx(5.6953279)
    assert shown["speedup"] == pytest.approx(5.6953279 * target_s / shown["cycle_s"])


def test_the_decision_turns_at_one_plus_margin(tmp_path, capsys):
    cal = saved(tmp_path)
    point = (*POINT, "--acceptance", 0.97)
    gain = run_json(predict.main, capsys, "--calibration", cal, *point)[1]["speedup"]
    assert gain > 1
    for margin, decision in ((gain - 1 - 1e-6, "speculate"), (gain - 1 + 1e-6, "plain")):
        assert run_json(predict.main, capsys, "--calibration", cal, *point, "--margin", margin)[1]["decision"] == decision


def test_identical_prompts_read_their_shared_context_once(tmp_path, capsys):
    cal = saved(tmp_path)
    distinct = run_json(predict.main, capsys, "--calibration", cal, *POINT)[1]
    identical = run_json(predict.main, capsys, "--calibration", cal, *POINT, "--prompts", "identical")[1]
    assert identical["target_step_s"] < distinct["target_step_s"]


def test_predict_for_people_is_in_milliseconds(tmp_path, capsys):
    cal = saved(tmp_path)
    seconds = run_json(predict.main, capsys, "--calibration", cal, *POINT)[1]["target_step_s"]
    code, out, _ = run(predict.main, capsys, "--calibration", cal, *POINT)
    assert code == 0 and f"{1000 * seconds:.3f} ms" in out and MODEL in out and "decision" in out


@pytest.mark.parametrize(
    ("flag", "value"),
    [("--batch", "0"), ("--seq", "-1"), ("--gamma", "0"), ("--gamma", "99"), ("--acceptance", "1.1"), ("--acceptance", "nan"),
     ("--batch", "many"), ("--margin", "nan"), ("--prompts", "some")],
)  # fmt: skip
def test_a_bad_flag_of_predict_is_one_line_and_exit_code_2(tmp_path, capsys, flag, value):
    code, out, err = run(predict.main, capsys, "--calibration", saved(tmp_path), *POINT, flag, value)
    assert (code, out) == (2, "") and flag in err and repr(value) in err and err.count("\n") == 1


# plot


def png_size(path):
    content = path.read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    return int.from_bytes(content[16:20], "big"), int.from_bytes(content[20:24], "big")


def test_plot_draws_the_map_alone_and_the_map_with_residuals(tmp_path, capsys):
    sweep = write_sweep(tmp_path / "sweep.csv", make_calibration(), too_high=0.05)
    cal = saved(tmp_path, fitted_on=read_sweep(sweep).timings)
    assert run(plot.main, capsys, "--calibration", cal, "--out", tmp_path / "map.png")[0] == 0
    code, out, _ = run(plot.main, capsys, "--calibration", cal, "--sweep", sweep, "--out", tmp_path / "both.png")
    assert code == 0 and str(tmp_path / "both.png") in out
    map_width, map_height = png_size(tmp_path / "map.png")
    width, height = png_size(tmp_path / "both.png")
    assert width == map_width and height > 1.5 * map_height


def test_plot_of_a_single_cell_at_a_short_context(tmp_path, capsys):
    row = dataclasses.replace(make_rows(make_calibration())[0], batch=1, context=32)
    append(tmp_path / "sweep.csv", row)
    argv = [
        "--calibration",
        saved(tmp_path),
        "--sweep",
        tmp_path / "sweep.csv",
        "--acceptance",
        "0.9",
        "--out",
        tmp_path / "one.png",
    ]
    assert run(plot.main, capsys, *argv)[0] == 0
    png_size(tmp_path / "one.png")


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--out", "map.svg"], "--out: map.svg does not end in .png"),
        (["--out", "none/map.png"], "--out: none/map.png cannot be written"),
        (["--out", "map.png", "--acceptance", "0.9,2"], "--acceptance: '2' is no number of 0 to 1"),
        (["--out", "map.png", "--gamma", "0"], "--gamma: '0' is no whole number of 1 to 16"),
        (["--out", "map.png", "--sweep", "none.csv"], "none.csv: cannot be read"),
    ],
)
def test_a_bad_flag_of_plot_is_one_line_and_exit_code_2(tmp_path, capsys, monkeypatch, argv, expected):
    saved(tmp_path)
    monkeypatch.chdir(tmp_path)
    code, out, err = run(plot.main, capsys, "--calibration", "cal.json", *argv)
    assert (code, out) == (2, "") and expected in err and err.count("\n") == 1


@pytest.mark.parametrize("name", ["validate", "predict", "plot"])
def test_each_command_runs_as_a_module_and_explains_itself(name):
    shown = subprocess.run([sys.executable, "-m", f"calib.{name}", "--help"], cwd=ROOT, check=True, capture_output=True, text=True)
    assert f"python -m calib.{name} --calibration CAL.json" in shown.stdout and "--json" in shown.stdout or name == "plot"


@pytest.mark.parametrize(
    "one, other, alike",
    [
        ("llama-3.1-8b", "Llama-3.1-8B-Instruct", True),
        ("qwen2.5-14b", "Qwen2.5-14B", True),
        ("qwen2.5-7b", "Qwen2.5-14B", False),
        ("", "Qwen", False),
    ],
)
def test_a_transferred_calibration_is_known_by_the_beginning_of_its_name(one, other, alike):
    from calib.validate import _alike

    assert _alike(one, other) == _alike(other, one) == alike
