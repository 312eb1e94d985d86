"""The timeline and the speed-ups of a rollout, worked out by hand."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from openrlhf_sd.policy.observation import MeasuredStep
from openrlhf_sd.step_ledger import MAX_SEGMENTS, MIN_PLAIN_STEPS, StepLedger


class Costs:
    """Plain 1 s, draft 0.25 s, verify 1.25 s: a cycle of gamma 3 is 2 s."""

    def target_step_s(self, batch, context):
        return 1.0

    def draft_step_s(self, batch, context):
        return 0.25

    def verify_step_s(self, batch, context, gamma):
        return 1.25


def step(batch: int, verified: int, drafted: int, seconds: float | None, num_tokens: int, prefill: int = 0) -> MeasuredStep:
    return MeasuredStep(batch, 100.0, seconds, prefill, verified, drafted, num_tokens=num_tokens)


def test_a_rollout_that_toggles_once():
    ledger = StepLedger(Costs())
    ledger.add(step(0, 0, 0, None, 4, prefill=50))
    for _ in range(10):
        ledger.add(step(4, 0, 0, 1.1, 4))  # plain, 10% slower than calibrated
    ledger.add(step(4, 0, 3, 1.8, 4))
    for _ in range(5):
        ledger.add(step(4, 3, 3, 2.0, 12))  # 3 tokens per request and cycle
    report = ledger.report()
    assert (report["num_steps"], report["toggle_step"], report["toggle_batch"], report["gamma"]) == (17, 11, 4, 3.0)
    # Five cycles of 2 s replace 15 plain steps: predicted 15 * 1 / 10, measured 15 * 1.1 / 10.
    assert report["predicted_speedup"] == 1.5
    assert abs(report["measured_speedup"] - 1.65) < 1e-9
    assert [(row[0], row[1], row[2]) for row in report["timeline"]] == [(0, 0, 1), (0, 1, 10), (3, 11, 6)]
    json.dumps(report, allow_nan=False)


def test_a_step_that_holds_launches_of_another_kind_of_step_is_in_the_timeline_and_in_no_speed_up():
    ledger = StepLedger(Costs())
    for _ in range(MIN_PLAIN_STEPS):
        ledger.add(step(4, 0, 0, 1.0, 4))
    ledger.add(replace(step(4, 0, 0, 9.0, 4), is_followed_alike=False))
    ledger.add(step(4, 0, 3, 0.5, 4))
    ledger.add(step(4, 3, 3, 2.0, 12))
    ledger.add(replace(step(4, 3, 3, 0.1, 12), is_followed_alike=False))
    report = ledger.report()
    assert report["predicted_speedup"] == report["measured_speedup"] == 1.5
    assert sum(row[5] for row in report["timeline"]) == pytest.approx(MIN_PLAIN_STEPS + 9.0 + 0.5 + 2.0 + 0.1)


def test_what_was_not_measured_is_none():
    report = StepLedger(Costs()).report()
    assert report["predicted_speedup"] is None and report["measured_speedup"] is None and report["gamma"] is None
    ledger = StepLedger(Costs())
    ledger.add(step(4, 3, 3, 2.0, 12))
    assert ledger.report()["predicted_speedup"] == 1.5 and ledger.report()["measured_speedup"] is None  # no plain step to compare with
    for _ in range(MIN_PLAIN_STEPS - 1):
        ledger.add(step(4, 0, 0, 1.1, 4))
    assert ledger.report()["measured_speedup"] is None  # too few to say how far off the calibration is
    ledger = StepLedger(None)
    ledger.add(step(4, 3, 3, 2.0, 12))
    assert ledger.report()["predicted_speedup"] is None


def test_a_long_restless_timeline_is_coarsened_and_loses_nothing():
    ledger = StepLedger(None)
    for index in range(5000):
        ledger.add(step(4, index % 2, index % 2, 1.0, 4))
    timeline = ledger.report()["timeline"]
    assert len(timeline) <= MAX_SEGMENTS
    assert sum(row[2] for row in timeline) == 5000 and sum(row[5] for row in timeline) == 5000.0
