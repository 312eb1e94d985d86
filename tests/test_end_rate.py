"""How soon requests end."""

import pytest

from openrlhf_sd.policy.end_rate import EndRate


def shrink(rate: EndRate, batch: int, to: int, tokens_per_end: int) -> None:
    """One request ends after another."""
    for left in range(batch, to, -1):
        rate.observe(left, tokens_per_end, 1)


def test_nothing_is_said_before_a_request_has_ended():
    rate = EndRate()
    rate.observe(64, 640, 0)
    assert rate.per_token() == 0.0


@pytest.mark.parametrize("batch", [4, 64])
def test_it_is_ends_over_tokens(batch):
    rate = EndRate()
    for _ in range(50):
        rate.observe(batch, 20, 1)
    assert rate.per_token() == pytest.approx(1 / 20, rel=0.05)


def test_requests_that_end_early_say_little_of_the_tail():
    rate = EndRate()
    shrink(rate, 128, 32, tokens_per_end=5)
    shrink(rate, 32, 4, tokens_per_end=500)
    assert 1 / 500 < rate.per_token() < 1 / 250


def test_tokens_without_ends_count_too():
    rate = EndRate()
    shrink(rate, 16, 8, tokens_per_end=10)
    before = rate.per_token()
    rate.observe(8, 1000, 0)
    assert rate.per_token() < before / 5
