"""Stop strings under speculation: the same tokens as when vLLM looks at one token at a time."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import pytest
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast
from vllm import SamplingParams
from vllm.outputs import CompletionOutput
from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest, FinishReason
from vllm.v1.engine.output_processor import OutputProcessor

from openrlhf_sd.self_spec_actor import _self_spec_class
from openrlhf_sd.stop_strings import cut_at_stop_string

WORDS = ["<unk>", "<p>", "call", "</", "tool", ">", " then", " more", "<end>"]
CALL = [WORDS.index(word) for word in ("call", "</", "tool", ">", " then", " more", "<end>")]


@pytest.fixture(scope="module")
def tokenizer():
    words = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=words)


def answer(tokenizer, params: SamplingParams, tokens_per_step: int) -> CompletionOutput:
    """What vLLM's front end makes of CALL, sampled so many tokens a step."""
    processor = OutputProcessor(tokenizer, log_stats=False)
    request = EngineCoreRequest("r", [1], None, params, None, 0.0, None, None, None, external_req_id="r")
    processor.add_request(request, "<p>")
    for start in range(0, len(CALL), tokens_per_step):
        tokens = CALL[start : start + tokens_per_step]
        is_last = start + tokens_per_step >= len(CALL)
        step = EngineCoreOutput("r", tokens, finish_reason=FinishReason.STOP if is_last else None)
        for output in processor.process_outputs([step]).request_outputs:
            if output.finished:
                return output.outputs[0]
    raise AssertionError("the request did not end")


STOPS = [
    {"stop": ["</tool>"]},
    {"stop": ["</tool>"], "include_stop_str_in_output": True},
    {"stop": ["more", "</tool>"]},
    {"stop": [">"], "min_tokens": 4},
    {"stop": ["</tool>"], "min_tokens": 6},
    {},
]


@pytest.mark.parametrize("stop", STOPS, ids=str)
@pytest.mark.parametrize("tokens_per_step", range(1, 9))
def test_as_many_tokens_as_one_at_a_time(tokenizer, stop, tokens_per_step):
    params = SamplingParams(skip_special_tokens=False, **stop)
    plain, speculated = answer(tokenizer, params, 1), answer(tokenizer, params, tokens_per_step)
    cut_at_stop_string(speculated, [1], params, tokenizer)
    assert (list(speculated.token_ids), speculated.text, speculated.stop_reason) == (list(plain.token_ids), plain.text, plain.stop_reason)


def test_vllm_itself_keeps_the_tokens_behind_a_stop_string(tokenizer):
    """Else the repair would have nothing to do."""
    speculated = answer(tokenizer, SamplingParams(stop=["</tool>"], skip_special_tokens=False), 7)
    assert (speculated.text, list(speculated.token_ids)) == ("call", CALL)


def test_logprobs_are_cut_with_their_tokens(tokenizer):
    params = SamplingParams(stop=["</tool>"], skip_special_tokens=False, logprobs=1)
    logprobs = [{token: SimpleNamespace(logprob=-0.5)} for token in CALL]
    completion = CompletionOutput(0, "call", CALL, -3.5, logprobs, finish_reason="stop", stop_reason="</tool>")
    cut_at_stop_string(completion, [1], params, tokenizer)
    assert (completion.token_ids, completion.logprobs, completion.cumulative_logprob) == (CALL[:4], logprobs[:4], -2.0)


def test_a_stop_string_that_is_not_there_is_an_error(tokenizer):
    completion = CompletionOutput(0, "", CALL, None, None, finish_reason="stop", stop_reason="elsewhere")
    with pytest.raises(RuntimeError, match="elsewhere"):
        cut_at_stop_string(completion, [1], SamplingParams(stop=["elsewhere"]), tokenizer)


def test_the_rollout_actor_answers_with_the_cut_response(tokenizer):
    params = SamplingParams(stop=["</tool>"], skip_special_tokens=False)

    class Upstream:
        def __init__(self):
            self.llm = SimpleNamespace(get_tokenizer=lambda: tokenizer)

        async def generate(self, prompt_token_ids, sampling_params, multi_modal_data=None):
            return SimpleNamespace(outputs=[answer(tokenizer, sampling_params, 7)])

    counted = []
    record = SimpleNamespace(
        request_started=lambda now: None, request_ended=lambda now: None, request_answered=lambda *numbers: counted.append(numbers)
    )
    actor = object.__new__(_self_spec_class(Upstream))
    Upstream.__init__(actor)
    actor._auditor, actor._training_record, actor._record = None, None, record
    output = asyncio.run(actor.generate([1], params))
    assert list(output.outputs[0].token_ids) == CALL[:4]
    assert counted == [(1, 4)], "records count what OpenRLHF gets"
