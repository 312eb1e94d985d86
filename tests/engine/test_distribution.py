"""Sampled output has plain vLLM's distribution: two-sample chi-square over independent responses.

Tokens at fixed positions well past the first draft, and the first three tokens together. (n-grams pooled over the positions of one
response are not independent: plain vLLM against itself fails such a test.)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from drafts_by_request import QUALNAME, drafting
from engines import DraftsSince, generate, plain_engine, sampled, self_spec_engine
from scipy.stats import chi2_contingency

from openrlhf_sd import SelfSpecConfig

NUM_RESPONSES = 2000
POSITIONS = (4, 9, 14, 19)
SETTINGS = {"temperature 1": (1.0, 1.0), "temperature 0.6, top-p 0.9": (0.6, 0.9)}
MIN_EXPECTED = 5
ALPHA = 0.001
WIDE = {"max_num_seqs": 256}
"""Many short requests: a step costs more than its tokens."""

PROMPT = {"prompt_token_ids": [7, 21, 13, 40]}

STATISTICS: dict[str, Callable[[list[int]], object]] = {
    **{f"token {position}": (lambda tokens, position=position: tokens[position]) for position in POSITIONS},
    "first three tokens": lambda tokens: tuple(tokens[:3]),
}


FEW = 16
"""Requests at once at which `auto` drafts, by its simulated step times."""


def responses(llm, temperature: float, top_p: float, **more: Any) -> list[list[int]]:
    return generate(llm, [PROMPT] * NUM_RESPONSES, sampled(max(POSITIONS) + 1, temperature, top_p, **more))


def responses_in_small_batches(llm, temperature: float, top_p: float, **more: Any) -> list[list[int]]:
    params = sampled(max(POSITIONS) + 1, temperature, top_p, **more)
    return [tokens for _ in range(0, NUM_RESPONSES * 6 // 10, FEW) for tokens in generate(llm, [PROMPT] * FEW, params)]


def two_sample_p(first: list[object], second: list[object]) -> float:
    """p-value of equal distributions; cells seen too rarely in both samples together are pooled into one."""
    counts = [Counter(first), Counter(second)]
    cells = sorted(set(first) | set(second), key=str)
    table = np.array([[count[cell] for cell in cells] for count in counts])
    rare = table.sum(axis=0) < 2 * MIN_EXPECTED
    table = np.column_stack([table[:, ~rare], table[:, rare].sum(axis=1)])
    table = table[:, table.sum(axis=0) > 0]
    return float(chi2_contingency(table).pvalue) if table.shape[1] > 1 else 1.0


def p_values(first: list[list[int]], second: list[list[int]]) -> dict[str, float]:
    return {name: two_sample_p(list(map(f, first)), list(map(f, second))) for name, f in STATISTICS.items()}


@pytest.fixture(scope="module")
def plain(small_vocab_policy):
    with plain_engine(small_vocab_policy, seed=1, **WIDE) as llm:
        return {name: responses(llm, *setting) for name, setting in SETTINGS.items()}


NUM_TESTS = 3 * len(SETTINGS) * len(STATISTICS)


FIXED = SelfSpecConfig(mode="fixed", gamma=3, quant="w4")
CHANGING = SelfSpecConfig(mode="auto", gamma_max=3, calibration="none", quant="w8a8")


@pytest.mark.parametrize(
    ("config", "asked"), [(FIXED, {"fixed": {}}), (CHANGING, {draft: drafting(draft) for draft in ("random", "auto")})], ids=["w4", "w8a8"]
)
def test_same_distribution_as_plain_vllm(measured, plain, small_vocab_policy, config, asked):
    overrides = {"scheduler_cls": QUALNAME} if config is CHANGING else {}
    with self_spec_engine(small_vocab_policy, config, seed=2, **WIDE, **overrides) as llm:
        for draft, asking in asked.items():
            for name, setting in SETTINGS.items():
                drafts = DraftsSince(llm)
                respond = responses_in_small_batches if draft == "auto" else responses
                results = p_values(plain[name], respond(llm, *setting, **asking))
                shown = ", ".join(f"{statistic} p={p:.3f}" for statistic, p in results.items())
                measured(f"{config.quant}, {draft} gamma, {name}, acceptance {drafts.acceptance_rate():.2f}: {shown}")
                assert min(results.values()) > ALPHA / NUM_TESTS


def test_rejects_a_biased_sampler(measured, plain, small_vocab_policy):
    """The same engine, accepting each draft with twice the probability it should."""
    config = SelfSpecConfig(mode="fixed", gamma=3, quant="w4")
    with self_spec_engine(small_vocab_policy, config, seed=3, worker_cls="unrepaired.BiasedSampler", **WIDE) as llm:
        results = p_values(plain["temperature 1"], responses(llm, 1.0, 1.0))
    measured(f"biased sampler: smallest p {min(results.values()):.1e}")
    assert min(results.values()) < ALPHA / NUM_TESTS
