"""A training that changes nothing samples from one policy all along: by the very path of a training, with weight syncs, requests that
arrive one by one and a drafter quantized anew each time, tokens must still be as surprising as the policy says itself."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from surprise import surprise
from training import QUICKSTART, make_task, train
from transformers import AutoModelForCausalLM, AutoTokenizer

from openrlhf_sd.metrics import read_rows

STEPS = 4
PROMPTS, SAMPLES = 16, 8
MAX_TOKENS = 480

REWARD = """
import json, sys
sys.path.insert(0, {quickstart!r})
import reward

def reward_func(queries, prompts, labels):
    with open({responses!r}, "a") as lines:
        for pair in zip(prompts, queries):
            lines.write(json.dumps(pair) + "\\n")
    return reward.reward_func(queries, prompts, labels)
"""


@pytest.mark.slow
def test_what_a_training_samples_is_what_its_policy_says(measured, warm_policy, tmp_path):
    responses = tmp_path / "responses.jsonl"
    (tmp_path / "noting_reward.py").write_text(REWARD.format(quickstart=str(QUICKSTART), responses=str(responses)))
    run_dir = train(
        *(tmp_path / "run", warm_policy, make_task(tmp_path / "task"), "--self-spec", "fixed", "--self-spec.gamma", 3),
        *("--self-spec.quant", "w8a8", "--actor.adam.lr", 0, "--reward.remote_url", tmp_path / "noting_reward.py"),
        *("--rollout.batch_size", PROMPTS, "--rollout.n_samples_per_prompt", SAMPLES, "--train.batch_size", PROMPTS * SAMPLES),
        *("--data.max_len", 512, "--rollout.max_new_tokens", MAX_TOKENS, "--data.max_samples", STEPS * PROMPTS),
        steps=STEPS,
    )
    rows, _ = read_rows(run_dir / "metrics.jsonl")
    assert len(rows) == STEPS and all(row["rollout/sd/num_accepted_tokens"] > row["num_output_tokens"] / 2 for row in rows)
    pairs = [json.loads(line) for line in responses.read_text().splitlines()]
    assert len(pairs) == STEPS * PROMPTS * SAMPLES
    found = surprise(drawn(warm_policy, pairs))
    measured(f"frozen training, w8a8, gamma 3: {found}")
    assert abs(found.z_score) < 4
    assert found.rare_p_value > 0.001


def drawn(policy: Path, pairs: list[tuple[str, str]]):
    """What `surprise` takes, of prompts and of prompts with their responses."""
    tokenizer = AutoTokenizer.from_pretrained(policy)
    model = AutoModelForCausalLM.from_pretrained(policy, dtype=torch.float32)
    for prompt, query in pairs:
        num_prompt = len(tokenizer.encode(prompt, add_special_tokens=False))
        ids = torch.tensor([tokenizer.encode(query, add_special_tokens=False)])
        with torch.no_grad():
            logits = model(ids).logits[0]
        yield logits[num_prompt - 1 : -1], ids[0, num_prompt:]
