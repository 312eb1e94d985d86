"""The per-rollout record: counting, the row's names, writing and reading back."""

import json
import math
from concurrent.futures import ThreadPoolExecutor

import pytest

from openrlhf_sd.metrics import SpecDecodeCounts, append_row, read_rows, rollout_row

CONTRACT_NAMES = {
    "rollout",
    "engine",
    "time",
    "timing/rollout_s",
    "timing/weight_sync_s",
    "timing/requantize_s",
    "num_responses",
    "num_prompt_tokens",
    "num_output_tokens",
    "rollout/sd/acceptance_rate",
    "rollout/sd/mean_acceptance_length",
    "rollout/sd/toggle_step",
    "rollout/sd/toggle_batch",
    "rollout/sd/gamma",
    "rollout/sd/num_drafts",
    "rollout/sd/num_draft_tokens",
    "rollout/sd/num_accepted_tokens",
    "rollout/sd/predicted_speedup",
    "rollout/sd/measured_speedup",
}


def row_of(counts=None, **values):
    measured = dict(
        rollout=4,
        engine=1,
        time_unix_s=1000.5,
        rollout_s=2.5,
        weight_sync_s=0.5,
        requantize_s=None,
        num_responses=8,
        num_prompt_tokens=80,
        num_output_tokens=400,
    )
    return rollout_row(**{**measured, **values}, counts=counts)


def test_counts_of_vllm_steps_with_different_gamma_add_up():
    # Two drafts of 3 tokens (3 and 1 accepted), then one of 1 token (0 accepted):
    # drafts 3, draft tokens 3+3+1 = 7, accepted 3+1+0 = 4; rate 4/7, length 1 + 4/3.
    # Position 0 was reached by 3 drafts and accepted in 2; position 1 by 2, in 1; position 2 by 2, in 1; no position 3.
    from vllm.v1.spec_decode.metrics import SpecDecodingStats

    three, one = SpecDecodingStats.new(3), SpecDecodingStats.new(1)
    three.observe_draft(num_draft_tokens=3, num_accepted_tokens=3)
    three.observe_draft(num_draft_tokens=3, num_accepted_tokens=1)
    one.observe_draft(num_draft_tokens=1, num_accepted_tokens=0)

    for first, second in ((three, one), (one, three)):
        counts = SpecDecodeCounts()
        counts.add(first)
        counts.add(second)
        assert counts == SpecDecodeCounts(3, 7, 4, [2, 1, 1], [3, 2, 2])
        assert counts.acceptance_rate == 4 / 7
        assert counts.mean_acceptance_length == 1 + 4 / 3
        assert [counts.acceptance_rate_pos(i) for i in range(4)] == [2 / 3, 1 / 2, 1 / 2, None]


def test_rates_are_none_when_nothing_was_drafted():
    counts = SpecDecodeCounts()
    assert (counts.acceptance_rate, counts.mean_acceptance_length, counts.acceptance_rate_pos(0)) == (None, None, None)


def test_adding_leaves_the_added_counts_alone():
    added = SpecDecodeCounts(1, 2, 1, [1, 0], [1, 1])
    total = SpecDecodeCounts()
    total.add(added)
    total.add(added)
    assert added == SpecDecodeCounts(1, 2, 1, [1, 0], [1, 1])
    assert total == SpecDecodeCounts(2, 4, 2, [2, 0], [2, 2])


def test_a_vanilla_row_has_the_contract_names_and_null_speculation():
    row = row_of()
    assert set(row) == CONTRACT_NAMES
    assert all(value is None for name, value in row.items() if name.startswith("rollout/sd/"))
    assert (row["rollout"], row["engine"], row["time"], row["timing/rollout_s"]) == (4, 1, 1000.5, 2.5)


def test_a_speculating_row_adds_one_name_per_position():
    row = row_of(SpecDecodeCounts(10, 20, 15, [9, 6], [10, 10]), gamma=2, toggle_step=7, toggle_batch=16)
    assert set(row) == CONTRACT_NAMES | {
        *("rollout/sd/acceptance_rate_pos_0", "rollout/sd/acceptance_rate_pos_1"),
        *("rollout/sd/num_drafts_pos_0", "rollout/sd/num_drafts_pos_1"),
    }
    assert row["rollout/sd/acceptance_rate"] == 0.75
    assert row["rollout/sd/mean_acceptance_length"] == 2.5
    assert (row["rollout/sd/acceptance_rate_pos_0"], row["rollout/sd/acceptance_rate_pos_1"]) == (0.9, 0.6)
    assert (row["rollout/sd/gamma"], row["rollout/sd/toggle_step"], row["rollout/sd/toggle_batch"]) == (2, 7, 16)


def test_a_row_whose_toggle_never_fired_counts_zero_drafts_and_null_rates():
    row = row_of(SpecDecodeCounts(), gamma=2)
    assert row["rollout/sd/num_drafts"] == 0
    assert row["rollout/sd/acceptance_rate"] is None


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_not_finite_is_refused_and_nothing_is_written(tmp_path, value):
    path = tmp_path / "metrics.jsonl"
    append_row(path, row_of())
    with pytest.raises(ValueError, match="write null"):
        append_row(path, row_of(rollout_s=value))
    assert read_rows(path) == ([row_of()], 0)


def test_rows_come_back_as_written(tmp_path):
    path = tmp_path / "metrics.jsonl"
    rows = [row_of(rollout=i) for i in range(3)]
    for row in rows:
        append_row(path, row)
    assert read_rows(path) == (rows, 0)
    assert path.read_bytes().count(b"\n") == 3


def test_a_file_cut_anywhere_in_its_last_line_keeps_all_whole_rows(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for rollout in range(3):
        append_row(path, row_of(rollout=rollout))
    whole = path.read_bytes()
    start = whole.rindex(b"\n", 0, -1) + 1
    for end in range(start + 1, len(whole) - 1):  # at least one byte of the last line, never its closing brace
        path.write_bytes(whole[:end])
        rows, num_unreadable = read_rows(path)
        assert ([row["rollout"] for row in rows], num_unreadable) == ([0, 1], 1)
    path.write_bytes(whole[:-1])  # only the line break is lost: the row is whole
    assert len(read_rows(path)[0]) == 3


def test_appending_after_a_cut_line_does_not_lose_the_new_row(tmp_path):
    path = tmp_path / "metrics.jsonl"
    append_row(path, row_of(rollout=0))
    append_row(path, row_of(rollout=1))
    path.write_bytes(path.read_bytes()[:-20])
    append_row(path, row_of(rollout=2))
    rows, num_unreadable = read_rows(path)
    assert ([row["rollout"] for row in rows], num_unreadable) == ([0, 2], 1)


def test_lines_that_are_no_rows_are_counted_not_raised(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'[1]\n{"rollout": NaN}\n\xff\xfe\n\n' + b"[" * 100_000 + b"\n" + json.dumps(row_of()).encode() + b"\n")
    assert read_rows(path) == ([row_of()], 4)


def test_engines_writing_at_once_do_not_interleave(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: append_row(path, row_of(rollout=i)), range(200)))
    rows, num_unreadable = read_rows(path)
    assert num_unreadable == 0
    assert sorted(row["rollout"] for row in rows) == list(range(200))
