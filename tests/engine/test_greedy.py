"""Greedy output of the self-speculating engine is plain vLLM's, token by token."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
from drafts_by_request import QUALNAME, drafting
from engines import SIZES, call, generate, greedy, plain_engine, self_spec_engine, spec_decode_counts, token_prompts

from openrlhf_sd import SelfSpecConfig

NUM_PROMPTS = 64
NUM_TOKENS = 96
BF16_GAP = 0.05
"""A divergence is excused only where plain vLLM's own two best tokens are this close: verifying gamma + 1 tokens at once sums bf16
products in another order than decoding one."""


PROMPTS = token_prompts(NUM_PROMPTS, 23)

NUM_LAST_TOKENS = 40
LAST_PROMPTS = [
    {"prompt_token_ids": [4 + (31 * row + 7 * column) % 19 for column in range(SIZES["max_model_len"] - NUM_LAST_TOKENS)]} for row in range(8)
]
"""Prompts that leave so many tokens of the context."""


@pytest.fixture(scope="module")
def plain(warm_policy):
    """Plain vLLM's outputs for PROMPTS and for LAST_PROMPTS."""
    with plain_engine(warm_policy) as llm:
        return [
            [output.outputs[0] for output in llm.generate(prompts, greedy(num_tokens, logprobs=2), use_tqdm=False)]
            for prompts, num_tokens in ((PROMPTS, NUM_TOKENS), (LAST_PROMPTS, NUM_LAST_TOKENS + 24))
        ]


@pytest.fixture(scope="module", params=["w4", "w8a8"])
def engine(request, warm_policy):
    """Up to 7 drafts, as each request says."""
    config = SelfSpecConfig(mode="auto", gamma_max=7, calibration="none", quant=request.param)
    with self_spec_engine(warm_policy, config, scheduler_cls=QUALNAME) as llm:
        yield request.param, llm


def excused_divergences(reference, tokens) -> int:
    """0 if equal, 1 if the first difference is a near tie in plain vLLM's logprobs; asserts otherwise."""
    for position, (want, got) in enumerate(zip(reference.token_ids, tokens, strict=True)):
        if want != got:
            best, second = sorted((entry.logprob for entry in reference.logprobs[position].values()), reverse=True)[:2]
            assert best - second < BF16_GAP, f"position {position}: {got} instead of {want}, gap {best - second:.3f}"
            return 1
    return 0


class CountsSince:
    """Drafts of a test."""

    def __init__(self, llm) -> None:
        self._llm = llm
        self._before = spec_decode_counts(llm)

    def counts(self) -> dict[str, int]:
        return {name: count - self._before.get(name, 0) for name, count in spec_decode_counts(self._llm).items()}


@pytest.mark.parametrize("gamma", [1, 3, 7])
def test_fixed_gamma(measured, plain, engine, gamma):
    reference, _ = plain
    quant, llm = engine
    since = CountsSince(llm)
    outputs = generate(llm, PROMPTS, greedy(NUM_TOKENS, **drafting(gamma)))
    counts = since.counts()
    # Near their end requests are given fewer drafts.
    assert 0.9 * gamma * counts["num_drafts"] < counts["num_draft_tokens"] <= gamma * counts["num_drafts"]
    divergences = sum(excused_divergences(want, got) for want, got in zip(reference, outputs, strict=True))
    measured(f"{quant}, gamma {gamma}: {divergences} of {NUM_PROMPTS} prompts diverge, each at a near tie (gap < {BF16_GAP})")


def test_gamma_changing_at_every_step(measured, plain, engine):
    reference, _ = plain
    quant, llm = engine
    since = CountsSince(llm)
    outputs = generate(llm, PROMPTS, greedy(NUM_TOKENS, **drafting("random")))
    counts = since.counts()
    assert 0 < counts["num_draft_tokens"] < 7 * counts["num_drafts"], "gamma did not change"
    divergences = sum(excused_divergences(want, got) for want, got in zip(reference, outputs, strict=True))
    measured(f"{quant}, gamma 0..7 at random: {divergences} of {NUM_PROMPTS} prompts diverge, each at a near tie")


def test_auto(measured, plain, engine):
    """Uncalibrated, so that it has to try gammas out: they change within the rollout, and the batch shrinks as requests end. By simulated
    step times: on a machine where speculation does not pay, `auto` rightly leaves it off, which would show nothing."""
    reference, _ = plain
    quant, llm = engine
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


def test_up_to_the_end_of_the_context(plain, engine):
    """Drafts that would pass max_model_len are cut, not dropped early."""
    _, reference = plain
    _, llm = engine
    since = CountsSince(llm)
    outputs = generate(llm, LAST_PROMPTS, greedy(NUM_LAST_TOKENS + 24, **drafting(7)))
    assert since.counts()["num_drafts"] > 0
    for want, got in zip(reference, outputs, strict=True):
        assert len(got) == NUM_LAST_TOKENS
        excused_divergences(want, got)


def test_gamma_0_never_runs_the_drafter(plain, engine):
    _, reference = plain
    _, llm = engine
    since = CountsSince(llm)
    call(llm, count_draft_forwards)
    outputs = generate(llm, LAST_PROMPTS, greedy(NUM_LAST_TOKENS, **drafting(0)))
    assert call(llm, num_draft_forwards) == 0
    assert since.counts().get("num_drafts", 0) == 0
    for want, got in zip(reference, outputs, strict=True):
        excused_divergences(want, got)


def count_draft_forwards(worker) -> None:
    worker.test_num_draft_forwards = 0

    def count(*_):
        worker.test_num_draft_forwards += 1

    worker.model_runner.drafter.model.register_forward_pre_hook(count)


def num_draft_forwards(worker) -> int:
    return worker.test_num_draft_forwards
