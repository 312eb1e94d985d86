"""Greedy output of the self-speculating engine is plain vLLM's, token by token."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import random_gamma
import simulated_times
from engines import call, generate, greedy, plain_engine, self_spec_engine, spec_decode_counts, token_prompts

from openrlhf_sd import SelfSpecConfig

NUM_PROMPTS = 64
NUM_TOKENS = 96
BF16_GAP = 0.05
"""A divergence is excused only where plain vLLM's own two best tokens are this close: verifying gamma + 1 tokens at once sums bf16
products in another order than decoding one."""


@pytest.fixture(scope="module")
def plain(warm_policy):
    prompts = token_prompts(NUM_PROMPTS, 23)
    with plain_engine(warm_policy) as llm:
        outputs = llm.generate(prompts, greedy(NUM_TOKENS, logprobs=2), use_tqdm=False)
    return prompts, [output.outputs[0] for output in outputs]


def excused_divergences(reference, tokens) -> int:
    """0 if equal, 1 if the first difference is a near tie in plain vLLM's logprobs; asserts otherwise."""
    for position, (want, got) in enumerate(zip(reference.token_ids, tokens, strict=True)):
        if want != got:
            best, second = sorted((entry.logprob for entry in reference.logprobs[position].values()), reverse=True)[:2]
            assert best - second < BF16_GAP, f"position {position}: {got} instead of {want}, gap {best - second:.3f}"
            return 1
    return 0


@pytest.mark.parametrize("gamma", [1, 3, 7])
def test_fixed_gamma(measured, plain, warm_policy, gamma):
    prompts, reference = plain
    with self_spec_engine(warm_policy, SelfSpecConfig(mode="fixed", gamma=gamma, quant="w4")) as llm:
        outputs = generate(llm, prompts, greedy(NUM_TOKENS))
        counts = spec_decode_counts(llm)
    assert counts["num_drafts"] > 0
    divergences = sum(excused_divergences(want, got) for want, got in zip(reference, outputs, strict=True))
    measured(f"gamma {gamma}: {divergences} of {NUM_PROMPTS} prompts diverge, each at a near tie (gap < {BF16_GAP})")


@pytest.mark.parametrize("quant", ["w4", "w8a8"])
def test_gamma_changing_at_every_step(measured, plain, warm_policy, quant):
    prompts, reference = plain
    config = SelfSpecConfig(mode="fixed", gamma=7, quant=quant)
    with self_spec_engine(warm_policy, config, scheduler_cls=random_gamma.QUALNAME) as llm:
        outputs = generate(llm, prompts, greedy(NUM_TOKENS))
        counts = spec_decode_counts(llm)
    assert 0 < counts["num_draft_tokens"] < 7 * counts["num_drafts"], "gamma did not change"
    divergences = sum(excused_divergences(want, got) for want, got in zip(reference, outputs, strict=True))
    measured(f"gamma 0..7 at random, {quant}: {divergences} of {NUM_PROMPTS} prompts diverge, each at a near tie")


def test_auto(measured, plain, warm_policy):
    """Uncalibrated, so that it has to try gammas out: they change within the rollout, and the batch shrinks as requests end. By simulated
    step times: on a machine where speculation does not pay, `auto` rightly leaves it off, which would show nothing."""
    prompts, reference = plain
    lengths = [16 + 80 * (index % 8 == 0) for index in range(NUM_PROMPTS)]
    config = SelfSpecConfig(mode="auto", gamma_max=7, calibration="none", quant="w8a8")
    with self_spec_engine(warm_policy, config, scheduler_cls=simulated_times.QUALNAME) as llm:
        outputs = generate(llm, prompts, [greedy(length) for length in lengths])
        report = json.loads(llm.llm_engine.engine_core.call_utility("self_spec_end_rollout", 0, 0, 0))
    gammas = [segment[0] for segment in report["timeline"]]
    assert len(set(gammas)) > 1
    divergences = 0
    for want, got, length in zip(reference, outputs, lengths, strict=True):
        assert len(got) == length
        shortened = SimpleNamespace(token_ids=want.token_ids[:length], logprobs=want.logprobs)
        divergences += excused_divergences(shortened, got)
    measured(f"auto, gamma {gammas} in one rollout: {divergences} of {NUM_PROMPTS} prompts diverge, each at a near tie")


def test_up_to_the_end_of_the_context_and_gamma_0(warm_policy):
    """Drafts that would pass max_model_len are cut, not dropped early; and gamma 0 never runs the drafter."""
    prompts = token_prompts(8, 23)
    sizes = {"max_model_len": 64}
    with plain_engine(warm_policy, **sizes) as llm:
        reference = llm.generate(prompts, greedy(64, logprobs=2), use_tqdm=False)
    with self_spec_engine(warm_policy, SelfSpecConfig(mode="fixed", gamma=7, quant="w8a8"), **sizes) as llm:
        outputs = generate(llm, prompts, greedy(64))
    for want, got in zip(reference, outputs, strict=True):
        assert len(want.prompt_token_ids) + len(got) == 64
        excused_divergences(want.outputs[0], got)

    with self_spec_engine(warm_policy, SelfSpecConfig(mode="fixed", gamma=0, quant="w8a8"), **sizes) as llm:
        call(llm, count_draft_forwards)
        outputs = generate(llm, prompts, greedy(64))
        assert call(llm, num_draft_forwards) == 0
        assert spec_decode_counts(llm).get("num_drafts", 0) == 0
    for want, got in zip(reference, outputs, strict=True):
        assert list(want.outputs[0].token_ids) == got


def count_draft_forwards(worker) -> None:
    worker.test_num_draft_forwards = 0

    def count(*_):
        worker.test_num_draft_forwards += 1

    worker.model_runner.drafter.model.register_forward_pre_hook(count)


def num_draft_forwards(worker) -> int:
    return worker.test_num_draft_forwards
