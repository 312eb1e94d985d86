"""What flags of a run mean for speculation and for the prediction, one sentence each. Nothing here is wrong; what is, preflight says."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from openrlhf_sd.config import SelfSpecConfig
from openrlhf_sd.explain_memory import VERIFY_TENSORS, MemoryPlan
from openrlhf_sd.explain_region import Region
from openrlhf_sd.gpus import Gpu
from openrlhf_sd.provenance import lacks_bf16


def notes(
    config: SelfSpecConfig | None, flags: dict[str, Any], gpu: Gpu | None, plan: MemoryPlan | None, region: Region | None
) -> Iterator[str]:
    """Args:
    config: None for a vanilla run.
    gpu: None for a CPU.
    plan, region: None where there is none.
    """
    if plan is not None:
        yield from _memory(config, flags, gpu, plan)
    if config is None:
        return
    if plan is not None and gpu is not None:
        yield (
            f"sampling: a verify step of {plan.requests_at_once} requests x gamma {config.num_speculative_tokens} holds about "
            f"{VERIFY_TENSORS} fp32 tensors of {plan.draft_probabilities_bytes / 1e9:.2f} GB (by count; not yet measured on a GPU). The "
            "engine's start-up profile includes such a step, so they come off the KV cache; --self-spec.gamma or --self-spec.gamma_max "
            "sets their size"
        )
    if config.mode in ("toggle", "adaptive"):
        yield from _toggle(config, flags, region)
    yield from _prediction(config, flags, gpu, region)


def _memory(config: SelfSpecConfig | None, flags: dict[str, Any], gpu: Gpu | None, plan: MemoryPlan) -> Iterator[str]:
    if plan.requests_at_once < plan.requests_per_engine:
        yield (
            f"batch: vLLM runs at most {plan.requests_at_once} requests at once (its default, which OpenRLHF leaves alone); the other "
            f"{plan.requests_per_engine - plan.requests_at_once} of an engine wait"
        )
    if plan.longest_requests_held < plan.requests_at_once:
        yield (
            f"KV cache: {plan.longest_requests_held} requests of --data.max_len {plan.longest_request_tokens} fit at once, "
            f"{plan.requests_at_once} run; that is enough for a mean of {plan.kv_tokens // plan.requests_at_once} tokens each, beyond "
            "which vLLM puts requests back and computes them again"
        )
    if gpu is not None:
        yield from _shared_gpus(flags, plan)
    elif lacks_bf16():
        yield (
            "weights: without AVX-512 an engine multiplies in float32 and keeps a copy of every bf16 weight for it: up to "
            f"{2 * plan.policy_bytes / 1e9:.2f} GB beside what is counted above{_drafter_copy(config, plan)}"
        )


def _drafter_copy(config: SelfSpecConfig | None, plan: MemoryPlan) -> str:
    """Of `engine/cpu_int8.py` and, unquantized, of `cpu/float32_linears.py`."""
    copies = {"w8a8": 1, "none": 2}.get(config.quant, 0) if config else 0
    return f", and {copies * plan.drafter_bytes / 1e9:.2f} GB for the drafter's own copy" if copies else ""


def _shared_gpus(flags: dict[str, Any], plan: MemoryPlan) -> Iterator[str]:
    shares_gpus = flags["train.colocate_all"] and not flags["train.async_enable"]
    if shares_gpus and flags["vllm.enable_sleep"]:
        drafter = ", the drafter with them," if plan.drafter_bytes else ""
        weights_gb = (plan.policy_bytes + plan.drafter_bytes) / 1e9
        yield (
            f"sleep: engines share their GPUs with the trainer. Between rollouts an engine sleeps (level 1): its weights{drafter} move to "
            f"pinned memory of the host ({weights_gb:.1f} GB per GPU) and the KV cache is dropped. The weights return for the broadcast, "
            "the KV cache for the rollout. What vLLM keeps outside its pool (CUDA context, graphs, communication) stays; how much is not "
            "known here"
        )
    elif shares_gpus:
        yield (
            f"sleep: engines share their GPUs with the trainer and keep their {plan.budget_bytes / 1e9:.1f} GB while it trains, which "
            f"leaves it {(plan.memory_bytes - plan.budget_bytes) / 1e9:.1f} GB; --vllm.enable_sleep gives it the rest in between"
        )
    elif flags["vllm.enable_sleep"]:
        yield "sleep: --vllm.enable_sleep does nothing without --train.colocate_all; OpenRLHF turns it off"
    if flags["train.colocate_all"] and flags["train.async_enable"]:
        yield "--train.colocate_all with --train.async_enable shares GPUs among the trainer's models only; engines have their own"


def _toggle(config: SelfSpecConfig, flags: dict[str, Any], region: Region | None) -> Iterator[str]:
    yield (
        f"--self-spec.ramp_up: {config.mode} decides nothing until more than {config.ramp_up} requests have decoded at once; rollouts in "
        "which an engine never has so many, small evaluations for instance, stay plain"
    )
    earliest = max(region.switch_on, key=lambda entry: entry.batch) if region else None
    if earliest and earliest.batch > config.ramp_up:
        largest = max(cell.batch for cell in region.cells)
        mend = f"; --self-spec.ramp_up {earliest.batch} waits for the tail" if earliest.batch < largest else ""
        assumed = "in the first rollout" if earliest.acceptance is None else f"at acceptance {earliest.acceptance:.2f}"
        yield (
            f"--self-spec.ramp_up: {assumed} {config.mode} would switch on from {earliest.batch} requests of {earliest.context} tokens "
            f"down, above the guard of {config.ramp_up}: while the first prompts are prefilled it may do so at {config.ramp_up + 1} and "
            f"stay on for the whole rollout{mend}"
        )
    for flag in ("train.async_enable", "algo.dynamic_filtering_enable", "train.agent_func_path"):
        if flags[flag]:
            yield f"--{flag}: batches may grow again within a rollout, and {config.mode}, once on, stays on; auto goes both ways"


def _prediction(config: SelfSpecConfig, flags: dict[str, Any], gpu: Gpu | None, region: Region | None) -> Iterator[str]:
    if config.mode == "fixed" and region and any(cell.speedup < 1 and cell.fits for cell in region.cells):
        worst = min((cell for cell in region.cells if cell.fits), key=lambda cell: cell.speedup)
        yield (
            f"fixed speculates at every batch: at {worst.batch} requests of {worst.context} tokens it is predicted to run at "
            f"{worst.speedup:.2f} of plain decoding, where auto and toggle would not draft"
        )
    if flags["train.async_enable"]:
        yield "--train.async_enable: a rollout, for acceptance and records, is what is generated between two weight broadcasts"
    if region is None:
        return
    yield (
        "chunked prefill: steps that also compute prompts are not in the prediction, which is of decode steps; auto counts requests about "
        "to join as part of the batch"
    )
    if flags["vllm.enable_prefix_caching"]:
        yield (
            "--vllm.enable_prefix_caching: samples of one prompt share its KV blocks, so more requests fit than counted; the prediction "
            "has every request read keys and values of its own"
        )
    if flags["vllm.enforce_eager"] and gpu is not None:
        yield "--vllm.enforce_eager: the step times are of CUDA graphs; without them launches cost more, in draft steps most of all"
