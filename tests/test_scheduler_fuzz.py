"""Random sequences of what can happen to an engine, against the real scheduler: whatever the order, every request gets its own
tokens, once, and the counts of tokens, drafts and KV blocks hold (checked_engine.py).

The engine has no model (fake_engine.py). It runs synchronously, as on CPU, and asynchronously, as on CUDA.
"""

from __future__ import annotations

from collections import Counter
from unittest import mock

import pytest
from calibrations import CONFIG, TERMS
from checked_engine import CheckedEngine, told
from fake_engine import BLOCK_SIZE, WRONG, FakeRunner, Sizes, asynchronous, make_scheduler
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.outputs import DraftTokenIds, ModelRunnerOutput

from openrlhf_sd.config import SelfSpecConfig
from openrlhf_sd.engine import scheduler as synchronous
from openrlhf_sd.policy import acceptance_watch
from openrlhf_sd.policy.cost_model import CostModel
from openrlhf_sd.policy.model_constants import model_constants

FUZZ = settings(
    max_examples=100,
    stateful_step_count=25,
    deadline=None,
    derandomize=True,
    database=None,
    report_multiple_bugs=False,
    phases=[Phase.generate],  # with Phase.shrink a failure takes minutes to be told, and is shorter
)

UP_TO_SIX = st.integers(0, 6)
ARRIVALS = st.tuples(st.integers(1, 24), st.integers(0, 36), st.booleans(), st.integers(1, 40), st.none() | st.integers(0, 60))
"""Tokens of a prompt, and of a beginning that it shares with others; whether that is the prompt and the answer of the request
before; max_tokens; where its answer stops by itself."""


