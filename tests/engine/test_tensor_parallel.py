"""A drafter cut over two tensor-parallel ranks: the same tokens as one rank's policy, also after a weight broadcast."""

from __future__ import annotations

import os

import pytest
import torch
from engines import DraftsSince, sampled, self_spec_engine, token_prompts
from trainer import Trainer, logprob_errors, perturb
from transformers import AutoModelForCausalLM

from openrlhf_sd import SelfSpecConfig

pytestmark = pytest.mark.whole_machine

PROMPTS = token_prompts(16, 512)
PARAMS = sampled(24, logprobs=0)


@pytest.mark.parametrize("quant", ["w4", "w8a8"])
def test_two_ranks(measured, quant, untied_policy, monkeypatch):
    # vLLM-CPU would want a NUMA node for each rank.
    first, second, *_ = sorted(os.sched_getaffinity(0))
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", f"{first}|{second}")
    model = AutoModelForCausalLM.from_pretrained(untied_policy, dtype=torch.bfloat16)
    config = SelfSpecConfig(mode="fixed", gamma=3, quant=quant)
    with self_spec_engine(untied_policy, config, tensor_parallel_size=2) as llm:
        trainer = Trainer(llm)
        for sync in range(2):
            drafts = DraftsSince(llm)
            error = logprob_errors(model, llm.generate(PROMPTS, PARAMS, use_tqdm=False)).mean().item()
            assert error < 0.02
            assert drafts.acceptance_rate() > 0.5
            rate = drafts.acceptance_rate()
            measured(f"2 tensor-parallel ranks, {quant}, sync {sync}: mean |logprob error| {error:.4f}, acceptance {rate:.3f}")
            perturb(model, scale=0.3, seed=sync)
            trainer.broadcast(model)
        reports = llm.collective_rpc("self_spec_sync_report")
        assert len(reports) == 2 and len({report["fingerprint"] for report in reports}) == 1
