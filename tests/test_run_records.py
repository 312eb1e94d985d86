"""Run folders read back: pooled engines, and records that are cut, repeated, skipped or not finite."""

import pytest
from run_folders import FIXED, FLAGS, make_run, write_description, write_events

from openrlhf_sd.config import SelfSpecError
from openrlhf_sd.metrics import SpecDecodeCounts, append_row, rollout_row
from openrlhf_sd.run_records import load_run


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


def test_cut_files_keep_their_whole_records(tmp_path):
    folder = make_run(tmp_path / "r", [4.0] * 8)
    metrics = folder / "metrics.jsonl"
    metrics.write_bytes(metrics.read_bytes()[:-30])
    (events,) = (folder / "tensorboard" / "run").iterdir()
    events.write_bytes(events.read_bytes()[:-10])  # cuts the last scalar, vllm_kl of step 8
    run = load_run(folder)
    assert list(run.rollouts) == [1, 2, 3, 4, 5, 6, 7]
    assert len(run.scalar("train/vllm_kl")) == 7
    assert len(run.scalar("train/timing/generation")) == 8
    assert any("1 unreadable line" in note for note in run.notes)


def test_events_elsewhere_are_this_runs_only(tmp_path):
    elsewhere = {"logger.tensorboard_dir": str(tmp_path / "all"), "logger.wandb.run_name": "mine"}
    write_description(tmp_path / "r", flags={**FLAGS, **elsewhere})
    write_events(tmp_path, [{"timing/generation": 1.0}] * 2, run_name="mine", tensorboard_dir="all")
    write_events(tmp_path, [{"timing/generation": 9.0}] * 3, run_name="another", tensorboard_dir="all")
    assert load_run(tmp_path / "r").scalar("train/timing/generation") == {1: 1.0, 2: 1.0}


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


def test_acceptance_of_a_run_that_drafted_nothing_is_a_gap_and_no_sign_of_divergence(tmp_path):
    folder = tmp_path / "r"
    write_description(folder)
    write_events(folder, [{"timing/generation": 1.0, "rollout/sd/acceptance_rate": float("nan")}])
    assert not any("NaN" in note for note in load_run(folder).notes)


def test_asynchronous_steps_use_the_trainers_wall_clock(tmp_path):
    run = load_run(make_run(tmp_path / "r", [1.0, 1.0], flags={**FLAGS, "train.async_enable": True}))
    assert run.step_s() == {1: 999.0, 2: 999.0}


def with_rows(folder, *changes):
    """A run folder of one row per change."""
    write_description(folder, arm="fixed", self_spec=FIXED)
    nothing = dict.fromkeys(("rollout_s", "weight_sync_s", "requantize_s"), 1.0)
    tokens = dict.fromkeys(("num_responses", "num_prompt_tokens", "num_output_tokens"), 1)
    for rollout, change in enumerate(changes):
        append_row(folder / "metrics.jsonl", {**rollout_row(rollout=rollout, engine=0, time_unix_s=1.0, **nothing, **tokens), **change})
    return folder


def test_a_reader_is_told_of_collapses_and_audits(tmp_path):
    audits = [{"num_responses": 4, "num_tokens": 100 * n, "mean_abs_diff": 0.001 * n, "max_abs_diff": 0.1 * n} for n in (1, 3)]
    rows = ({"rollout/sd/collapse": "31% ...: scheme too coarse", "audit": audits[0]}, {"audit": None}, {"audit": audits[1]})
    collapse, audited = load_run(with_rows(tmp_path / "r", *rows)).notes[:2]
    assert collapse.startswith("speculation went off in 1 of 3 rollouts") and collapse.endswith(
        "rollout 0 of engine 0: 31% ...: scheme too coarse"
    )
    # (100 x 0.001 + 300 x 0.003) / 400 = 0.0025
    assert audited.startswith("audit: 400 sampled tokens of 2 rollouts") and audited.endswith("difference| 0.0025, at most 0.300")


@pytest.mark.parametrize("change", [{"rollout/sd/collapse": 3}, {"audit": [1]}, {"audit": {"num_tokens": "x"}}])
def test_what_no_run_writes_is_refused(tmp_path, change):
    with pytest.raises(SelfSpecError, match="of rollout 0 is no .*; remove that row"):
        load_run(with_rows(tmp_path / "r", change))
