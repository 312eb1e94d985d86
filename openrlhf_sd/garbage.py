"""What torch, transformers and vLLM import is millions of objects that live as long as the process. Python's garbage collector looks
for cycles among them again and again: a sixth of the time that importing takes, and four seconds of every process's end (2 cores of an
AMD EPYC, Zen 3), while a run waits for it.
"""

from __future__ import annotations

import atexit
import gc
from collections.abc import Iterator
from contextlib import contextmanager


def end_without_search() -> None:
    """The collections of this interpreter's end will find nothing to look at. Idempotent."""
    atexit.unregister(gc.freeze)
    atexit.register(gc.freeze)


@contextmanager
def search_postponed() -> Iterator[None]:
    """No collection inside, or only until someone calls `gc.enable()`."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
