"""What the quantized drafters are accepted on the quickstart's warm-started policy."""

from __future__ import annotations

import pytest
import torch
from engines import AcceptanceSince, sampled, self_spec_engine

from openrlhf_sd import SelfSpecConfig


@pytest.mark.parametrize("case", ["w4", "w8a8", "w4 compiled", "w4 with VLLM_CPU_INT4_W4A8=0"])
def test_quantized_drafters_are_accepted_above_080(measured, monkeypatch, warm_policy, case):
    """While the batch shrinks from 64 to 1."""
    quant, _, how = case.partition(" ")
    if "=" in how:
        if not torch.cpu._is_vnni_supported():
            pytest.skip("the other kernel is the only one without VNNI instructions")
        monkeypatch.setenv("VLLM_CPU_INT4_W4A8", "0")
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(warm_policy)
    texts = [f"mod{3 + i % 7} of {5 + i % 20:02d}\n" for i in range(64)]
    prompts = [{"prompt_token_ids": tokenizer(text, add_special_tokens=False)["input_ids"]} for text in texts]
    params = sampled(300, stop_token_ids=[tokenizer.eos_token_id])
    params.ignore_eos = False
    with self_spec_engine(warm_policy, SelfSpecConfig(mode="fixed", gamma=3, quant=quant), enforce_eager=how != "compiled") as llm:
        acceptance = AcceptanceSince(llm)
        llm.generate(prompts, params, use_tqdm=False)
        rate = acceptance.rate()
    measured(f"{case}: acceptance rate {rate:.3f} at temperature 1, gamma 3")
    assert rate > 0.80
