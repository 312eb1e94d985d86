"""The row of a rollout, worked out by hand."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

from openrlhf_sd.rollout_record import ResponseCounts, RolloutRecord


def verified(num_drafts: int, gamma: int, accepted: int) -> SimpleNamespace:
    """One engine step in which `num_drafts` requests verified `gamma` draft tokens each, `accepted` of them accepted by each."""
    return SimpleNamespace(
        num_drafts=num_drafts,
        num_draft_tokens=num_drafts * gamma,
        num_accepted_tokens=num_drafts * accepted,
        num_accepted_tokens_per_pos=[num_drafts] * accepted + [0] * (gamma - accepted),
        num_draft_tokens_per_pos=[num_drafts] * gamma,
    )


def row(record: RolloutRecord, speculating: bool = True) -> dict:
    counts = record.counts if speculating else None
    return record.row(rollout=0, engine=0, time_unix_s=1.0, weight_sync_s=0.1, counts=counts, report={})


def test_rollout_seconds_are_those_with_a_request_in_flight():
    record = RolloutRecord()
    record.request_started(10.0)
    record.request_started(11.0)
    record.request_ended(12.0)
    record.request_ended(15.0)  # busy 10..15
    record.request_started(20.0)
    record.request_ended(21.0)  # busy 20..21
    assert row(record)["timing/rollout_s"] == 6.0


def test_acceptance_is_pooled_over_steps():
    record = RolloutRecord()
    record.step(None)
    record.step(verified(num_drafts=4, gamma=3, accepted=2))
    record.step(verified(num_drafts=2, gamma=3, accepted=3))
    written = row(record)
    assert written["rollout/sd/acceptance_rate"] == 14 / 18  # 4 * 2 + 2 * 3 of 4 * 3 + 2 * 3
    assert written["rollout/sd/mean_acceptance_length"] == 1 + 14 / 6


def test_not_measured_is_null():
    written = row(RolloutRecord())
    assert written["rollout/sd/acceptance_rate"] is None and written["rollout/sd/toggle_step"] is None
    assert row(RolloutRecord(), speculating=False)["rollout/sd/num_drafts"] is None
    json.dumps(written, allow_nan=False)


def test_requests_in_flight_move_into_the_next_rollout():
    """Each rollout has its own share of their seconds, and neither the pause between them."""
    record = RolloutRecord()
    record.request_started(1.0)
    following = record.next(5.0, 7.0)
    following.request_ended(10.0)
    assert (row(record)["timing/rollout_s"], row(following)["timing/rollout_s"]) == (4.0, 3.0)


def test_response_without_drafts_counts_as_the_pooled_rate():
    record = RolloutRecord()
    nothing = ResponseCounts()
    assert math.isnan(nothing.logs(record)["rollout/sd/acceptance_rate"])  # nothing drafted yet: a gap, not a number
    record.step(verified(num_drafts=2, gamma=4, accepted=3))
    assert nothing.logs(record)["rollout/sd/acceptance_rate"] == 0.75
    assert nothing.logs(record.next(1.0, 2.0))["rollout/sd/acceptance_rate"] == 0.75  # the rollout before, until this one drafts

    # 3 verify steps: one accepted 0, two accepted 2 of 3 drafted each
    own = ResponseCounts()
    own.add(SimpleNamespace(histogram=[1, 0, 2, 0], num_draft_tokens=9))
    assert own.logs(record)["rollout/sd/acceptance_rate"] == 4 / 9
    assert own.logs(record)["rollout/sd/mean_acceptance_length"] == 1 + 4 / 3


def test_of_a_response_that_a_stop_string_ended_the_counts_are_unknown():
    """vLLM's engine process tells them with the token that ends a request, and of this end it learns afterwards."""
    record = RolloutRecord()
    record.step(verified(num_drafts=2, gamma=4, accepted=3))
    response = ResponseCounts()
    response.add(SimpleNamespace(histogram=[1, 0], num_draft_tokens=1))
    response.add(None)
    logs = response.logs(record)
    assert logs["rollout/sd/acceptance_rate"] == 0.75
    assert logs["rollout/sd/mean_acceptance_length"] == 4.0
    assert all(math.isnan(logs[f"rollout/sd/{count}"]) for count in ("num_drafts", "num_draft_tokens", "num_accepted_tokens"))
    record.response_logged(logs)
    assert row(record)["response_mean"]["rollout/sd/num_drafts"] is None


def test_means_over_responses_skip_nothing():
    record = RolloutRecord()
    record.response_logged({"rollout/sd/num_drafts": 2.0})
    record.response_logged({"rollout/sd/num_drafts": 4.0})
    assert row(record)["response_mean"] == {"rollout/sd/num_drafts": 3.0}
