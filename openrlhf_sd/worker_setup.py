"""What every Ray worker process of a recorded run is set up with: patches that wait for OpenRLHF's modules to be imported there."""

from __future__ import annotations

from typing import Any

from openrlhf_sd import garbage
from openrlhf_sd.eval_mark import mark_evaluation
from openrlhf_sd.import_patches import patch_on_import
from openrlhf_sd.prompt_order import seed_prompt_order


def install() -> None:
    garbage.spare_imports()
    patch_on_import(
        {
            "openrlhf.trainer.ppo_utils.samples_generator": mark_evaluation,
            "openrlhf.trainer.ppo_trainer": seed_prompt_order,
        }
    )


def install_on_cpu() -> None:
    """With the CPU platform: Ray takes one set-up function."""
    from openrlhf_sd.cpu import platform

    platform.install()
    install()


def with_setup_hook(ray_init: Any) -> Any:
    """A `ray.init` that makes `install` the set-up of every worker process.

    Raises:
        RuntimeError: the job has a `worker_process_setup_hook` of its own.
    """

    def init(*args: Any, runtime_env: dict[str, Any] | None = None, **kwargs: Any) -> Any:
        runtime_env = dict(runtime_env or {})
        if "worker_process_setup_hook" in runtime_env:
            raise RuntimeError("worker_process_setup_hook: self-speculation needs this place in Ray's runtime_env")
        runtime_env["worker_process_setup_hook"] = f"{__name__}.install"
        return ray_init(*args, runtime_env=runtime_env, **kwargs)

    return init
