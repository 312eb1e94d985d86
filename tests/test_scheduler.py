"""The scheduler without a model: what the fuzz (test_scheduler_fuzz.py) has found wrong, and what it may miss."""

from __future__ import annotations

import inspect
import pickle

import pytest
from calibrations import make_calibration
from checked_engine import CheckedEngine, told
from fake_engine import Sizes, asynchronous, block_hasher, make_scheduler
from vllm import SamplingParams
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.request import Request

from openrlhf_sd.config import SelfSpecConfig
from openrlhf_sd.engine import scheduler as synchronous

CONFIG = SelfSpecConfig(mode="auto", gamma_max=3, calibration="none")

both = pytest.mark.parametrize("is_async", [False, True], ids=["synchronous", "asynchronous"])


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


@both
def test_a_controller_is_told_what_came_out_and_how_many_requests_ended(is_async):
    engine = engine_of(is_async)
    engine.add([11, 12, 13], max_tokens=20, stop_at=4)  # amid a draft
    engine.add([11, 12, 13], max_tokens=10)
    engine.finish()
    assert sum(step.num_tokens for step in engine.steps) == sum(map(len, engine.answers.values()))
    assert sum(step.num_ended for step in engine.steps) == len(engine.answers)


def test_an_evaluation_leaves_the_acceptance_of_the_running_rollout_alone():
    engine = engine_of()
    engine.add([11, 12, 13], max_tokens=8)
    for _ in range(8):
        engine.turn()
    training = engine.acceptance
    assert training.num_accepted_tokens
    engine.begin_eval()
    engine.add([11, 12, 13], max_tokens=20)
    engine.finish()
    assert engine.rollouts[-1] == training


@both
@pytest.mark.parametrize("mode", ["toggle", "adaptive", "auto"])
def test_an_evaluation_leaves_the_controller_as_it_was(is_async, mode):
    """A real one. `auto` learns from every step, so what the evaluation has taught its copy must go."""
    module, costs = asynchronous() if is_async else synchronous, make_calibration().cost_model
    engine = CheckedEngine(make_scheduler(module.SelfSpecScheduler, SelfSpecConfig(mode=mode), Sizes(), is_async, costs), Sizes())
    engine.end_rollout()
    engine.add([11, 12, 13], max_tokens=40)
    for _ in range(12):
        engine.turn()
    controller, state = engine.scheduler.controller, everything_in(engine.scheduler.controller)
    engine.begin_eval()
    engine.add([11, 12, 13], max_tokens=40)
    for _ in range(12):
        engine.turn()
    assert (everything_in(engine.scheduler.controller) != state) == (mode == "auto")
    engine.end_eval()
    assert engine.scheduler.controller is controller and everything_in(controller) == state


def everything_in(controller) -> bytes:
    return pickle.dumps(controller)


@both
@pytest.mark.parametrize(("prompt_logprobs", "gamma"), [(0, 0), (None, 3)])
def test_nothing_is_drafted_while_a_prompt_is_computed_whose_logprobs_were_asked_for(is_async, prompt_logprobs, gamma):
    engine = engine_of(is_async)
    engine.end_rollout()
    engine.add([11, 12, 13], max_tokens=40)
    for _ in range(4):
        engine.turn()
    engine.add(list(range(100, 140)), max_tokens=6, prompt_logprobs=prompt_logprobs)
    engine.finish()
    [beside] = [number for number, step in enumerate(engine.steps) if step.num_prefill_tokens >= 40]
    assert engine.steps[beside].gamma_drafted == gamma
    assert engine.steps[beside + 1].gamma_drafted == 3, "drafts for its own tokens"
    assert engine.answers == engine.right_answers


@both
def test_a_request_passed_over_for_want_of_token_budget_decodes_without_its_old_drafts(is_async):
    engine = engine_of(is_async, max_num_batched_tokens=9)
    for _ in range(3):
        engine.add([11, 12], max_tokens=12)
    engine.finish()
    assert engine.runner.seen["steps passed over"]
    assert engine.answers == engine.right_answers


