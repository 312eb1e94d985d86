"""OpenRLHF's rollout actor with an engine sized for the CPU, and nothing else changed."""

from __future__ import annotations

import os
from typing import Any


def cpu_rollout_actor(upstream_actor: Any) -> Any:
    """The Ray actor class that takes the place of `upstream_actor`, OpenRLHF's `RolloutRayActor`."""
    import ray

    class CpuRolloutActor(upstream_actor.__ray_metadata__.modified_class):
        async def __init__(self, *args: Any, **kwargs: Any) -> None:
            # Set for the trainer's sake; vLLM leaves a core to others and keeps its defaults.
            os.environ.pop("OMP_WAIT_POLICY", None)
            await super().__init__(*args, **adapt_here(kwargs))

    return ray.remote(CpuRolloutActor)


def adapt_here(kwargs: dict[str, Any]) -> dict[str, Any]:
    """`cpu_engine_kwargs` with this machine's free memory and the model's own sizes."""
    import psutil
    from transformers import AutoConfig

    from openrlhf_sd.cpu.engine_kwargs import cpu_engine_kwargs, kv_bytes_per_token

    hf_config = AutoConfig.from_pretrained(kwargs["model"], trust_remote_code=kwargs["trust_remote_code"])
    available_bytes = psutil.virtual_memory().available
    return cpu_engine_kwargs(kwargs, available_bytes, kv_bytes_per_token(hf_config.get_text_config()))
