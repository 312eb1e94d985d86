"""What `torch.cuda.empty_cache()` is to a GPU."""

from __future__ import annotations

import ctypes

_libc = ctypes.CDLL(None)


def give_freed_memory_back() -> None:
    """Hand freed pages of the heap back to the machine, where the trainer needs them next.

    A rollout leaves the heap full of holes between oneDNN's primitives, of which vLLM keeps dozens per size of linear and makes a new
    one for every number of tokens: glibc returns what lies above the last of them only. Takes milliseconds.
    """
    _libc.malloc_trim(0)
