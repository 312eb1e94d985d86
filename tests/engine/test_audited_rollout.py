"""The audit on a real engine: bf16 noise where the engine is right, a stop with evidence where its KV cache is not."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from engines import SIZES, token_prompts
from vllm import AsyncEngineArgs, SamplingParams
from vllm.v1.engine.async_llm import AsyncLLM

from openrlhf_sd import SelfSpecConfig, engine_args
from openrlhf_sd.audit import Audit, AuditError
from openrlhf_sd.rescoring import Auditor

PROMPTS = token_prompts(25, 512)
PARAMS = SamplingParams(temperature=0.7, max_tokens=64, min_tokens=1, ignore_eos=True, detokenize=False, logprobs=1)


async def one_rollout(llm: AsyncLLM, folder: Path) -> Audit:
    auditor = Auditor(llm, every=1, folder=folder, engine=0)

    async def respond(number: int, prompt: dict[str, Any]) -> None:
        audited = auditor.choose(PARAMS)
        outputs = [output async for output in llm.generate(prompt, audited or PARAMS, request_id=str(number))]
        if audited:
            auditor.keep(prompt["prompt_token_ids"], audited, outputs[-1].outputs[0])

    await asyncio.gather(*(respond(number, prompt) for number, prompt in enumerate(PROMPTS)))
    await auditor.rescore()
    return auditor.take_result()


def audited(policy: Path, folder: Path, **overrides: Any) -> Audit:
    config = SelfSpecConfig(mode="fixed", gamma=3, quant="w4")
    arguments = {
        **{"enforce_eager": True, "skip_tokenizer_init": True, "logprobs_mode": "processed_logprobs", "max_logprobs": 1},
        **(SIZES | engine_args(config, policy) | overrides),
    }

    async def run() -> Audit:
        llm = AsyncLLM.from_engine_args(AsyncEngineArgs(str(policy), **arguments))
        try:
            return await one_rollout(llm, folder)
        finally:
            llm.shutdown()

    return asyncio.run(run())


def test_a_right_engine_is_within_bf16_noise(measured, untied_policy, tmp_path):
    result = audited(untied_policy, tmp_path / "audit")
    assert (result.num_responses, result.num_tokens) == (4, 4 * 63)  # the first token of each is under min_tokens
    assert 0 < result.max_abs_diff < 0.2
    assert list(tmp_path.iterdir()) == []
    measured(f"audit, temperature 0.7: mean |logprob difference| {result.mean_abs_diff:.5f}, at most {result.max_abs_diff:.4f}")


@pytest.mark.slow
def test_a_wrong_kv_cache_stops_the_run(measured, untied_policy, tmp_path):
    with pytest.raises(AuditError, match="252 sampled tokens scored again without speculation differ by") as stopped:
        audited(untied_policy, tmp_path / "audit", worker_cls="unrepaired.LosesVerifiedKV")
    evidence = json.loads((tmp_path / "audit" / "rollout0-engine0.json").read_text())
    assert [len(response["rescored_logprobs"]) for response in evidence["responses"]] == [63] * 4
    measured(f"audit of a wrong KV cache: {str(stopped.value).split(':', 2)[2].split(';')[0].strip()}")
