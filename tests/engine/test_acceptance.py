"""What the quantized drafters are accepted on the quickstart's warm-started policy."""

from __future__ import annotations

import pytest
import torch
from drafts_by_request import drafting
from engines import DraftsSince, sampled, self_spec_engine
from transformers import AutoTokenizer

from openrlhf_sd import SelfSpecConfig


def acceptance_while_the_batch_shrinks(llm, policy, **more) -> float:
    """From 64 requests to 1, at temperature 1."""
    tokenizer = AutoTokenizer.from_pretrained(policy)
    texts = [f"mod{3 + i % 7} of {5 + i % 20:02d}\n" for i in range(64)]
    prompts = [{"prompt_token_ids": tokenizer(text, add_special_tokens=False)["input_ids"]} for text in texts]
    params = sampled(300, stop_token_ids=[tokenizer.eos_token_id], **more)
    params.ignore_eos = False
    since = DraftsSince(llm)
    llm.generate(prompts, params, use_tqdm=False)
    return since.acceptance_rate()


def test_quantized_drafters_are_accepted_above_080(measured, warm_policy, speculating_warm):
    quant, llm = speculating_warm
    rate = acceptance_while_the_batch_shrinks(llm, warm_policy, **drafting(3))
    measured(f"{quant}: acceptance rate {rate:.3f} at temperature 1, gamma 3")
    assert rate > 0.80


@pytest.mark.slow
@pytest.mark.parametrize("case", ["w4 compiled", "w4 with VLLM_CPU_INT4_W4A8=0"])
def test_so_are_those_of_other_engines(measured, monkeypatch, warm_policy, case):
    if "=" in case:
        if not torch.cpu._is_vnni_supported():
            pytest.skip("the other kernel is the only one without VNNI instructions")
        monkeypatch.setenv("VLLM_CPU_INT4_W4A8", "0")
    config = SelfSpecConfig(mode="fixed", gamma=3, quant="w4")
    with self_spec_engine(warm_policy, config, enforce_eager="compiled" not in case) as llm:
        rate = acceptance_while_the_batch_shrinks(llm, warm_policy)
    measured(f"{case}: acceptance rate {rate:.3f} at temperature 1, gamma 3")
    assert rate > 0.80
