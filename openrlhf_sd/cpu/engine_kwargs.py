"""What vLLM's engine arguments, written for a GPU by OpenRLHF, must become on the CPU. Plain data in, plain data
out."""

from __future__ import annotations

from typing import Any

from openrlhf_sd.preflight import VLLM_MAX_NUM_SEQS

UPSTREAM_WORKER_EXTENSION = "openrlhf.trainer.ray.vllm_worker_wrap.WorkerWrap"
CPU_WORKER_EXTENSION = "openrlhf_sd.cpu.weight_sync.CpuWorkerWrap"

IN_PROCESS_EXECUTOR = "openrlhf_sd.cpu.in_process_executor.InProcessExecutor"
PLAIN_WORKER = "openrlhf_sd.cpu.worker.PlainCpuWorker"

KV_CACHE_FRACTION = 0.25
"""Of the memory free at the start, times `gpu_memory_utilization`. On a GPU an engine owns its card; here it shares the
RAM with the trainer, its optimizer states, other engines and Ray's object store, so it may plan with a quarter."""

BLOCK_SIZE = 128
"""Tokens per KV cache block of vLLM-CPU."""


def cpu_engine_kwargs(kwargs: dict[str, Any], available_bytes: int, kv_bytes_per_token: int) -> dict[str, Any]:
    """Engine arguments as `create_vllm_engines` writes them -> the same engine on the CPU. Idempotent; `kwargs` is left
    alone.

    Args:
        kwargs: keyword arguments of OpenRLHF's RolloutRayActor. A worker, a worker extension and an executor other than upstream's own are
            kept.
        available_bytes: memory free on this machine now.
        kv_bytes_per_token: keys and values of all layers; see `kv_bytes_per_token`.
    """
    adapted = dict(kwargs)
    if adapted.get("worker_extension_cls") == UPSTREAM_WORKER_EXTENSION:
        adapted["worker_extension_cls"] = CPU_WORKER_EXTENSION
    adapted.setdefault("worker_cls", PLAIN_WORKER)
    if adapted.get("distributed_executor_backend") == "uni":
        adapted["distributed_executor_backend"] = IN_PROCESS_EXECUTOR  # for which vLLM would take "mp"
    # vLLM refuses the option on the CPU; its calls to sleep and wake up it takes, and keeps weights and cache where they are.
    adapted["enable_sleep_mode"] = False
    if adapted.get("kv_cache_memory_bytes") is None:
        budget = int(available_bytes * KV_CACHE_FRACTION * adapted["gpu_memory_utilization"])
        # More cache than all requests can fill would be zeroed for nothing: 4 GiB take 17 s at the start of an engine on two cores.
        # One block more per request: a request ends within a block.
        useful = VLLM_MAX_NUM_SEQS * (adapted["max_model_len"] + BLOCK_SIZE) * kv_bytes_per_token
        adapted["kv_cache_memory_bytes"] = min(budget, useful)
    return adapted


def kv_bytes_per_token(hf_config: Any) -> int:
    """Bytes of bf16 keys and values one token takes over all layers of a dense or grouped-query model.

    `hf_config` is anything with the attributes of a Hugging Face text config.
    """
    head_dim = getattr(hf_config, "head_dim", None) or hf_config.hidden_size // hf_config.num_attention_heads
    return 2 * 2 * hf_config.num_hidden_layers * hf_config.num_key_value_heads * head_dim
