"""Which responses are audited, what counts as bf16 noise, and what is kept where it is more."""

import asyncio
import json
import math
from types import SimpleNamespace

import pytest
from fake_engine import Sizes, block_hasher, make_scheduler
from vllm import SamplingParams
from vllm.sampling_params import StructuredOutputsParams
from vllm.v1.request import Request

from openrlhf_sd import SelfSpecConfig, audit
from openrlhf_sd.audit import AuditError, ScoredResponse
from openrlhf_sd.engine.scheduler import SelfSpecScheduler
from openrlhf_sd.rescoring import Auditor


def scored(diffs: list[float]) -> ScoredResponse:
    return ScoredResponse([1, 2], list(range(len(diffs))), 1.0, 0, [-1.0] * len(diffs), [-1.0 + diff for diff in diffs])


def test_every_third_rollout_from_the_first_on():
    assert [rollout for rollout in range(7) if audit.is_due(rollout, 3)] == [0, 3, 6]
    assert not any(audit.is_due(rollout, 0) for rollout in range(7))


@pytest.mark.parametrize(
    ("diffs", "is_noise"),
    [
        ([0.01, -0.02] * 50, True),
        ([0.06, -0.06] * 50, False),  # the mean
        ([0.0] * 998 + [0.9, 0.9], True),  # two unlikely tokens
        ([0.0] * 97 + [0.9] * 3, False),  # three of a hundred
        ([0.0] * 1991 + [0.9] * 9, True),  # nine of two thousand
        ([], True),
    ],
)
def test_bf16_noise(diffs, is_noise):
    assert audit.audit([scored(diffs)]).is_noise == is_noise


def test_numbers_by_hand():
    result = audit.audit([scored([0.1, -0.3]), scored([0.0, 0.6])])
    assert (result.num_responses, result.num_tokens, result.num_far) == (2, 4, 1)
    assert math.isclose(result.mean_abs_diff, 0.25) and math.isclose(result.max_abs_diff, 0.6)


@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_a_logprob_that_is_no_number_is_missing(value):
    with pytest.raises(AuditError, match="NaN or infinite"):
        audit.audit([scored([0.0, value])])


def test_evidence_holds_tokens_and_both_logprobs(tmp_path):
    response = scored([2.0, 2.0, 2.0])
    error = audit.save_evidence(tmp_path / "audit", 6, 1, audit.audit([response]), [response])
    evidence = json.loads((tmp_path / "audit" / "rollout6-engine1.json").read_text())
    assert evidence["responses"] == [vars(response)] and evidence["mean_abs_diff"] == 2.0
    assert str(error).endswith(f"more than bf16 noise; the evidence is in {tmp_path}/audit/rollout6-engine1.json")
    (tmp_path / "file").touch()
    error = audit.save_evidence(tmp_path / "file" / "audit", 6, 1, audit.audit([response]), [response])
    assert "could not be saved" in str(error)


class ScoringEngine:
    """An AsyncLLM that scores every token -1.25, but for those it has no logprob of."""

    def __init__(self, logprobs_mode="processed_logprobs", missing=()):
        self.model_config = SimpleNamespace(logprobs_mode=logprobs_mode, max_model_len=10)
        self.temperatures = []
        self.prompts = []
        self.salts = []
        self._missing = missing

    async def collective_rpc(self, method, args):
        assert method == "self_spec_score_at"
        self.temperatures.append(args[0])

    async def generate(self, prompt, params, request_id):
        tokens = prompt["prompt_token_ids"]
        self.prompts.append(tokens)
        self.salts.append(prompt.get("cache_salt"))
        assert params.prompt_logprobs == 0 and len(tokens) < self.model_config.max_model_len
        entries = [None if p == 0 or p in self._missing else {t: SimpleNamespace(logprob=-1.25)} for p, t in enumerate(tokens)]
        yield SimpleNamespace(prompt_logprobs=entries)


def completion(tokens, logprob=-1.25):
    return SimpleNamespace(token_ids=tokens, logprobs=[{token: SimpleNamespace(logprob=logprob)} for token in tokens])


def run(auditor: Auditor, *responses) -> None:
    for prompt, params, answer in responses:
        auditor.keep(prompt, params, answer)
    asyncio.run(auditor.rescore())


def test_chosen_requests_are_spread_and_ask_for_logprobs(tmp_path):
    auditor = Auditor(ScoringEngine(), 2, tmp_path, engine=0)
    chosen = [auditor.choose(SamplingParams()) for _ in range(100)]
    assert [number for number, params in enumerate(chosen) if params] == [0, 8, 16, 24]
    assert all(params.logprobs == 0 for params in chosen if params)
    assert auditor.take_result() is None
    assert not any(auditor.choose(SamplingParams()) for _ in range(100)), "rollout 1 is not due"
    auditor.take_result()
    assert auditor.choose(SamplingParams(logprobs=1)).logprobs == 1


