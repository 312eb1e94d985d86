"""Draft tokens are drawn with the probabilities that the rejection sampler is told."""

from __future__ import annotations

import pytest
import torch
from scipy.stats import chisquare

from openrlhf_sd.engine.cpu_sampling import BLOCK, sample_by_inversion

NUM_DRAWS = 40_000


@pytest.mark.parametrize("vocab_size", [3, BLOCK, BLOCK + 1, 5 * BLOCK - 7])
def test_frequencies_are_the_probabilities(vocab_size):
    torch.manual_seed(vocab_size)
    probs = torch.randn(vocab_size).softmax(dim=0)
    counts = torch.bincount(sample_by_inversion(probs.expand(NUM_DRAWS, -1)), minlength=vocab_size)
    assert chisquare(counts.numpy(), probs.double().numpy() / probs.double().sum().item() * NUM_DRAWS).pvalue > 1e-3


def test_a_word_without_probability_is_never_drawn():
    torch.manual_seed(0)
    probs = torch.zeros(1000, 3 * BLOCK)
    probs[:, [0, BLOCK - 1, 2 * BLOCK + 5]] = 1 / 3
    assert set(sample_by_inversion(probs).tolist()) == {0, BLOCK - 1, 2 * BLOCK + 5}


def test_each_row_has_its_own_probabilities():
    probs = torch.eye(4 * BLOCK)
    assert torch.equal(sample_by_inversion(probs), torch.arange(4 * BLOCK))


def test_small_probabilities_behind_a_large_one_are_not_rounded_away():
    """2e-8 each behind 0.9995: a float32 sum from left to right stays where it is."""
    torch.manual_seed(0)
    vocab_size = 100 * BLOCK
    probs = torch.full((vocab_size,), 5e-4 / (vocab_size - 1))
    probs[0] = 0.9995
    assert (probs.numpy().cumsum() == probs[0].item()).all()
    drawn = sample_by_inversion(probs.expand(NUM_DRAWS, -1))
    assert 5 < (drawn > 0).sum() < 45  # 20 expected


def test_not_normalized_is_normalized():
    torch.manual_seed(0)
    drawn = sample_by_inversion(torch.tensor([[1.0, 3.0]]).expand(NUM_DRAWS, -1))
    assert abs(drawn.float().mean().item() - 0.75) < 0.01


@pytest.mark.parametrize("vocab_size", [100, BLOCK + 1, 2 * BLOCK])
def test_a_row_of_nan_gives_a_word_of_the_vocabulary(vocab_size):
    probs = torch.full((2, vocab_size), float("nan"))
    probs[1] = 1 / vocab_size
    assert (sample_by_inversion(probs) < vocab_size).all()
