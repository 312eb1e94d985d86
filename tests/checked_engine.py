"""An engine under watch: what it was asked for, what it has answered, and whether the two agree after every turn."""

from __future__ import annotations

import json
from dataclasses import astuple
from typing import Any

from fake_engine import BLOCK_SIZE, FakeEngine, FakeRunner, Script, Sizes
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.engine import EngineCoreOutput, FinishReason
from vllm.v1.request import RequestStatus

from openrlhf_sd.config import SelfSpecConfig
from openrlhf_sd.policy import acceptance_watch
from openrlhf_sd.policy.controller import FixedController
from openrlhf_sd.policy.observation import MeasuredStep, RolloutAcceptance, StepObservation

NO_DRAFTS = RolloutAcceptance(0, 0, 0)


class ToldController(FixedController):
    """Drafts as far as it is told, and remembers."""

    def __init__(self, gamma_max: int) -> None:
        super().__init__(gamma_max)
        self._plan: tuple[int, ...] = (gamma_max,)
        self._num_asked = 0
        self.steps: list[MeasuredStep] = []
        self.rollouts: list[RolloutAcceptance] = []

    def tell(self, plan: list[int]) -> None:
        """Gammas of the next steps, over and over."""
        self._plan = tuple(min(gamma, self._gamma) for gamma in plan)

    def next_gamma(self, observation: StepObservation) -> int:
        self._num_asked += 1
        return self.last_gamma

    @property
    def last_gamma(self) -> int:
        return self._plan[self._num_asked % len(self._plan)]

    def observe(self, step: MeasuredStep) -> None:
        self.steps.append(step)

    def end_rollout(self, acceptance: RolloutAcceptance) -> None:
        self.rollouts.append(acceptance)

    def take_steps(self) -> list[MeasuredStep]:
        steps, self.steps = self.steps, []
        return steps


def told(base: type) -> type:
    class ToldScheduler(base):
        def make_controller(self, config: SelfSpecConfig) -> ToldController:
            return ToldController(self.num_spec_tokens)

    return ToldScheduler


