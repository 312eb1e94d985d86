"""The test's own test: exact draws pass, and one wrong token in two hundred is seen."""

from __future__ import annotations

import math

import torch
from surprise import surprise


def draws(share_wrong: float, num_responses: int = 400, length: int = 50):
    """From logits of a policy that is mostly sure of its next token; a share of the tokens drawn from something else."""
    generator = torch.Generator().manual_seed(5)
    for _ in range(num_responses):
        logits = torch.randn(length, 128, generator=generator) * 4
        logits[torch.arange(length), torch.randint(128, (length,), generator=generator)] += 14
        tokens = torch.multinomial(logits.softmax(-1), 1, generator=generator).squeeze(1)
        wrong = torch.rand(length, generator=generator) < share_wrong
        yield logits, torch.where(wrong, torch.randint(128, (length,), generator=generator), tokens)


def test_exact_draws_pass():
    found = surprise(draws(0.0))
    assert found.num_tokens == 20_000
    assert abs(found.z_score) < 4
    assert found.rare_p_value > 0.001


def test_a_few_wrong_tokens_are_seen():
    found = surprise(draws(0.005))
    assert found.z_score > 8
    assert found.rare_p_value < 1e-6


def test_a_word_of_probability_zero_spoils_no_sum():
    logits = torch.tensor([[0.0, 1.0, -torch.inf]])
    found = surprise([(logits, torch.tensor([1]))])
    assert math.isfinite(found.z_score)
    assert (found.num_rare, found.expected_rare) == (0, 0.0)
