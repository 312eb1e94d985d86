"""Responses that a stop string ends, token for token as without speculation.

vLLM looks for stop strings in the text of a step's new tokens. It cuts the text behind a match, but not `token_ids` and `logprobs`: a step
of several tokens leaves those after the match in place, and OpenRLHF trains on token ids. (`stop_token_ids` are cut by the scheduler.)
"""

from __future__ import annotations

from typing import Any


def ending_at_stop_strings(base: type) -> type:
    """`base`, OpenRLHF's rollout actor, with a `generate` whose responses have no tokens behind their stop string."""

    class StoppingRolloutActor(base):
        async def generate(self, prompt_token_ids, sampling_params, multi_modal_data=None):
            output = await super().generate(prompt_token_ids, sampling_params, multi_modal_data)
            for completion in output.outputs:
                cut_at_stop_string(completion, prompt_token_ids, sampling_params, self.llm.get_tokenizer())
            return output

    return StoppingRolloutActor


def cut_at_stop_string(completion: Any, prompt_token_ids: list[int], params: Any, tokenizer: Any) -> None:
    """Drop what was sampled in the same step behind the token that completes the stop string. Changes `completion` in place, if at all.

    The tokens go once more, one by one, through vLLM's own detokenizer.

    Args:
        completion: vLLM's CompletionOutput, finished.

    Raises:
        RuntimeError: the stop string that vLLM names does not come back.
    """
    if not isinstance(completion.stop_reason, str):
        return
    num_kept = _num_tokens_to_stop(completion.token_ids, prompt_token_ids, params, tokenizer)
    if num_kept is None:
        raise RuntimeError(f"self-speculation: cannot tell which token completes the stop string {completion.stop_reason!r}")
    completion.token_ids = completion.token_ids[:num_kept]
    if completion.logprobs is not None:
        completion.logprobs = completion.logprobs[:num_kept]
        kept = zip(completion.token_ids, completion.logprobs, strict=True)
        completion.cumulative_logprob = sum(logprobs[token_id].logprob for token_id, logprobs in kept)


def _num_tokens_to_stop(token_ids: list[int], prompt_token_ids: list[int], params: Any, tokenizer: Any) -> int | None:
    from vllm.v1.engine import EngineCoreRequest
    from vllm.v1.engine.detokenizer import IncrementalDetokenizer

    request = EngineCoreRequest(
        request_id="",
        prompt_token_ids=prompt_token_ids,
        mm_features=None,
        sampling_params=params,
        pooling_params=None,
        arrival_time=0.0,
        lora_request=None,
        cache_salt=None,
        data_parallel_rank=None,
    )
    detokenizer = IncrementalDetokenizer.from_new_request(tokenizer, request)
    for num_tokens, token_id in enumerate(token_ids, start=1):
        if detokenizer.update([token_id], False) is not None:
            return num_tokens
    return None