class CheckedEngine:
    """An engine, what it was asked for, and what it has answered. Every turn is followed by all checks."""

    def __init__(self, scheduler, sizes: Sizes, runner_class: type[FakeRunner] = FakeRunner) -> None:
        self.scheduler = scheduler
        self.sizes = sizes
        self.is_async = scheduler.vllm_config.scheduler_config.async_scheduling
        self.scripts: dict[str, Script] = {}
        self.answers: dict[str, list[int]] = {}
        self.finished: dict[str, FinishReason] = {}
        self.steps: list[MeasuredStep] = []
        """As a `ToldController` was told of them."""
        self.rollouts: list[RolloutAcceptance] = []
        """Those before the first rollout mark, likewise."""
        self.runner = runner_class(self.scripts, sizes, self.is_async)
        self.core = FakeEngine(scheduler, self.runner)
        self.has_rollout_marks = False
        self.is_eval = False
        self._start_rollout()

    def _start_rollout(self) -> None:
        self.num_tokens = 0
        self.acceptance = NO_DRAFTS

    @property
    def unfinished(self) -> list[str]:
        return [name for name in self.scripts if name not in self.finished]

    @property
    def right_answers(self) -> dict[str, list[int]]:
        """What every request that nobody aborts must be answered, by its name."""
        return {name: script.whole_output(self.sizes.max_model_len) for name, script in self.scripts.items()}

    def add(self, prompt: list[int], max_tokens: int, stop_at: int | None = None, prompt_logprobs: int | None = None) -> None:
        starts_rollout = not self.has_rollout_marks and not self.scheduler.requests
        number = len(self.scripts)
        script = Script(f"request {number}", number, tuple(prompt), max_tokens, stop_at, prompt_logprobs)
        self.scripts[script.request_id] = script
        self.answers[script.request_id] = []
        self.core.add_request(script.request(self.sizes.prefix_caching))
        if starts_rollout:
            if isinstance(self.scheduler.controller, ToldController):
                self.rollouts.append(self.scheduler.controller.rollouts.pop())
                assert self.rollouts[-1] == self.acceptance
            self._start_rollout()

    def abort(self, names: list[str], while_executing: bool) -> None:
        """vLLM takes an abort twice: while a step executes, and between steps."""
        if while_executing:
            self.core.aborts_queue.put(names)
            self._step()
        self.core.abort_requests(names)
        self._take_answers()
        self.finished = dict.fromkeys(names, FinishReason.ABORT) | self.finished
        self._check_state()

    def turn(self) -> None:
        self._step()
        self._take_answers()
        self._check_state()

    def _step(self) -> None:
        num_steps, is_off = self.runner.num_steps, self.has_collapsed or self.scheduler._has_scored()
        self.core.turn()
        if self.runner.num_steps == num_steps:
            return
        if is_off:
            assert self.runner.last_gamma == 0, "drafts after a collapse, or while a prompt is computed whose logprobs were asked for"
        elif isinstance(self.scheduler.controller, ToldController):
            assert self.runner.last_gamma == self.scheduler.controller.last_gamma

    @property
    def has_collapsed(self) -> bool:
        return self.scheduler._watch.cause is not None

    def _take_answers(self) -> None:
        before = self.acceptance
        while not self.core.output_queue.empty():
            _, outputs = self.core.output_queue.get_nowait()
            for output in outputs.outputs:
                self._take_answer(output)
            if outputs.scheduler_stats is not None and outputs.scheduler_stats.spec_decoding_stats is not None:
                stats = outputs.scheduler_stats.spec_decoding_stats
                assert stats.num_accepted_tokens <= stats.num_draft_tokens <= stats.num_drafts * self.scheduler.num_spec_tokens
                self.acceptance = _sum(self.acceptance, stats.num_drafts, stats.num_draft_tokens, stats.num_accepted_tokens)
        if isinstance(self.scheduler.controller, ToldController):
            for step in self.scheduler.controller.take_steps():
                self.steps.append(step)
                drafted, accepted = step.num_draft_tokens_per_pos, step.num_accepted_tokens_per_pos
                assert all(fewer <= more for fewer, more in zip(accepted, drafted, strict=True))
                assert all(list(counts) == sorted(counts, reverse=True) for counts in (drafted, accepted))
                assert step.num_drafts == (drafted[0] if drafted else 0) <= step.num_decodes
                before = _sum(before, step.num_drafts, sum(drafted), sum(accepted))
            assert before == self.acceptance

    def _take_answer(self, output: EngineCoreOutput) -> None:
        name = output.request_id
        answer, script = self.answers[name], self.scripts[name]
        assert name not in self.finished
        answer += output.new_token_ids
        self.num_tokens += len(output.new_token_ids)
        assert len(answer) <= script.max_tokens and len(script.prompt) + len(answer) <= self.sizes.max_model_len
        assert answer == script.tokens(0, len(answer)), "tokens lost, doubled or of another request"
        if output.finish_reason is not None:
            self.finished[name] = output.finish_reason
            assert output.finish_reason == FinishReason.ABORT or answer == script.whole_output(self.sizes.max_model_len)

    def _check_state(self) -> None:
        scheduler = self.scheduler
        assert len(scheduler.running) <= self.sizes.max_num_seqs
        assert set(scheduler.requests) == set(self.unfinished)
        used = set()
        for name, request in scheduler.requests.items():
            (blocks,) = scheduler.kv_cache_manager.get_block_ids(name)
            used.update(blocks)
            assert list(request.output_token_ids) == self.answers[name]
            assert len(blocks) * BLOCK_SIZE >= request.num_computed_tokens
            assert request.num_output_placeholders >= 0 and (self.is_async or request.num_output_placeholders == 0)
            assert len(request.spec_token_ids) <= scheduler.num_spec_tokens
            if request.status == RequestStatus.RUNNING:
                assert 0 < request.num_computed_tokens < request.num_tokens + request.num_output_placeholders
            else:
                assert not blocks and request.num_computed_tokens == 0
        num_free = scheduler.kv_cache_manager.block_pool.get_num_free_blocks()
        assert num_free + len(used) == self.sizes.num_blocks - 1, "KV blocks lost"  # one is vLLM's null block

    def end_rollout(self) -> dict[str, Any]:
        """As the actor does after a weight broadcast. Returns the rollout's report."""
        acceptance, has_collapsed = self.acceptance, self.has_collapsed
        report = json.loads(self.core.self_spec_end_rollout(*astuple(acceptance)), parse_constant=_not_finite)
        assert sum(row[-1] for row in report["timeline"]) == self.num_tokens
        assert sum(row[2] for row in report["timeline"]) == report["num_steps"]
        assert all(row[5] >= 0 for row in report["timeline"])
        assert (report["collapse"] is not None) == has_collapsed and not self.has_collapsed
        if has_collapsed:
            assert acceptance.num_drafts >= acceptance_watch.WINDOW
        self.has_rollout_marks = True
        self._start_rollout()
        return report

    def begin_eval(self) -> None:
        self.core.self_spec_begin_eval()
        self.is_eval = True
        self._training = self.num_tokens, self.acceptance
        self._start_rollout()

    def end_eval(self) -> None:
        self.core.self_spec_end_eval()
        self.is_eval = False
        self.num_tokens, self.acceptance = self._training

    def pause(self, mode: str, clear_cache: bool) -> None:
        self.core.pause_scheduler(mode, clear_cache)
        self._take_answers()
        self._check_state()

    @property
    def is_paused(self) -> bool:
        return self.scheduler.pause_state != PauseState.UNPAUSED

    def finish(self) -> dict[str, Any]:
        """To the end of all requests, where everything must be back. Returns the last rollout's report."""
        self.core.resume_scheduler()
        self._drain()
        if self.is_eval:
            self.end_eval()
        if not self.has_rollout_marks:
            self.add([11], max_tokens=1)  # ends the rollout before it
            self._drain()
        assert self.core.reset_prefix_cache()
        return self.end_rollout()

    def _drain(self) -> None:
        turns = 100 + 20 * sum(len(self.scripts[name].prompt) + self.scripts[name].max_tokens for name in self.unfinished)
        while self.core.has_work() and turns:
            self.turn()
            turns -= 1
        assert not self.unfinished, "requests that never end"


def _sum(acceptance: RolloutAcceptance, *counts: int) -> RolloutAcceptance:
    return RolloutAcceptance(*map(sum, zip(astuple(acceptance), counts, strict=True)))


def _not_finite(constant: str) -> None:
    raise AssertionError(f"{constant} in a report")
