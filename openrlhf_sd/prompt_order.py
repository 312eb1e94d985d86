"""The same prompts in the same order in every arm of one `--train.seed`.

OpenRLHF 0.11.2 shuffles prompts with torch's default generator in the trainer's own process, which nothing seeds: two runs of one seed
train on different prompts at every step, and a comparison of their steps compares their prompts too.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any


@contextmanager
def seed_prompt_order(trainer_module: ModuleType) -> Iterator[None]:
    """Around the import of `openrlhf.trainer.ppo_trainer`: `prepare_datasets`, which both the synchronous and the asynchronous trainer call
    when they start, seeds its process first."""
    yield
    prepare = trainer_module.prepare_datasets

    @functools.wraps(prepare)
    def prepare_datasets(strategy: Any, tokenizer: Any) -> Any:
        import torch

        torch.manual_seed(strategy.args.train.seed)
        return prepare(strategy, tokenizer)

    trainer_module.prepare_datasets = prepare_datasets
