"""Tells the engines when OpenRLHF evaluates, so that evaluation changes neither a controller nor a record.

OpenRLHF sends training and evaluation prompts to its rollout actors in the same way; the one place that knows is
`SamplesGenerator.generate_eval_samples`, in the trainer's process.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any


@contextmanager
def mark_evaluation(module: ModuleType) -> Iterator[None]:
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
