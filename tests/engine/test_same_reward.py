"""The quickstart's policy earns the same reward whether it drafts for itself or not: same sampling, seen where it matters."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from drafts_by_request import drafting
from engines import sampled
from scipy.stats import chi2_contingency
from transformers import AutoTokenizer

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "quickstart"))
import task  # noqa: E402

pytestmark = pytest.mark.slow

NUM_PROMPTS = 1024
SEED = 77


def num_right(llm, policy: Path, **more) -> int:
    """Of NUM_PROMPTS problems, one response each at temperature 1, as the quickstart's rollouts ask for them."""
    tokenizer = AutoTokenizer.from_pretrained(policy)
    problems = task.draw_problems(NUM_PROMPTS, SEED)
    prompts = [{"prompt_token_ids": tokenizer(problem.prompt, add_special_tokens=False)["input_ids"]} for problem in problems]
    params = sampled(task.MAX_RESPONSE_TOKENS, logprobs=1, min_tokens=1, stop_token_ids=[tokenizer.eos_token_id], **more)
    params.ignore_eos = False
    outputs = llm.generate(prompts, params, use_tqdm=False)
    texts = [tokenizer.decode(output.outputs[0].token_ids, skip_special_tokens=False) for output in outputs]
    return sum(task.is_correct(text, problem.label) for text, problem in zip(texts, problems, strict=True))


@pytest.fixture(scope="module")
def plain_right(plain_warm, warm_policy) -> int:
    return num_right(plain_warm, warm_policy)


@pytest.mark.parametrize("gamma", [3, 7])
def test_rewards_are_plain_vllms(measured, plain_right, speculating_warm, warm_policy, gamma):
    quant, llm = speculating_warm
    right = num_right(llm, warm_policy, **drafting(gamma))
    table = [[plain_right, NUM_PROMPTS - plain_right], [right, NUM_PROMPTS - right]]
    p_value = chi2_contingency(table).pvalue
    shares = f"{right / NUM_PROMPTS:.3f} of the answers right, plain vLLM {plain_right / NUM_PROMPTS:.3f}"
    measured(f"{quant}, gamma {gamma}: {shares} (p={p_value:.3f})")
    assert p_value > 0.001 / 4
