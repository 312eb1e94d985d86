"""The scheduler without a model: what the fuzz (test_scheduler_fuzz.py) has found wrong, and what it may miss."""

from __future__ import annotations

from checked_engine import CheckedEngine, told
from fake_engine import Sizes, asynchronous, make_scheduler

from openrlhf_sd.config import SelfSpecConfig
from openrlhf_sd.engine import scheduler as synchronous

CONFIG = SelfSpecConfig(mode="auto", gamma_max=3, calibration="none")


def engine_of(is_async: bool = False, **sizes) -> CheckedEngine:
    """Drafts three tokens in every step."""
    module = asynchronous() if is_async else synchronous
    return CheckedEngine(make_scheduler(told(module.SelfSpecScheduler), CONFIG, Sizes(**sizes), is_async), Sizes(**sizes))


def num_tokens(report: dict) -> int:
    return sum(segment[-1] for segment in report["timeline"])


def test_tokens_of_an_aborted_request_are_in_no_rollout():
    engine = engine_of()
    engine.add([11, 12, 13], max_tokens=5)
    engine.abort(["request 0"], while_executing=True)
    assert num_tokens(engine.end_rollout()) == 0


def test_what_an_asynchronous_step_samples_after_an_answer_has_stopped_is_in_no_rollout():
    engine = engine_of(is_async=True)
    engine.end_rollout()
    engine.add([11, 12, 13], max_tokens=20, stop_at=4)
    assert num_tokens(engine.finish()) == 5


def test_an_evaluation_leaves_the_acceptance_of_the_running_rollout_alone():
    engine = engine_of()
    engine.add([11, 12, 13], max_tokens=8)
    for _ in range(8):
        engine.turn()
    assert engine.acceptance.num_accepted_tokens
    engine.begin_eval()
    engine.add([11, 12, 13], max_tokens=20)
    engine.finish()
