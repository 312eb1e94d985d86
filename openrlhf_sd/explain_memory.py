"""What an engine's memory goes to, counted from a config.json: weights, drafter, and the KV cache that is left.

    KV cache = fraction x memory - policy - drafter

vLLM takes its activations, CUDA graphs and workspaces off the KV cache too, a few GB that only a start-up can tell: not counted, so the
KV cache here is what there is at most. Norms and biases, under 0.1% of the weights, are not counted either. All per GPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from openrlhf_sd.config import DEFAULT_GROUP_SIZE, SelfSpecConfig, SelfSpecError
from openrlhf_sd.gpus import Gpu
from openrlhf_sd.policy.model_constants import ModelConstants
from openrlhf_sd.preflight import requests_at_once, requests_per_engine

FP32_BYTES = 4

VERIFY_TENSORS = 7
"""fp32 tensors of (requests x gamma, vocabulary) alive at the worst moment of a verify step with logprobs: counted in vLLM 0.29.0's
`rejection_sampler.py`, not measured. An engine on a GPU takes them off its KV cache (`engine/longest_drafts.py`)."""


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes are per GPU; on a CPU, per engine in the machine's memory."""

    memory_bytes: int
    fraction: float
    """--vllm.gpu_memory_utilization"""
    budget_bytes: int | None
    """What vLLM may use in all; None on a CPU, where an engine plans with a share of what is free when it starts."""
    policy_bytes: int
    drafter_bytes: int
    """0 without --self-spec."""
    kv_bytes_per_token: int
    kv_bytes: int
    kv_tokens: int
    kv_tokens_without_drafter: int

    longest_request_tokens: int
    """--data.max_len"""
    requests_per_engine: int
    """Of one rollout, for the busiest engine."""
    requests_at_once: int
    """Of those, how many vLLM runs at the same time at most."""
    longest_requests_held: int
    """Requests of full length whose keys and values fit at once."""

    draft_probabilities_bytes: int
    """fp32 probabilities of the longest drafts of all requests at once, one tensor."""


def plan_memory(
    constants: ModelConstants, config: SelfSpecConfig | None, flags: dict[str, Any], gpu: Gpu | None, free_bytes: int | None = None
) -> MemoryPlan:
    """Args:
    config: with its scheme resolved; None for a vanilla run.
    flags: OpenRLHF's, flat, with at least one engine.
    gpu: None for a CPU.
    free_bytes: of the machine's memory, for a CPU.
    """
    fraction, longest = flags["vllm.gpu_memory_utilization"], flags["data.max_len"]
    drafter_bytes = 0 if config is None else int(constants.drafter_bytes(config.quant, config.group_size or DEFAULT_GROUP_SIZE))
    kv_token_bytes = constants.kv_bytes_per_token
    if gpu is None:
        from openrlhf_sd.cpu.engine_kwargs import cpu_engine_kwargs

        engine_kwargs = {"gpu_memory_utilization": fraction, "max_model_len": longest}
        budget_bytes = None
        kv_bytes = without_drafter = cpu_engine_kwargs(engine_kwargs, free_bytes, kv_token_bytes)["kv_cache_memory_bytes"]
    else:
        budget_bytes = int(fraction * gpu.memory_bytes)
        without_drafter = budget_bytes - constants.policy_bytes
        kv_bytes = without_drafter - drafter_bytes
    at_once = requests_at_once(flags)
    gamma = 0 if config is None else config.num_speculative_tokens
    kv_tokens = max(0, kv_bytes // kv_token_bytes)
    return MemoryPlan(
        memory_bytes=free_bytes if gpu is None else gpu.memory_bytes,
        fraction=fraction,
        budget_bytes=budget_bytes,
        policy_bytes=constants.policy_bytes,
        drafter_bytes=drafter_bytes,
        kv_bytes_per_token=kv_token_bytes,
        kv_bytes=max(0, kv_bytes),
        kv_tokens=kv_tokens,
        kv_tokens_without_drafter=max(0, without_drafter // kv_token_bytes),
        longest_request_tokens=longest,
        requests_per_engine=requests_per_engine(flags),
        requests_at_once=at_once,
        longest_requests_held=kv_tokens // longest,
        draft_probabilities_bytes=at_once * gamma * constants.vocab_size * FP32_BYTES,
    )


def check_memory(plan: MemoryPlan) -> None:
    """Raises SelfSpecError where not one request of full length fits: vLLM would refuse to start."""
    if plan.longest_requests_held == 0:
        raise SelfSpecError(
            f"--vllm.gpu_memory_utilization: {plan.fraction:g} leaves {plan.kv_tokens} tokens of KV cache beside "
            f"{(plan.policy_bytes + plan.drafter_bytes) / 1e9:.1f} GB of weights, and one request may take --data.max_len "
            f"{plan.longest_request_tokens}; give more, more GPUs (--vllm.tensor_parallel_size), or a smaller --data.max_len"
        )
