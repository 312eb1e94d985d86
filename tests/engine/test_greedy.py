"""Greedy output of the self-speculating engine is plain vLLM's, token by token."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
from drafts_by_request import drafting
from engines import DraftsSince, call, generate, greedy, token_prompts
from greedy_reference import BF16_GAP, LAST_PROMPTS, NUM_LAST_TOKENS, excused_divergences

NUM_PROMPTS = 64
NUM_TOKENS = 96
PROMPTS = token_prompts(NUM_PROMPTS, 23)


@pytest.fixture(scope="module")
def reference(plain_warm):
    """Plain vLLM's outputs for PROMPTS."""
    return [output.outputs[0] for output in plain_warm.generate(PROMPTS, greedy(NUM_TOKENS, logprobs=2), use_tqdm=False)]


@pytest.fixture(scope="module")
def last_reference(plain_warm):
    """The same for LAST_PROMPTS, up to the end of the context."""
    return [output.outputs[0] for output in plain_warm.generate(LAST_PROMPTS, greedy(NUM_LAST_TOKENS + 24, logprobs=2), use_tqdm=False)]


@pytest.mark.parametrize("gamma", [1, 3, 7])
def test_fixed_gamma(measured, reference, speculating_warm, gamma):
    quant, llm = speculating_warm
    since = DraftsSince(llm)
    outputs = generate(llm, PROMPTS, greedy(NUM_TOKENS, **drafting(gamma)))
    counts = since.counts()
    # Near their end requests are given fewer drafts.
    assert 0.9 * gamma * counts["num_drafts"] < counts["num_draft_tokens"] <= gamma * counts["num_drafts"]
    divergences = sum(excused_divergences(want, got) for want, got in zip(reference, outputs, strict=True))
    measured(f"{quant}, gamma {gamma}: {divergences} of {NUM_PROMPTS} prompts diverge, each at a near tie (gap < {BF16_GAP})")


def test_gamma_changing_at_every_step(measured, reference, speculating_warm):
    quant, llm = speculating_warm
    since = DraftsSince(llm)
    outputs = generate(llm, PROMPTS, greedy(NUM_TOKENS, **drafting("random")))
    counts = since.counts()
    assert 0 < counts["num_draft_tokens"] < 7 * counts["num_drafts"], "gamma did not change"
    divergences = sum(excused_divergences(want, got) for want, got in zip(reference, outputs, strict=True))
    measured(f"{quant}, gamma 0..7 at random: {divergences} of {NUM_PROMPTS} prompts diverge, each at a near tie")


def test_auto(measured, reference, speculating_warm):
    """Uncalibrated, so that it has to try gammas out: they change within the rollout, and the batch shrinks as requests end. By simulated
    step times: on a machine where speculation does not pay, `auto` rightly leaves it off, which would show nothing."""
    quant, llm = speculating_warm
    lengths = [16 + 80 * (index % 8 == 0) for index in range(NUM_PROMPTS)]
    core = llm.llm_engine.engine_core
    core.call_utility("self_spec_end_rollout", 0, 0, 0)  # of the tests before
    outputs = generate(llm, PROMPTS, [greedy(length, **drafting("auto")) for length in lengths])
    report = json.loads(core.call_utility("self_spec_end_rollout", 0, 0, 0))
    gammas = [segment[0] for segment in report["timeline"]]
    assert len(set(gammas)) > 1
    divergences = 0
    for want, got, length in zip(reference, outputs, lengths, strict=True):
        assert len(got) == length
        shortened = SimpleNamespace(token_ids=want.token_ids[:length], logprobs=want.logprobs)
        divergences += excused_divergences(shortened, got)
    measured(f"{quant}, auto, gamma {gammas} in one rollout: {divergences} of {NUM_PROMPTS} prompts diverge, each at a near tie")


@pytest.mark.parametrize("gamma", [7, 0])
def test_up_to_the_end_of_the_context_and_again_from_the_prefix_cache(last_reference, speculating_warm, gamma):
    """Drafts that would pass max_model_len are cut, not dropped early; and those beyond it are written nowhere, least of all over the
    prompt's first keys and values, which the next requests take from the prefix cache."""
    _, llm = speculating_warm
    since = DraftsSince(llm)
    generate(llm, LAST_PROMPTS, greedy(NUM_LAST_TOKENS + 24, **drafting(7)))
    assert since.counts()["num_drafts"] > 0
    outputs = generate(llm, LAST_PROMPTS, greedy(NUM_LAST_TOKENS + 24, **drafting(gamma)))
    for want, got in zip(last_reference, outputs, strict=True):
        assert len(got) == NUM_LAST_TOKENS
        excused_divergences(want, got)


def test_gamma_0_never_runs_the_drafter(speculating_warm):
    _, llm = speculating_warm
    since = DraftsSince(llm)
    call(llm, count_draft_forwards)
    generate(llm, PROMPTS, greedy(NUM_TOKENS, **drafting(0)))
    assert call(llm, num_draft_forwards) == 0
    assert since.counts()["num_drafts"] == 0
    generate(llm, PROMPTS[:1], greedy(NUM_TOKENS, **drafting(1)))
    assert call(llm, num_draft_forwards) > 0, "the hook counts"


def count_draft_forwards(worker) -> None:
    worker.test_num_draft_forwards = 0

    def count(*_):
        worker.test_num_draft_forwards += 1

    worker.model_runner.drafter.model.register_forward_pre_hook(count)


def num_draft_forwards(worker) -> int:
    return worker.test_num_draft_forwards
