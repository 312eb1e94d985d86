"""From SimpleRL-Zoo parquet to training: prepared prompts, chat template and the mathematics reward in a self-speculating GRPO run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from models import build_random_policy
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from zoo_fixture import byte_tokenizer, write_zoo

from data_prep import simplerl_zoo
from openrlhf_sd.metrics import read_rows
from openrlhf_sd.run_records import load_run

pytestmark = pytest.mark.slow

MATH_REWARD = Path(__file__).parents[2] / "examples" / "math_reward.py"
VOCAB_SIZE = 512
STEPS = 2
PROMPTS = 4
SAMPLES = 4
SEED = 7
PROBLEMS = [(f"What is ${n} - {n - n % 2}$?" + " Think." * n, str(n % 2)) for n in range(STEPS * PROMPTS)]
"""Prompts of eight different lengths, so that their tokens say that all of them were rolled out."""


@pytest.fixture(scope="module")
def guesser(tmp_path_factory) -> Path:
    r"""A random policy half of whose tokens are \boxed{0} or \boxed{1} in other words, so that rewards are neither all 0 nor all 1."""
    folder = build_random_policy(tmp_path_factory.mktemp("guesser"), tied=True, vocab_size=VOCAB_SIZE)
    num_boxes = VOCAB_SIZE - len(byte_tokenizer())
    boxes = [rf"\boxed{{\frac{{{n % 2 * n}}}{{{n}}}}}" for n in range(1, num_boxes + 1)]
    tokenizer = byte_tokenizer(more_tokens=boxes)
    assert len(tokenizer) == VOCAB_SIZE
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data(guesser, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("zoo")
    source = write_zoo(folder / "source", "hard", PROBLEMS, PROBLEMS[:2])
    out = folder / "data"
    flags = ("--level", "hard", "--model", "qwen", "--out", out, "--source", source, "--tokenizer", guesser)
    assert simplerl_zoo.main(list(map(str, flags))) == 0
    return out


def launch_flags(run_dir: Path, policy: Path, data: Path) -> list[str]:
    flags = [
        *("--self-spec", "fixed", "--self-spec.gamma", 3, "--self-spec.run_dir", run_dir),
        *("--actor.model_name_or_path", policy, "--reward.remote_url", MATH_REWARD),
        *("--data.prompt_dataset", data / "train.jsonl", "--data.input_key", "input", "--data.label_key", "label"),
        *("--data.apply_chat_template", "--eval.dataset", data / "test.jsonl", "--eval.steps", 1, "--eval.n_samples_per_prompt", 1),
        *("--data.max_len", 320, "--rollout.max_new_tokens", 24, "--data.max_samples", STEPS * PROMPTS),
        *("--rollout.batch_size", PROMPTS, "--rollout.n_samples_per_prompt", SAMPLES, "--rollout.micro_batch_size", 8),
        *("--train.batch_size", PROMPTS * SAMPLES, "--train.micro_batch_size", 8),
        *("--vllm.num_engines", 1, "--vllm.enforce_eager", "--vllm.gpu_memory_utilization", 0.3),
        *("--actor.num_gpus_per_node", 1, "--ref.num_gpus_per_node", 1, "--ds.attn_implementation", "sdpa"),
        *("--algo.advantage.estimator", "group_norm", "--algo.advantage.is_correction_level", "token"),
        *("--train.seed", SEED, "--algo.kl.init_coef", 0, "--ckpt.output_dir", run_dir / "trained", "--ckpt.path", run_dir / "ckpt"),
    ]
    return list(map(str, flags))


@pytest.fixture(scope="module")
def run_dir(guesser, data, tmp_path_factory) -> Path:
    run_dir = tmp_path_factory.mktemp("training") / "run"
    command = [sys.executable, "-m", "openrlhf_sd.launch", *launch_flags(run_dir, guesser, data)]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert finished.returncode == 0, finished.stdout[-6000:] + finished.stderr[-3000:]
    return run_dir


def test_run_finished_and_speculated(run_dir):
    assert json.loads((run_dir / "provenance.json").read_text())["status"] == "finished"
    rows, _ = read_rows(run_dir / "metrics.jsonl")
    assert [row["num_responses"] for row in rows] == [PROMPTS * SAMPLES] * STEPS
    assert all(row["rollout/sd/num_drafts"] > 0 for row in rows)


def test_prepared_prompts_are_what_was_rolled_out_in_the_order_of_the_seed(run_dir, guesser, data):
    """Without the seed (openrlhf_sd/prompt_order.py) only the sum over all steps would be certain."""
    from torchdata.stateful_dataloader import StatefulDataLoader
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(guesser)
    chats = [json.loads(line)["input"] for line in (data / "train.jsonl").read_text().splitlines()]
    prompts = [tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) for chat in chats]
    num_tokens = [len(ids) for ids in tokenizer(prompts, add_special_tokens=False)["input_ids"]]
    assert len(set(num_tokens)) == STEPS * PROMPTS
    torch.manual_seed(SEED)
    order = [int(batch) for batch in StatefulDataLoader(range(STEPS * PROMPTS), batch_size=1, shuffle=True)]
    rows, _ = read_rows(run_dir / "metrics.jsonl")
    assert [row["num_prompt_tokens"] for row in rows] == [
        SAMPLES * sum(num_tokens[index] for index in order[step * PROMPTS : (step + 1) * PROMPTS]) for step in range(STEPS)
    ]


def test_rewards_are_rule_based_and_their_logs_arrive(run_dir):
    scalars = load_run(run_dir).scalars
    rewards = list(scalars["train/reward"].values())
    assert len(rewards) == STEPS
    assert all(0 <= reward <= 1 for reward in rewards)
    # 16 responses per step, nearly all with a box, half of the boxes right: none or all right has a chance of 1 in 30,000
    assert all(0 < reward < 1 for reward in rewards)
    assert all(rate > 0.5 for rate in scalars["train/has_box"].values())
    assert set(scalars["train/timed_out"].values()) == set(scalars["train/unchecked"].values()) == {0.0}


def test_evaluation_used_the_prepared_test_split(run_dir):
    [events] = (run_dir / "tensorboard").rglob("events.out.tfevents.*")
    evaluated = EventAccumulator(str(events))
    evaluated.Reload()
    assert [event.value for event in evaluated.Scalars("eval/eval_num_samples")] == [2.0] * STEPS
    assert all(0 <= event.value <= 1 for event in evaluated.Scalars("eval/eval_default_pass1"))
