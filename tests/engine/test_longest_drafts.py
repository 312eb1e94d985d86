"""The start-up profile, which sizes the KV cache of a GPU, verifies the longest drafts of a full batch. A CPU does not profile: called
here."""

from __future__ import annotations

import torch
from engines import call, self_spec_engine

from openrlhf_sd import SelfSpecConfig

NUM_REQUESTS, GAMMA = 5, 7


def profiled(worker) -> list[tuple[int, int, int]]:
    """Requests, and rows of draft probabilities and of logits, of every step that the profile verifies."""
    runner, seen = worker.model_runner, []
    verify = runner.rejection_sampler

    def watched(metadata, draft_probs, logits, sampling_metadata):
        seen.append((len(metadata.num_draft_tokens), len(draft_probs), len(logits)))
        output = verify(metadata, draft_probs, logits, sampling_metadata)
        assert output.logprobs_tensors is not None
        return output

    runner.rejection_sampler = watched
    runner._dummy_sampler_run(torch.zeros(NUM_REQUESTS, runner.model_config.get_hidden_size(), dtype=runner.dtype))
    assert runner.rejection_sampler is watched
    return seen


def test_the_profile_verifies_the_longest_drafts_of_a_full_batch(tied_policy):
    with self_spec_engine(tied_policy, SelfSpecConfig(mode="fixed", gamma=GAMMA, quant="w8a8")) as llm:
        # Sampled and greedy: 5 requests x 7 drafts, and x 8 logits.
        assert call(llm, profiled) == 2 * [(NUM_REQUESTS, 35, 40)]