class _Events(RuleBasedStateMachine):
    """What can happen to an engine. A subclass says what a step is like.

    Args:
        is_async: as on CUDA.
        seen: counts what has happened.
    """

    engine: CheckedEngine | None = None

    def __init__(self, is_async: bool, seen: Counter[str]) -> None:
        super().__init__()
        self.module = asynchronous() if is_async else synchronous
        self.is_async = is_async
        self.seen = seen

    @initialize(
        kind=UP_TO_SIX,
        spare_blocks=st.integers(0, 30),
        max_num_seqs=st.sampled_from([4, 8, 2]),
        budget=st.sampled_from([64, 10, 16, 6]),
        max_model_len=st.sampled_from([64, 128]),
        prefix_caching=st.booleans(),
        has_rollout_marks=st.booleans(),
        arrivals=st.lists(ARRIVALS, min_size=3, max_size=8),
    )
    def start(self, kind, spare_blocks, max_num_seqs, budget, max_model_len, prefix_caching, has_rollout_marks, arrivals) -> None:
        sizes = Sizes(max_model_len // BLOCK_SIZE + 1 + spare_blocks, max_num_seqs, budget, max_model_len, prefix_caching)
        self.engine = CheckedEngine(self.make_scheduler(kind, sizes), sizes)
        if has_rollout_marks:
            self.engine.end_rollout()
        self.add(arrivals)

    @rule(arrivals=st.lists(ARRIVALS, min_size=1, max_size=6))
    def add(self, arrivals) -> None:
        for length, num_shared, goes_on, max_tokens, stop_at in arrivals:
            scripts, answers = list(self.engine.scripts.values()), list(self.engine.answers.values())
            before = [*scripts[-1].prompt, *answers[-1]] if goes_on and scripts else list(range(10, 70))
            self.engine.add(before[:num_shared] + [100 + len(scripts)] * length, max_tokens, stop_at)

    @rule(
        plan=st.lists(UP_TO_SIX, min_size=1, max_size=6),
        num_right=st.lists(UP_TO_SIX, min_size=1, max_size=4),
        num_turns=st.integers(1, 20),
    )
    def run(self, plan, num_right, num_turns) -> None:
        self.plan_steps(plan)
        self.engine.runner.num_right = tuple(num_right)
        for _ in range(num_turns):
            had_collapsed = self.engine.has_collapsed
            self.engine.turn()
            self.seen["collapses"] += self.engine.has_collapsed and not had_collapsed

    @precondition(lambda self: self.engine.unfinished)
    @rule(places=st.lists(st.integers(0, 20), min_size=1, max_size=3), while_executing=st.booleans())
    def abort(self, places, while_executing) -> None:
        unfinished = self.engine.unfinished
        self.engine.abort(sorted({unfinished[place % len(unfinished)] for place in places}), while_executing)
        self.seen["aborts"] += 1

    @precondition(lambda self: not self.engine.is_paused)
    @rule(mode=st.sampled_from(["keep", "wait", "abort"]), clear_cache=st.booleans())
    def pause(self, mode, clear_cache) -> None:
        self.engine.pause(mode, clear_cache)
        self.seen["pauses"] += 1

    @precondition(lambda self: self.engine.is_paused)
    @rule()
    def resume(self) -> None:
        self.engine.core.resume_scheduler()

    @rule(reset_running_requests=st.booleans())
    def reset_prefix_cache(self, reset_running_requests) -> None:
        self.engine.core.reset_prefix_cache(reset_running_requests)

    @precondition(lambda self: not self.engine.is_eval)
    @rule()
    def sync(self) -> None:
        self.engine.end_rollout()
        self.seen["syncs"] += 1

    @precondition(lambda self: not self.engine.is_eval)
    @rule()
    def begin_eval(self) -> None:
        self.engine.begin_eval()
        self.seen["evaluations"] += 1

    @precondition(lambda self: self.engine.is_eval)
    @rule()
    def end_eval(self) -> None:
        self.engine.end_eval()

    def teardown(self) -> None:
        if self.engine is not None:
            self.engine.finish()
            self.seen.update(self.engine.runner.seen)


class AnyGamma(_Events):
    """Gamma changes at every step, as hypothesis likes."""

    def make_scheduler(self, kind: int, sizes: Sizes):
        config = SelfSpecConfig(mode="auto", gamma_max=(3, 6, 1)[kind % 3], calibration="none")
        return make_scheduler(told(self.module.SelfSpecScheduler), config, sizes, self.is_async)

    def plan_steps(self, plan: list[int]) -> None:
        self.engine.scheduler.controller.tell(plan)


COSTS = CostModel(model_constants(CONFIG), "w4", TERMS)
CONTROLLED = (
    (SelfSpecConfig(mode="auto", gamma_max=5, calibration="none"), None),
    (SelfSpecConfig(mode="auto", gamma_max=5), COSTS),
    (SelfSpecConfig(mode="adaptive", gamma=3, ladder=(1, 3, 5), ramp_up=1, patience=1), COSTS),
)


class Clock:
    """In the place of `time`, where the scheduler asks it: once per step."""

    TICKS_S = (0.01, 0.02, -3600.0, 0.0, 1e-9, 3.0, 1e6)

    def __init__(self) -> None:
        self._now_s = 1000.0
        self._plan, self._num_asked = [0], 0

    def tell(self, plan: list[int]) -> None:
        self._plan = plan

    def perf_counter(self) -> float:
        self._num_asked += 1
        self._now_s += self.TICKS_S[self._plan[self._num_asked % len(self._plan)]]
        return self._now_s


class RealControllers(_Events):
    """`auto` and `adaptive`, with a clock that stalls, stands still and goes back."""

    def __init__(self, is_async: bool, seen: Counter[str]) -> None:
        super().__init__(is_async, seen)
        self.clock = Clock()
        self._patch = mock.patch.object(self.module, "time", self.clock)
        self._patch.start()

    def make_scheduler(self, kind: int, sizes: Sizes):
        config, costs = CONTROLLED[kind % len(CONTROLLED)]
        return make_scheduler(self.module.SelfSpecScheduler, config, sizes, self.is_async, costs)

    def plan_steps(self, plan: list[int]) -> None:
        self.clock.tell(plan)

    def teardown(self) -> None:
        super().teardown()
        self._patch.stop()


@pytest.mark.parametrize("events", [AnyGamma, RealControllers])
@pytest.mark.parametrize("is_async", [False, True], ids=["synchronous", "asynchronous"])
def test_every_request_gets_its_tokens_whatever_happens(events, is_async, monkeypatch) -> None:
    monkeypatch.setattr(acceptance_watch, "WINDOW", 32)  # so that some rollouts collapse and some do not
    seen: Counter[str] = Counter()
    run_state_machine_as_test(lambda: events(is_async, seen), settings=FUZZ)
    happened = {name for name, count in seen.items() if count}
    steps = {
        "accepted drafts",
        "rejected drafts",
        "plain tokens",
        "parts of prompts",
        "prefix hits",
        "preemptions",
        "steps passed over",
    }
    assert happened == steps | {"aborts", "pauses", "syncs", "evaluations", "collapses"}


class LosesAToken(FakeRunner):
    def execute(self, step: SchedulerOutput) -> ModelRunnerOutput:
        output = super().execute(step)
        for tokens in output.sampled_token_ids:
            del tokens[1:2]
        return output


class DraftsOneTooMany(FakeRunner):
    def drafts(self) -> DraftTokenIds | None:
        made = super().drafts()
        return made and DraftTokenIds(made.req_ids, [[*tokens, WRONG] for tokens in made.draft_token_ids])


class DraftsOverWhatIsVerified(FakeRunner):
    """As vLLM's own proposer would with a shared KV cache."""

    def _draft(self, request_id: str, num_right: int) -> None:
        super()._draft(request_id, num_right)
        row = self.rows[request_id]
        self._kv[self._slot(row, row.num_computed - 1)] = "the drafter's"


@pytest.mark.parametrize(
    ("runner_class", "complaint"),
    [
        (LosesAToken, "tokens lost"),
        (DraftsOneTooMany, "more drafts scheduled"),
        (DraftsOverWhatIsVerified, "keys and values of something else"),
    ],
)
def test_what_goes_wrong_is_noticed(runner_class, complaint) -> None:
    config = SelfSpecConfig(mode="auto", gamma_max=3, calibration="none")
    engine = CheckedEngine(make_scheduler(told(synchronous.SelfSpecScheduler), config, Sizes(), is_async=False), Sizes(), runner_class)
    engine.scheduler.controller.tell([2])
    engine.add([11, 12, 13], max_tokens=10)
    with pytest.raises(AssertionError, match=complaint):
        engine.finish()


def test_a_block_that_is_not_given_back_is_noticed(monkeypatch) -> None:
    config = SelfSpecConfig(mode="auto", gamma_max=3, calibration="none")
    engine = CheckedEngine(make_scheduler(told(synchronous.SelfSpecScheduler), config, Sizes(), is_async=False), Sizes())
    monkeypatch.setattr(engine.scheduler, "_free_request_blocks", lambda request: None)
    engine.add([11, 12, 13], max_tokens=10)
    with pytest.raises(AssertionError, match="KV blocks lost"):
        engine.finish()
