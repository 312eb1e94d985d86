"""Tells the engines when OpenRLHF evaluates, so that evaluation changes neither a controller nor a record.

OpenRLHF sends training and evaluation prompts to its rollout actors in the same way; the one place that knows is
`SamplesGenerator.generate_eval_samples`, in the trainer's process. `install` is given to Ray as the set-up of every worker process and
waits there for that module to be imported.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from openrlhf_sd.import_patches import patch_on_import


def install() -> None:
    patch_on_import({"openrlhf.trainer.ppo_utils.samples_generator": _mark_evaluation})


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


@contextmanager
def _mark_evaluation(module: ModuleType) -> Iterator[None]:
    yield
    generate = module.SamplesGenerator.generate_eval_samples

    @functools.wraps(generate)
    def generate_eval_samples(self: Any, **generate_kwargs: Any) -> Any:
        import ray

        ray.get([engine.begin_eval.remote() for engine in self.vllm_engines])
        try:
            return generate(self, **generate_kwargs)
        finally:
            ray.get([engine.end_eval.remote() for engine in self.vllm_engines])

    module.SamplesGenerator.generate_eval_samples = generate_eval_samples
