"""What torch, transformers and vLLM import is millions of objects that live as long as the process. Python's garbage collector looks
for cycles among them again and again: a tenth or more of the time that importing takes, and two to four seconds of every process's end
(2 cores of an AMD EPYC, Zen 3), while a run waits for it.
"""

from __future__ import annotations

import atexit
import gc
from collections.abc import Iterator
from contextlib import contextmanager

from openrlhf_sd.import_patches import patch_on_import

HEAVY = (
    "vllm",
    "vllm.config",
    "vllm.v1.engine.async_llm",
    "openrlhf.datasets",
    "openrlhf.models",
    "openrlhf.trainer.ray",
    "openrlhf.utils",
)
"""With what they import, most of what a process of a run imports. Modules without another patch: there is one per module."""


def spare_imports() -> None:
    """No search while this process imports `HEAVY`, and at its end nothing left to look at. Idempotent."""
    patch_on_import(dict.fromkeys(HEAVY, lambda module: search_postponed()))
    end_without_search()


def end_without_search() -> None:
    """For a process that has imported already. Idempotent."""
    atexit.unregister(gc.freeze)
    atexit.register(gc.freeze)


@contextmanager
def search_postponed() -> Iterator[None]:
    """No collection inside, or only until someone calls `gc.enable()`."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
