"""`engine_args`: the keyword arguments that turn a plain `vllm.LLM` or `AsyncLLM` into a self-speculating engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vllm.platforms import current_platform

from openrlhf_sd.calibration_choice import choose_calibration
from openrlhf_sd.config import SelfSpecConfig, SelfSpecError
from openrlhf_sd.cpu.engine_kwargs import IN_PROCESS_EXECUTOR
from openrlhf_sd.drafter_scheme import check_capability, linear_input_widths, resolve_scheme
from openrlhf_sd.model_support import check_model, check_weights
from openrlhf_sd.policy.cost_model import CostModel


def resolve(config: SelfSpecConfig, model: str, tensor_parallel_size: int = 1, flag: str = "model") -> SelfSpecConfig:
    """Fill in what depends on the model: scheme and group size.

    Args:
        flag: that gave the model, for messages.

    Raises:
        SelfSpecError: the model cannot be read, the group size does not fit it, or the GPU has no kernel for the scheme.
    """
    from transformers import AutoConfig

    try:
        # Models that can draft for themselves need no code of their own, and a user of plain vLLM has not agreed to run any.
        hf_config = AutoConfig.from_pretrained(model, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise SelfSpecError(f"{flag}: {model!r} holds no readable config.json ({str(error).splitlines()[0]})") from error
    check_model(hf_config.to_dict(), flag)
    check_weights(model, flag)
    resolved = resolve_scheme(config, linear_input_widths(hf_config, tensor_parallel_size), on_gpu=not current_platform.is_cpu())
    check_capability(resolved.quant, current_platform.get_device_capability())
    return resolved


def engine_args(config: SelfSpecConfig, model: str | Path, tensor_parallel_size: int = 1, costs: CostModel | None = None) -> dict[str, Any]:
    """Keyword arguments for `vllm.LLM(model, **args)`, `vllm.AsyncEngineArgs(model, **args)` and OpenRLHF's rollout actor. The drafter
    needs each of them; vLLM's others may stand beside them.

    Args:
        costs: step times already chosen; without them `config.calibration` says where they come from, and `auto` may measure them
            here first (`choose_calibration`).

    The engine carries OpenRLHF's weight-sync RPCs: `collective_rpc("init_process_group", ...)` and
    `collective_rpc("update_weight", (name, dtype, shape, empty_cache))`; the drafter is re-quantized when `empty_cache` is True.
    """
    resolved = resolve(config, str(model), tensor_parallel_size)
    if costs is None:
        calibration = choose_calibration(resolved, str(model), tensor_parallel_size)
        costs = calibration and calibration.cost_model
    num_speculative_tokens = resolved.num_speculative_tokens
    executor = {"distributed_executor_backend": IN_PROCESS_EXECUTOR}
    return {
        **(executor if current_platform.is_cpu() and tensor_parallel_size == 1 else {}),
        "load_format": "safetensors",
        "worker_cls": "openrlhf_sd.engine.worker.SelfSpecWorker",
        "worker_extension_cls": "openrlhf_sd.engine.weight_sync.SelfSpecWorkerWrap",
        "scheduler_cls": "openrlhf_sd.engine.scheduler.SelfSpecScheduler",
        "speculative_config": {
            "method": "draft_model",
            "model": str(model),
            "num_speculative_tokens": num_speculative_tokens,
            # Greedy, upstream's default, accepts a few percent at temperature 1.
            "draft_sample_method": "probabilistic",
            # Turns on vLLM's per-step draft length; our scheduler replaces the table before every step.
            "num_speculative_tokens_per_batch_size": [(1, 1, num_speculative_tokens)],
        },
        "additional_config": {"self_spec": resolved.to_dict(), "self_spec_costs": costs and costs.to_dict()},
    }
