"""On PYTHONPATH: every process writes down what it asks vLLM engines to do, a line per call, in $CALLS_OF_ENGINES."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

from openrlhf_sd.import_patches import patch_on_import


@contextmanager
def _written_down(module: ModuleType) -> Iterator[None]:
    yield
    for method, arguments in ARGUMENTS.items():
        setattr(module.AsyncLLM, method, _writing(getattr(module.AsyncLLM, method), method, arguments))


def _writing(method, name: str, arguments):
    @functools.wraps(method)
    def call(self, *args, **kwargs):
        words = arguments(*args, **kwargs)
        if words is not None:
            with open(os.environ["CALLS_OF_ENGINES"], "a") as file:  # a line at a time, whoever else writes
                file.write(" ".join([f"{os.getpid()}", *(words or [name])]) + "\n")
        return method(self, *args, **kwargs)

    return call


def _rpc(method: str, timeout=None, args=(), kwargs=None) -> list[str] | None:
    """OpenRLHF's update_weight(name, dtype, shape, empty_cache)."""
    if method != "update_weight":
        return None
    return ["update_weight", *(["last"] if args[3] else [])]


ARGUMENTS = {
    "generate": lambda *args, **kwargs: [],
    "sleep": lambda *args, **kwargs: [],
    "wake_up": lambda tags=None: ["wake_up", *(tags or ["weights", "kv_cache"])],
    "collective_rpc": _rpc,
}

patch_on_import({"vllm.v1.engine.async_llm": _written_down})