CHANGED = [
    *({"top_p": 0.9}, {"top_k": 5}, {"min_p": 0.1}, {"allowed_token_ids": [1, 2]}, {"bad_words": ["no"]}),
    *({"presence_penalty": 0.5}, {"frequency_penalty": -0.5}, {"repetition_penalty": 1.1}, {"logit_bias": {1: 2.0}}),
]


@pytest.mark.parametrize("change", CHANGED, ids=str)
def test_a_cut_or_bent_distribution_is_not_comparable_where_logprobs_are_processed(tmp_path, change):
    assert Auditor(ScoringEngine(), 1, tmp_path, 0).choose(SamplingParams(**change)) is None
    assert Auditor(ScoringEngine("raw_logprobs"), 1, tmp_path, 0).choose(SamplingParams(**change))


def test_what_a_grammar_allows_is_not_comparable_at_all(tmp_path):
    params = SamplingParams(structured_outputs=StructuredOutputsParams(choice=["yes", "no"]))
    assert Auditor(ScoringEngine("raw_logprobs"), 1, tmp_path, 0).choose(params) is None


def test_scores_at_the_temperature_of_the_rollout_without_the_tokens_of_a_minimum_length(tmp_path):
    engine = ScoringEngine()
    auditor = Auditor(engine, 1, tmp_path, 0)
    run(auditor, ([1, 2, 3], SamplingParams(temperature=0.7, min_tokens=1), completion([5, 6, 7])))
    result = auditor.take_result()
    assert engine.temperatures == [0.7, 1.0]
    assert engine.prompts == [[1, 2, 3, 5, 6, 7]]
    assert (result.num_tokens, result.mean_abs_diff) == (2, 0.0)
    assert auditor.take_result() is None, "given once"


def test_raw_logprobs_are_those_of_temperature_1_and_a_full_context_loses_its_last_token(tmp_path):
    engine = ScoringEngine("raw_logprobs")
    auditor = Auditor(engine, 1, tmp_path, 0)
    run(auditor, ([1, 2, 3], SamplingParams(temperature=0.7), completion(list(range(20, 27)))))
    assert engine.temperatures == [1.0, 1.0]
    assert len(engine.prompts[0]) == 9
    assert auditor.take_result().num_tokens == 6


def test_with_prefix_caching_the_next_policy_does_not_start_from_what_the_audit_computed(tmp_path):
    """The audit comes after OpenRLHF's order to forget the cache and before the new weights."""
    scoring = ScoringEngine()
    prompt, answer = list(range(1, 20)), list(range(20, 30))
    scoring.model_config.max_model_len = 64
    run(Auditor(scoring, 1, tmp_path, 0), (prompt, SamplingParams(), completion(answer)))
    sizes = Sizes(prefix_caching=True)
    caches = make_scheduler(SelfSpecScheduler, SelfSpecConfig(mode="fixed"), sizes, is_async=False).kv_cache_manager

    def num_found(salt):
        """Tokens of the prompt that a rollout finds cached after a request of that salt has computed prompt and answer."""
        caches.reset_prefix_cache()
        params = SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False)
        scored = Request("scored", prompt + answer, params, None, block_hasher=block_hasher, cache_salt=salt)
        caches.allocate_slots(scored, scored.num_tokens)
        caches.free(scored)
        rollout = Request("rollout", prompt, SamplingParams(max_tokens=9), None, block_hasher=block_hasher)
        return caches.get_computed_blocks(rollout)[1]

    assert num_found(None) == 16, "without a salt: that request reads no cache, but fills it"
    assert num_found(scoring.salts[0]) == 0


@pytest.mark.parametrize("where", ["rollout", "rescoring"])
def test_a_missing_logprob_is_an_error_that_waits_for_the_end_of_the_sync(tmp_path, where):
    auditor = Auditor(ScoringEngine(missing=(4,) if where == "rescoring" else ()), 1, tmp_path, 0)
    answer = completion([5, 6, 7])
    if where == "rollout":
        answer.logprobs[1] = {}
    run(auditor, ([1, 2, 3], SamplingParams(), answer))
    with pytest.raises(AuditError, match=f"the {where} has no logprob of token 6 at position"):
        auditor.take_result()


def test_more_than_noise_stops_with_evidence(tmp_path):
    auditor = Auditor(ScoringEngine(), 1, tmp_path / "audit", engine=2)
    run(auditor, ([1, 2, 3], SamplingParams(), completion([5, 6, 7], logprob=-0.25)))
    with pytest.raises(AuditError, match="3 sampled tokens scored again without speculation differ by 1.000 in mean logprob"):
        auditor.take_result()
    assert (tmp_path / "audit" / "rollout0-engine2.json").exists()
