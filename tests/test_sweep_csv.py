"""Sweep files: both formats become the same timings; everything doubtful is one error that names file and line."""

import csv
import dataclasses
import hashlib

import pytest

from calib.sweep_csv import (
    OWN_COLUMNS,
    PUBLISHED_COLUMNS,
    SweepRow,
    Timing,
    append,
    point_digests,
    read_rows,
    read_sweep,
    write,
)
from openrlhf_sd.config import SelfSpecError

ROW = SweepRow(
    device="Some CPU",
    model="tiny, the second",  # a comma: the writer must quote it
    quant="w8a8",
    tensor_parallel_size=1,
    vllm="0.29.0",
    prompts="distinct",
    logprobs=0,
    batch=4,
    context=128,
    gamma=3,
    target_step_s=0.020,
    target_step_sd_s=0.021,
    draft_step_s=0.0123456789012345,
    verify_step_s=0.030,
    cycle_s=0.066,
    cycle_spread=0.04,
    num_cycles=50,
)

PUBLISHED = """\
model,batch,seq,gamma,mode,mean_ms,median_ms,std_ms,min_ms,max_ms,n_samples
M,0,0,0,target_decode,9.0,9.0,0.1,8.0,10.0,200
M,1,256,0,target_decode,9.9,10.0,0.1,9.0,11.0,800
M,1,256,7,target_decode_sd,10.4,10.5,0.1,9.0,11.0,800
M,1,256,7,drafter_decode,4.1,4.0,0.1,3.0,5.0,800
M,1,256,7,target_verify,11.9,12.0,0.1,11.0,13.0,800
"""


def saved(tmp_path, text):
    path = tmp_path / "sweep.csv"
    path.write_text(text)
    return path


def error_of(path):
    with pytest.raises(SelfSpecError) as caught:
        read_sweep(path)
    message = str(caught.value)
    assert str(path) in message and "\n" not in message
    return message


def test_published_rows_become_median_seconds_and_aggregates_are_left_out(tmp_path):
    path = saved(tmp_path, PUBLISHED)
    sweep = read_sweep(path)
    assert sweep.timings == (
        Timing("target", 1, 256, 0, 0.010),
        Timing("target_sd", 1, 256, 7, 0.0105),
        Timing("draft", 1, 256, 7, 0.004),
        Timing("verify", 1, 256, 7, 0.012),
    )
    assert (sweep.model, sweep.device, sweep.quant, sweep.tensor_parallel_size) == ("M", None, None, None)
    assert not sweep.distinct_prompts and sweep.prompts == "identical"
    assert sweep.sha256 == hashlib.sha256(PUBLISHED.encode()).hexdigest()


def test_columns_are_found_by_name_not_by_place(tmp_path):
    rows = [line.split(",") for line in PUBLISHED.splitlines()]
    shuffled = "\n".join(",".join(reversed(row)) for row in rows)
    assert read_sweep(saved(tmp_path, shuffled)).timings == read_sweep(saved(tmp_path, PUBLISHED)).timings


def test_own_row_survives_the_file_to_the_last_digit(tmp_path):
    path = tmp_path / "own.csv"
    bare = dataclasses.replace(ROW, gamma=0, **dict.fromkeys(OWN_COLUMNS[11:]), target_step_s=0.022)
    write(path, [ROW, bare])
    assert read_rows(path) == [ROW, bare]


def test_own_columns_are_the_documented_ones(tmp_path):
    path = tmp_path / "own.csv"
    write(path, [ROW])
    assert path.read_text().splitlines()[0] == (
        "device,model,quant,tensor_parallel_size,vllm,prompts,logprobs,batch,context,gamma,target_step_s,target_step_sd_s,"
        "draft_step_s,verify_step_s,cycle_s,cycle_spread,num_cycles"
    )


def test_appended_rows_make_the_same_file_as_written_ones(tmp_path):
    rows = [ROW, dataclasses.replace(ROW, gamma=7)]
    write(tmp_path / "written.csv", rows)
    for row in rows:
        append(tmp_path / "appended.csv", row)
    assert (tmp_path / "appended.csv").read_bytes() == (tmp_path / "written.csv").read_bytes()


