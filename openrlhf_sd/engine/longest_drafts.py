"""Memory of the longest drafts, put into vLLM's start-up profile.

vLLM profiles a verify step with one draft token per request (`GPUModelRunner._dummy_sampler_run`) and gives what is then left to the KV
cache. A full batch of long drafts takes several fp32 tensors of (requests x gamma, vocabulary) at once, and logprobs of all of them: by
count 3.8 GB for 128 requests, gamma 7 and the vocabulary of Qwen2.5, which a rollout would find missing in its first step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from vllm.v1.spec_decode.metadata import SpecDecodeMetadata


def profile_longest_drafts(runner: Any, gamma: int) -> None:
    """Let the runner's dummy verify steps verify `gamma` draft tokens per request, with logprobs.

    Args:
        runner: a `GPUModelRunner`.
        gamma: the longest draft of the run.
    """
    dummy_sampler_run = runner._dummy_sampler_run

    def run(hidden_states: torch.Tensor) -> torch.Tensor:
        verify = runner.rejection_sampler
        runner.rejection_sampler = _lengthened(verify, gamma)
        try:
            return dummy_sampler_run(hidden_states)
        finally:
            runner.rejection_sampler = verify

    runner._dummy_sampler_run = run


def _lengthened(verify: Callable, gamma: int) -> Callable:
    def verify_longest(metadata: SpecDecodeMetadata, draft_probs: torch.Tensor, logits: torch.Tensor, sampling_metadata):
        """As `RejectionSampler.forward`, handed one draft token per request: (B, V) probabilities and (2 B, V) logits."""
        num_requests = len(metadata.num_draft_tokens)
        longest = SpecDecodeMetadata.make_dummy([[0] * gamma for _ in range(num_requests)], logits.device)
        # The runner keeps what the drafter made, and gathers a copy of the rows that this step verifies.
        kept = draft_probs.repeat_interleave(gamma, dim=0)
        gathered = kept.clone()
        logits = logits.new_empty(num_requests * (gamma + 1), logits.shape[-1]).normal_()
        return verify(longest, gathered, logits, replace(sampling_metadata, max_num_logprobs=1))

    return verify_longest
