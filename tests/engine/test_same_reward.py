"""The quickstart's policy earns the same reward whether it drafts for itself or not, and its tokens are as surprising as it says itself:
same sampling, seen where it matters."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from drafts_by_request import drafting
from engines import sampled
from scipy.stats import chi2_contingency
from surprise import Surprise, surprise_of_outputs
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "quickstart"))
import task  # noqa: E402

pytestmark = pytest.mark.slow

NUM_PROMPTS = 1024
SEED = 77


def answers(llm, policy: Path, **more) -> tuple[int, Surprise]:
    """How many are right of one response each to NUM_PROMPTS problems, at temperature 1, as the quickstart's rollouts ask for them."""
    tokenizer = AutoTokenizer.from_pretrained(policy)
    problems = task.draw_problems(NUM_PROMPTS, SEED)
    prompts = [{"prompt_token_ids": tokenizer(problem.prompt, add_special_tokens=False)["input_ids"]} for problem in problems]
    params = sampled(task.MAX_RESPONSE_TOKENS, logprobs=1, min_tokens=1, stop_token_ids=[tokenizer.eos_token_id], **more)
    params.ignore_eos = False
    outputs = llm.generate(prompts, params, use_tqdm=False)
    texts = [tokenizer.decode(output.outputs[0].token_ids, skip_special_tokens=False) for output in outputs]
    num_right = sum(task.is_correct(text, problem.label) for text, problem in zip(texts, problems, strict=True))
    model = AutoModelForCausalLM.from_pretrained(policy, dtype=torch.float32)
    return num_right, surprise_of_outputs(model, outputs)


@pytest.fixture(scope="module")
def plain(plain_warm, warm_policy) -> tuple[int, Surprise]:
    return answers(plain_warm, warm_policy)


def test_plain_vllm_is_as_surprising_as_the_policy_says(measured, plain):
    """Or the next test would find fault with what speculation has no part in."""
    check(measured, "plain vLLM", plain[1])


@pytest.mark.parametrize("gamma", [3, 7])
def test_rewards_are_plain_vllms(measured, plain, speculating_warm, warm_policy, gamma):
    quant, llm = speculating_warm
    plain_right = plain[0]
    right, found = answers(llm, warm_policy, **drafting(gamma))
    table = [[plain_right, NUM_PROMPTS - plain_right], [right, NUM_PROMPTS - right]]
    p_value = chi2_contingency(table).pvalue
    shares = f"{right / NUM_PROMPTS:.3f} of the answers right, plain vLLM {plain_right / NUM_PROMPTS:.3f}"
    measured(f"{quant}, gamma {gamma}: {shares} (p={p_value:.3f})")
    assert p_value > 0.001 / 4
    check(measured, f"{quant}, gamma {gamma}", found)


def check(measured, arm: str, found: Surprise) -> None:
    measured(f"{arm}: {found}")
    assert abs(found.z_score) < 4
    assert found.rare_p_value > 0.001 / 4