def test_a_target_time_repeated_over_gammas_becomes_its_median(tmp_path):
    path = tmp_path / "own.csv"
    # median of 0.020, 0.026, 0.021 is 0.021
    times = {1: 0.020, 3: 0.026, 7: 0.021}
    write(path, [dataclasses.replace(ROW, gamma=gamma, target_step_s=seconds) for gamma, seconds in times.items()])
    sweep = read_sweep(path)
    assert [timing for timing in sweep.timings if timing.kind == "target"] == [Timing("target", 4, 128, 0, 0.021)]
    assert Timing("cycle", 4, 128, 7, 0.066) in sweep.timings
    assert (sweep.device, sweep.quant, sweep.tensor_parallel_size, sweep.prompts) == ("Some CPU", "w8a8", 1, "distinct")


def test_empty_cells_are_times_not_taken(tmp_path):
    path = tmp_path / "own.csv"
    write(path, [dataclasses.replace(ROW, cycle_s=None, draft_step_s=None)])
    assert {timing.kind for timing in read_sweep(path).timings} == {"target", "target_sd", "verify"}


def test_a_digest_follows_what_was_measured_at_a_point_and_nothing_else(tmp_path):
    timings = read_sweep(saved(tmp_path, PUBLISHED)).timings
    digests = point_digests(timings)
    assert set(digests) == {(1, 256, 0), (1, 256, 7)}
    assert point_digests(reversed(timings)) == digests
    changed = point_digests([*timings[:-1], dataclasses.replace(timings[-1], seconds=0.0121)])
    assert changed[1, 256, 0] == digests[1, 256, 0] and changed[1, 256, 7] != digests[1, 256, 7]


LAST_PUBLISHED = "M,1,256,7,target_verify,11.9,12.0,0.1,11.0,13.0,800"

SPOILED_PUBLISHED = {
    "unknown mode": (LAST_PUBLISHED, "M,1,256,7,prefill,11.9,12.0,0.1,11.0,13.0,800", "line 6: unknown mode 'prefill'"),
    "negative time": ("11.9,12.0", "11.9,-12.0", "line 6: median_ms is '-12.0'"),
    "nan time": ("11.9,12.0", "11.9,nan", "line 6: median_ms is 'nan'"),
    "infinite time": ("11.9,12.0", "11.9,inf", "line 6: median_ms is 'inf'"),
    "zero time": ("11.9,12.0", "11.9,0", "line 6: median_ms is '0'"),
    "nan mean beside a good median": ("11.9,12.0", "nan,12.0", "line 6: mean_ms is 'nan'"),
    "word for a time": ("11.9,12.0", "11.9,fast", "line 6: median_ms is 'fast'"),
    "empty time": ("11.9,12.0", "11.9,", "line 6: median_ms is ''"),
    "fractional batch": (LAST_PUBLISHED, LAST_PUBLISHED.replace("M,1,", "M,1.5,"), "line 6: batch is '1.5'"),
    "zero context": (LAST_PUBLISHED, LAST_PUBLISHED.replace(",256,", ",0,"), "line 6: seq is '0'"),
    "two models": (LAST_PUBLISHED, LAST_PUBLISHED.replace("M,", "N,"), "line 6: model 'N' in a sweep of another model"),
    "repeated point": (LAST_PUBLISHED, f"{LAST_PUBLISHED}\n{LAST_PUBLISHED}", "line 7: verify 1 256 7 is given twice"),
    "short line": (LAST_PUBLISHED, "M,1,256", "line 6: 3 cells where the header has 11"),
    "draft at gamma 0": (LAST_PUBLISHED, LAST_PUBLISHED.replace(",7,", ",0,"), "line 6: a verify time at gamma 0"),
    "unknown column": ("n_samples", "samples", "line 1: unknown column 'samples'"),
    "missing column": ("gamma,mode,mean_ms", "gamma,mode,min_ms", "line 1: no column 'mean_ms'"),
    "no mode column": (",mode,", ",kind,", "line 1: unknown column 'kind'"),
    "column twice": ("n_samples", "n_samples,gamma", "line 1: a column is given twice"),
}


