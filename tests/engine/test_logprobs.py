"""Returned logprobs under speculation, called exactly as OpenRLHF calls: min_tokens=1, logprobs=1, processed_logprobs."""

from __future__ import annotations

import pytest
import random_gamma
import torch
from engines import plain_engine, sampled, self_spec_engine, token_prompts
from trainer import logprob_errors
from transformers import AutoModelForCausalLM

from openrlhf_sd import SelfSpecConfig

AS_OPENRLHF = {"logprobs_mode": "processed_logprobs", "max_logprobs": 1}


@pytest.mark.parametrize("quant", ["w8a8"])
def test_processed_logprobs_are_those_of_a_forward_pass(measured, untied_policy, quant):
    prompts = token_prompts(48, 512)
    model = AutoModelForCausalLM.from_pretrained(untied_policy, dtype=torch.bfloat16)
    temperatures = (1.0, 0.6)
    with plain_engine(untied_policy, **AS_OPENRLHF) as llm:
        plain = [_mean_error(llm, model, prompts, temperature) for temperature in temperatures]
    config = SelfSpecConfig(mode="fixed", gamma=4, quant=quant)
    with self_spec_engine(untied_policy, config, scheduler_cls=random_gamma.QUALNAME, **AS_OPENRLHF) as llm:
        speculating = [_mean_error(llm, model, prompts, temperature) for temperature in temperatures]
    measured(f"mean |logprob error| at temperatures {temperatures}: plain {plain}, speculating {speculating}")
    for ours, theirs in zip(speculating, plain, strict=True):
        assert ours < 0.02
        assert ours < theirs * 1.25 + 0.001


def _mean_error(llm, model, prompts, temperature: float) -> float:
    params = sampled(48, temperature, logprobs=1, min_tokens=1)
    errors = logprob_errors(model, llm.generate(prompts, params, use_tqdm=False), temperature)
    assert errors.isfinite().all()
    return errors.mean().item()
