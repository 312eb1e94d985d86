"""Starting and stopping real vLLM engines in tests: one start costs about 15 s, so tests share them where they can."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vllm import LLM, SamplingParams
from vllm.platforms import current_platform

from openrlhf_sd import SelfSpecConfig, engine_args
from openrlhf_sd.cpu.engine_kwargs import PLAIN_WORKER

SIZES = {"max_model_len": 512, "kv_cache_memory_bytes": 128 << 20, "max_num_seqs": 64, "dtype": "bfloat16"}
"""Fixed, so that a plain and a self-speculating engine must end up with the same KV cache."""


@contextmanager
def plain_engine(model: Path, **overrides: Any) -> Iterator[LLM]:
    """Plain vLLM. On a CPU without AVX-512 with its matrix products in float32, as in every training."""
    worker = {"worker_cls": PLAIN_WORKER} if current_platform.is_cpu() else {}
    with _running(model, worker | overrides) as llm:
        yield llm


@contextmanager
def self_spec_engine(model: Path, config: SelfSpecConfig, **overrides: Any) -> Iterator[LLM]:
    args = engine_args(config, model, overrides.get("tensor_parallel_size", 1))
    with _running(model, args | overrides) as llm:
        yield llm


@contextmanager
def _running(model: Path, overrides: dict[str, Any]) -> Iterator[LLM]:
    arguments = {"enforce_eager": True, "skip_tokenizer_init": True, "disable_log_stats": False, **SIZES, **overrides}
    llm = LLM(str(model), **arguments)
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()


def token_prompts(count: int, vocab_size: int) -> list[dict[str, list[int]]]:
    """Prompts of 4 to 20 tokens, all different, clear of the first ids (specials)."""
    return [
        {"prompt_token_ids": [4 + (31 * row + 7 * column) % (vocab_size - 4) for column in range(4 + row % 17)]} for row in range(count)
    ]


def greedy(max_tokens: int, **more: Any) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True, detokenize=False, **more)


def sampled(max_tokens: int, temperature: float = 1.0, top_p: float = 1.0, **more: Any) -> SamplingParams:
    return SamplingParams(temperature=temperature, top_p=top_p, max_tokens=max_tokens, ignore_eos=True, detokenize=False, **more)


def generate(llm: LLM, prompts: list[dict[str, list[int]]], params: SamplingParams | list[SamplingParams]) -> list[list[int]]:
    return [list(output.outputs[0].token_ids) for output in llm.generate(prompts, params, use_tqdm=False)]


def spec_decode_counts(llm: LLM) -> dict[str, int]:
    """num_drafts, num_draft_tokens, num_accepted_tokens since the engine started."""
    prefix = "vllm:spec_decode_"
    return {m.name.removeprefix(prefix): m.value for m in llm.get_metrics() if m.name.startswith(prefix) and hasattr(m, "value")}


class DraftsSince:
    """What was drafted since this was made."""

    def __init__(self, llm: LLM) -> None:
        self._llm = llm
        self._before = spec_decode_counts(llm)

    def counts(self) -> dict[str, int]:
        return {name: count - self._before.get(name, 0) for name, count in spec_decode_counts(self._llm).items()}

    def acceptance_rate(self) -> float:
        counts = self.counts()
        return counts["num_accepted_tokens"] / counts["num_draft_tokens"]


def call(llm: LLM, function: Any, *args: Any) -> Any:
    """Run a module-level function in the worker, with the worker as its first argument."""
    return llm.collective_rpc(function, args=args)[0]