@pytest.mark.parametrize("name", SPOILED_PUBLISHED)
def test_a_spoiled_published_file_is_one_error_with_its_line(tmp_path, name):
    good, bad, expected = SPOILED_PUBLISHED[name]
    assert good in PUBLISHED
    assert expected in error_of(saved(tmp_path, PUBLISHED.replace(good, bad)))


SPOILED_OWN = {
    "negative time": ({"cycle_s": "-0.1"}, "line 2: cycle_s is '-0.1'"),
    "nan time": ({"verify_step_s": "nan"}, "line 2: verify_step_s is 'nan'"),
    "unknown prompts": ({"prompts": "some"}, "line 2: unknown prompts 'some'"),
    "no device": ({"device": ""}, "line 2: device is empty"),
    "zero batch": ({"batch": "0"}, "line 2: batch is '0'"),
    "no tensor parallel": ({"tensor_parallel_size": "0"}, "line 2: tensor_parallel_size is '0'"),
    "a cycle that drafts nothing": ({"gamma": "0"}, "line 2: a draft time at gamma 0"),
    "nothing measured": (dict.fromkeys(OWN_COLUMNS[10:], ""), "line 2: no time in it"),
}


def own_text(*rows):
    lines = [OWN_COLUMNS, *([row[column] for column in OWN_COLUMNS] for row in rows)]
    return "\n".join(",".join(line) for line in lines) + "\n"


def own_cells(**changed):
    cells = {column: str(getattr(ROW, column)) for column in OWN_COLUMNS} | {"model": "tiny"}
    return cells | changed


@pytest.mark.parametrize("name", SPOILED_OWN)
def test_a_spoiled_own_file_is_one_error_with_its_line(tmp_path, name):
    changed, expected = SPOILED_OWN[name]
    assert expected in error_of(saved(tmp_path, own_text(own_cells(**changed))))


@pytest.mark.parametrize(
    ("column", "other"), [("model", "big"), ("device", "GPU"), ("quant", "w4"), ("prompts", "identical"), ("logprobs", 1)]
)
def test_rows_of_two_machines_models_or_drafters_do_not_mix(tmp_path, column, other):
    path = saved(tmp_path, own_text(own_cells(), own_cells(gamma="7", **{column: str(other)})))
    assert f"line 3: {column} {other!r} in a sweep of" in error_of(path)


def test_a_point_measured_twice_is_an_error(tmp_path):
    assert "line 3: 4 128 3 is given twice" in error_of(saved(tmp_path, own_text(own_cells(), own_cells())))


def test_files_without_rows_and_no_files_are_errors(tmp_path):
    assert "is empty" in error_of(saved(tmp_path, ""))
    assert "has a header and no rows" in error_of(saved(tmp_path, ",".join(PUBLISHED_COLUMNS) + "\n"))
    assert "no times in it" in error_of(saved(tmp_path, "\n".join(PUBLISHED.splitlines()[:2])))
    assert "cannot be read" in error_of(tmp_path / "none.csv")
    assert "cannot be read" in error_of(tmp_path)
    binary = tmp_path / "binary.csv"
    binary.write_bytes(b"\xff\xfe\x00\x01")
    assert "not a text file" in error_of(binary)


def test_resuming_refuses_a_published_file(tmp_path):
    with pytest.raises(SelfSpecError, match="is a published sweep"):
        read_rows(saved(tmp_path, PUBLISHED))


def test_a_file_saved_by_a_spreadsheet_reads_the_same(tmp_path):
    path = tmp_path / "sheet.csv"
    with path.open("w", encoding="utf-8-sig", newline="") as file:  # a byte-order mark, CRLF, quotes everywhere
        csv.writer(file, quoting=csv.QUOTE_ALL).writerows(line.split(",") for line in PUBLISHED.splitlines())
    assert read_sweep(path).timings == read_sweep(saved(tmp_path, PUBLISHED)).timings