def test_a_request_passed_over_before_the_end_of_its_context_decodes_without_its_old_drafts():
    """Asynchronously: were all drafts in flight accepted, there would be no room for another token."""
    for length in range(56, 64):
        engine = engine_of(is_async=True)
        engine.add(list(range(100, 100 + length)), max_tokens=40)
        engine.add([11, 12], max_tokens=40)
        engine.finish()
        assert engine.answers == engine.right_answers


@both
def test_a_step_whose_output_waits_for_the_launch_of_another_kind_of_step_is_marked(is_async):
    """Synchronously no output waits."""
    engine = engine_of(is_async)
    engine.end_rollout()
    engine.scheduler.controller.tell([0, 0, 0, 3, 3, 3])
    engine.add([11, 12, 13], max_tokens=30)
    engine.finish()
    drafted = [step.gamma_drafted for step in engine.steps]
    alike = [this == following for this, following in zip(drafted, drafted[1:])]
    assert alike.count(False) >= 3
    marked = [step.is_followed_alike for step in engine.steps]
    assert marked == ([*alike, True] if is_async else [True] * len(marked))


class Clock:
    def __init__(self, *ticks_s: float) -> None:
        self._now_s, self._ticks_s = 100.0, list(ticks_s)

    def perf_counter(self) -> float:
        self._now_s += self._ticks_s.pop(0)
        return self._now_s


def test_no_step_is_timed_by_a_clock_that_stood_still_or_was_set_back(monkeypatch):
    monkeypatch.setattr(synchronous, "time", Clock(1.0, 2.0, 0.0, -50.0, 0.5, 1.0))
    engine = engine_of()
    engine.runner.num_right = (0,)
    engine.end_rollout()
    engine.add([11, 12, 13], max_tokens=6)
    engine.finish()
    assert [step.step_s for step in engine.steps] == [None, 2.0, None, None, 0.5, 1.0]


@pytest.mark.parametrize("tick_s", [0.0, -1.0])
def test_auto_outlives_a_clock_that_stands_still_or_runs_backwards(monkeypatch, tick_s):
    monkeypatch.setattr(synchronous, "time", Clock(1.0, *[0.01] * 10, *[tick_s] * 60))
    engine = CheckedEngine(make_scheduler(synchronous.SelfSpecScheduler, CONFIG, Sizes(), is_async=False), Sizes())
    engine.runner.num_right = (0,)
    engine.add([11, 12, 13], max_tokens=40)
    engine.finish()
    assert engine.answers == engine.right_answers


@both
def test_after_the_pause_of_a_partial_rollout_nothing_of_the_old_policys_kv_is_left(is_async):
    """OpenRLHF pauses with `pause_generation(mode="keep")`, and vLLM's `clear_cache` is on by default: running requests give their blocks
    back, and prompt and answer so far are prefilled again, by then by the new policy. Nor is there a draft of the old drafter."""
    assert inspect.signature(AsyncLLM.pause_generation).parameters["clear_cache"].default is True
    engine = engine_of(is_async, prefix_caching=True)
    engine.end_rollout()
    prompts = [list(range(first, first + 20)) for first in (11, 41)]
    for prompt in prompts:
        engine.add(prompt, max_tokens=20)
    while not all(engine.answers.values()):
        engine.turn()
    requests, cache = list(engine.scheduler.running), engine.scheduler.kv_cache_manager

    def num_found(prompt: list[int]) -> int:
        return cache.get_computed_blocks(Request("new", prompt, SamplingParams(), None, block_hasher=block_hasher))[1]

    assert [num_found(prompt) for prompt in prompts] == [16, 16]
    engine.pause("keep", clear_cache=True)
    for _ in range(4):  # what an asynchronous engine has begun
        engine.turn()
    assert [num_found(prompt) for prompt in prompts] == [0, 0]
    assert [(request.num_computed_tokens, request.spec_token_ids) for request in requests] == [(0, []), (0, [])]
    assert all(engine.answers.values()) and len(engine.unfinished) == 2
    engine.finish()
    assert engine.answers == engine.right_answers
