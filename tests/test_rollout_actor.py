"""What the rollout actor adds to OpenRLHF's, without an engine.

A rollout gets the number of the training step it feeds, on every engine, also where one was idle or the run was resumed: readers pool the
engines' rows and join them with OpenRLHF's steps by it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from types import SimpleNamespace

import pytest

from openrlhf_sd.audit import AuditError
from openrlhf_sd.metrics import read_rows
from openrlhf_sd.rollout_actor import recording_class
from openrlhf_sd.rollout_pool import RolloutPool
from openrlhf_sd.self_spec_actor import _CountingExecutor, _self_spec_class


class Upstream:
    """OpenRLHF's actor around an engine that answers at once."""

    async def __init__(self):
        pass

    async def generate(self, prompt_token_ids, sampling_params, multi_modal_data=None):
        return SimpleNamespace(outputs=[SimpleNamespace(token_ids=[5, 6])])

    async def update_weight(self, name, dtype, shape, empty_cache=False):
        pass

    async def generate_responses(self, **kwargs):
        return [await self.executor.execute(**kwargs, llm_engine=self)]


async def rollouts(actor, *num_prompts: int) -> None:
    """So many prompts between two broadcasts each."""
    for count in num_prompts:
        for _ in range(count):
            await actor.generate([1, 2], None)
        await actor.update_weight("first", None, None)
        await actor.update_weight("last", None, None, empty_cache=True)


def numbers(folder) -> dict[int, list[int]]:
    rows, _ = read_rows(folder / "metrics.jsonl")
    return {engine: [row["rollout"] for row in rows if row["engine"] == engine] for engine in {row["engine"] for row in rows}}


def record(folder, engine: int, resumed_step: int, *num_prompts: int) -> None:
    async def run():
        actor = object.__new__(recording_class(Upstream))
        await actor.__init__(engine=engine, run_dir=folder, resumed_step=resumed_step)
        await rollouts(actor, *num_prompts)

    asyncio.run(run())


PRESENT = [{5: SimpleNamespace(logprob=-0.5)}, {6: SimpleNamespace(logprob=-1.5)}]


@pytest.mark.parametrize(
    "logprobs, missing",
    [
        (None, "2 of 2 sampled tokens .*first at position 0"),
        (PRESENT[:1], "1 of 2 sampled tokens .*first at position 1"),
        ([PRESENT[0], {7: PRESENT[1][6]}], "1 of 2 .*first at position 1"),
        ([PRESENT[0], {6: SimpleNamespace(logprob=float("-inf"))}], "1 of 2 .*first at position 1"),
        (PRESENT, None),
    ],
)
def test_a_sampled_token_without_a_logprob_is_an_error(logprobs, missing):
    """OpenRLHF would read 0.0, a probability of 1 (tests/upstream/openrlhf_missing_logprob.py)."""

    class Engine(Upstream):
        async def generate(self, prompt_token_ids, sampling_params, multi_modal_data=None):
            return SimpleNamespace(outputs=[SimpleNamespace(token_ids=[5, 6], logprobs=logprobs, stop_reason=None)])

    record = SimpleNamespace(request_started=lambda now: None, request_ended=lambda now: None, request_answered=lambda *numbers: None)
    actor = object.__new__(_self_spec_class(Engine))
    actor.llm = SimpleNamespace(get_tokenizer=lambda: None)
    actor._auditor, actor._training_record, actor._record = None, None, record
    for wanted in (missing, None):  # asked for logprobs, and not
        expected = pytest.raises(RuntimeError, match=wanted) if wanted else contextlib.nullcontext()
        with expected:
            asyncio.run(actor.generate([1], SimpleNamespace(logprobs=1 if wanted == missing else None, stop=[])))


def test_an_engine_without_requests_in_a_rollout_counts_it_all_the_same(tmp_path):
    record(tmp_path, 0, 0, 2, 1, 2)
    record(tmp_path, 1, 0, 2, 0, 2)
    assert numbers(tmp_path) == {0: [0, 1, 2], 1: [0, 2]}


def test_a_resumed_run_goes_on_counting_after_the_broadcast_of_its_checkpoint(tmp_path):
    record(tmp_path, 0, 7, 0, 2, 2)
    record(tmp_path, 1, 7, 0, 0, 2)
    assert numbers(tmp_path) == {0: [7, 8], 1: [8]}


class Remote:
    """The pool as a Ray actor's handle."""

    def __init__(self, pool: RolloutPool) -> None:
        self.add = SimpleNamespace(remote=pool.add)
        self.agree = SimpleNamespace(remote=pool.agree)


def speculating(folder, pool: RolloutPool, resumed_step: int, fingerprints: list[str]):
    """An actor whose engine gets weights of these fingerprints, one after the other."""
    actor = object.__new__(_self_spec_class(Upstream))
    syncs = iter(fingerprints)

    async def collective_rpc(method):
        return [{"requantize_s": 0.1, "drafter_error": 0.1, "fingerprint": next(syncs)}]

    async def call_utility_async(method, *args):
        return json.dumps({"controller": {}})

    async def start():
        await super(type(actor), actor).__init__(engine=0, run_dir=folder, resumed_step=resumed_step)
        actor.llm = SimpleNamespace(collective_rpc=collective_rpc, engine_core=SimpleNamespace(call_utility_async=call_utility_async))
        actor._pool, actor._auditor, actor._state_rows = Remote(pool), None, None
        return actor

    return start()


def test_a_rollout_that_fails_its_audit_has_its_row(tmp_path):
    class Failing:
        has_responses = False

        def take_result(self):
            raise AuditError("evidence is in ...")

    async def run():
        actor = await speculating(tmp_path, RolloutPool(1), 0, ["step 1"])
        for _ in range(2):
            actor._record.request_answered(2, 2)
        actor._auditor = Failing()
        await rollouts(actor, 0)

    with pytest.raises(AuditError):
        asyncio.run(run())
    [row], _ = read_rows(tmp_path / "metrics.jsonl")
    assert (row["rollout"], row["num_responses"], row["audit"]) == (0, 2, None)


def test_engines_that_get_different_weights_of_a_checkpoint_stop_the_run(tmp_path):
    async def run():
        pool = RolloutPool(2)
        actors = [await speculating(tmp_path, pool, 7, [fingerprint]) for fingerprint in ("one", "other")]
        return await asyncio.gather(*(rollouts(actor, 0) for actor in actors), return_exceptions=True)

    results = asyncio.run(run())
    assert [result for result in results if result is not None][0].args[0].startswith("self-speculation: weight sync 7 delivered different")


def test_syncs_that_bring_all_engines_the_same_weights_go_on(tmp_path):
    async def run():
        pool = RolloutPool(2)
        actors = [await speculating(tmp_path, pool, 7, ["checkpoint", "step 8", "step 9"]) for _ in range(2)]
        await asyncio.gather(*(rollouts(actor, 0, 0, 0) for actor in actors))
        return [actor._rollout for actor in actors]

    assert asyncio.run(run()) == [9, 9]


def test_an_executor_without_extra_logs_is_as_good_as_for_openrlhf(tmp_path):
    class Executor:
        async def execute(self, prompt, llm_engine):
            return {"prompt": prompt}

    async def run():
        actor = await speculating(tmp_path, RolloutPool(1), 0, [])
        actor.executor = _CountingExecutor(Executor())
        return await actor.generate_responses(prompt="one")

    [response] = asyncio.run(run())
    assert response["prompt"] == "one" and "rollout/sd/num_drafts" in response["extra_logs"]
