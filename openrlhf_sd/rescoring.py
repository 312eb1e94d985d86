"""The rollout actor's end of `--self-spec.audit`: keeps a few responses of a rollout and has the engine score them again."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

from openrlhf_sd import audit
from openrlhf_sd.audit import Audit, AuditError, ScoredResponse


class Auditor:
    """Args:
    llm: vLLM's AsyncLLM, self-speculating.
    folder: for evidence.
    rollout: number of the first one.
    """

    def __init__(self, llm: Any, every: int, folder: Path, engine: int, rollout: int = 0) -> None:
        self._llm = llm
        self._every = every
        self._folder = folder
        self._engine = engine
        self._is_processed = llm.model_config.logprobs_mode == "processed_logprobs"
        self._num_requests = 0
        self._rollout = rollout
        self._kept: list[tuple[list[int], Any, Any]] = []
        self._result: Audit | None = None
        self._failure: AuditError | None = None

    def choose(self, sampling_params: Any) -> Any | None:
        """A request starts. Returns its parameters with logprobs asked for where its response shall be kept, else None."""
        number = self._num_requests
        self._num_requests += 1
        is_chosen = number % audit.STRIDE == 0 and number < audit.STRIDE * audit.NUM_RESPONSES
        if not (is_chosen and audit.is_due(self._rollout, self._every) and self._is_comparable(sampling_params)):
            return None
        asked = deepcopy(sampling_params)
        if asked.logprobs is None:
            asked.logprobs = 0
        return asked

    def _is_comparable(self, params: Any) -> bool:
        """Processed logprobs of a distribution that was cut or bent have no counterpart in a prefill, nor have any under a grammar (an
        agent may ask for such; the flags may not)."""
        is_cut = params.top_p < 1 or params.top_k > 0 or params.min_p > 0 or params.allowed_token_ids or params.bad_words
        is_bent = params.presence_penalty or params.frequency_penalty or params.repetition_penalty != 1 or params.logit_bias
        return params.structured_outputs is None and not (self._is_processed and (is_cut or is_bent))

    def keep(self, prompt_token_ids: list[int], params: Any, completion: Any) -> None:
        self._kept.append((list(prompt_token_ids), params, completion))

    @property
    def has_responses(self) -> bool:
        return bool(self._kept)

    async def rescore(self) -> None:
        """The rollout has ended and its weights are still there. Failures wait for `take_result`: an exception here would leave the trainer
        alone in a broadcast."""
        kept, self._kept = self._kept, []
        try:
            responses = [await self._score(*entry) for entry in kept]
            self._result = audit.audit(responses)
            if not self._result.is_noise:
                self._failure = audit.save_evidence(self._folder, self._rollout, self._engine, self._result, responses)
        except AuditError as failure:
            self._failure = failure

    def take_result(self) -> Audit | None:
        """The end of the weight sync after the rollout. Raises AuditError where its audit failed."""
        if self._failure is not None:
            raise self._failure
        result, self._result = self._result, None
        self._num_requests = 0
        self._rollout += 1
        return result

    async def _score(self, prompt_token_ids: list[int], params: Any, completion: Any) -> ScoredResponse:
        from vllm import SamplingParams
        from vllm.inputs import TokensPrompt
        from vllm.utils import random_uuid

        # An engine generates at least one token, so the last one of a full context is left out.
        longest = self._llm.model_config.max_model_len - 1
        token_ids = list(completion.token_ids)[: longest - len(prompt_token_ids)]
        # Where a minimum length forbids the end token, the processed logprobs are of a cut distribution.
        num_skipped = min(params.min_tokens, len(token_ids))
        temperature = params.temperature if self._is_processed and params.temperature > 0 else 1.0
        await self._llm.collective_rpc("self_spec_score_at", args=(temperature,))
        try:
            scoring = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0, detokenize=False)
            # Prefix caching: of a salt of its own nobody reads what this prefill leaves there. It is the old policy's, and OpenRLHF's
            # order to forget that came before the first weight, after which this runs.
            prompt = TokensPrompt(prompt_token_ids=prompt_token_ids + token_ids, cache_salt=random_uuid())
            scored = [output async for output in self._llm.generate(prompt, scoring, request_id=random_uuid())][-1]
        finally:
            await self._llm.collective_rpc("self_spec_score_at", args=(1.0,))
        first = len(prompt_token_ids)
        positions = range(num_skipped, len(token_ids))
        return ScoredResponse(
            prompt_token_ids=prompt_token_ids,
            token_ids=token_ids,
            temperature=temperature,
            num_skipped=num_skipped,
            rollout_logprobs=[_logprob(completion.logprobs, i, token_ids[i], "rollout") for i in positions],
            rescored_logprobs=[_logprob(scored.prompt_logprobs, first + i, token_ids[i], "rescoring") for i in positions],
        )


def _logprob(logprobs: Any, position: int, token_id: int, source: str) -> float:
    try:
        return logprobs[position][token_id].logprob
    except (IndexError, KeyError, TypeError):
        raise AuditError(f"--self-spec.audit: the {source} has no logprob of token {token_id} at position {position}") from None
