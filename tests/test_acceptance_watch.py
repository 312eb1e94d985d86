"""When a rollout's speculation is turned off, and what is said to be the cause."""

import random

import pytest

from openrlhf_sd.policy.acceptance_watch import COARSE_ERROR, HOT, WINDOW, AcceptanceWatch
from openrlhf_sd.policy.observation import MeasuredStep


def step(num_drafts: int, num_accepted: int, gamma: int = 3) -> MeasuredStep:
    """`num_drafts` requests verified, `num_accepted` of them with their first draft token accepted and no other."""
    return MeasuredStep(
        num_decodes=num_drafts,
        mean_context=100.0,
        step_s=0.01,
        num_prefill_tokens=0,
        gamma_verified=gamma,
        gamma_drafted=gamma,
        num_drafts=num_drafts,
        num_draft_tokens_per_pos=(num_drafts,) * gamma,
        num_accepted_tokens_per_pos=(num_accepted, *[0] * (gamma - 1)),
    )


PLAIN = MeasuredStep(num_decodes=8, mean_context=100.0, step_s=0.01, num_prefill_tokens=0, gamma_verified=0, gamma_drafted=0)


def test_nothing_is_said_before_a_window_is_full():
    watch = AcceptanceWatch("w4", 0.12)
    assert not any(watch.has_collapsed(step(64, 0)) for _ in range(WINDOW // 64 - 1))
    assert not watch.has_collapsed(PLAIN)
    assert watch.has_collapsed(step(64, 0))


def test_half_of_the_first_draft_tokens_is_enough_and_later_positions_do_not_count():
    watch = AcceptanceWatch("w4", 0.12)
    assert not any(watch.has_collapsed(step(64, 32)) for _ in range(100))


def test_a_drafter_that_was_good_for_long_is_judged_by_its_last_window():
    watch = AcceptanceWatch("w4", 0.12)
    assert not any(watch.has_collapsed(step(64, 60)) for _ in range(1000))
    num_bad = next(n for n in range(1, 100) if watch.has_collapsed(step(64, 0)))
    assert num_bad <= WINDOW // 64


def test_an_acceptance_of_sixty_percent_is_left_alone():
    draw = random.Random(0)
    watch = AcceptanceWatch("w4", 0.12)
    assert not any(watch.has_collapsed(step(16, sum(draw.random() < 0.6 for _ in range(16)))) for _ in range(10_000))


@pytest.mark.parametrize(
    ("quant", "error", "temperature", "cause"),
    [
        ("w4", COARSE_ERROR + 0.01, 1.0, "scheme too coarse (w4 leaves an error of 26% in a layer's output); use --self-spec.quant w8a8"),
        ("w8a8", 0.3, 2.0, "scheme too coarse (w8a8 leaves an error of 30% in a layer's output); use --self-spec.quant w4"),
        ("w4", 0.12, HOT + 0.3, "temperature too high (1.50); lower --rollout.temperature"),
        ("w4", 0.12, 1.0, "cause unknown (drafter error 12.0%, temperature 1.00); --self-spec.audit 1 shows"),
        ("w4", None, 1.0, "cause unknown (drafter error unmeasured, temperature 1.00)"),
    ],
)
def test_causes(quant, error, temperature, cause):
    watch = AcceptanceWatch(quant, error)
    assert watch.has_collapsed(step(WINDOW, WINDOW // 4))
    assert watch.cause is None
    watch.turn_off(temperature)
    assert watch.cause.startswith(f"25% of the last {WINDOW} first draft tokens accepted: {cause}")
