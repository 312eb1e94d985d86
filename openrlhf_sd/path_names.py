"""Names from a command line that become paths: what no file system takes is refused before anything asks for it."""

from __future__ import annotations

import os
from pathlib import Path

from openrlhf_sd.config import SelfSpecError

NAME_MAX = 255
"""Bytes of one name in a path, on every file system that Linux commonly has (`limits.h`)."""


def check_names(path: str | Path, named_by: str) -> None:
    """Whether there is such a path does not matter.

    Args:
        named_by: the flag or argument the path came by.

    Raises:
        SelfSpecError: a name in it is longer than NAME_MAX, so that even asking whether it exists is an error.
    """
    for name in Path(path).parts:
        num_bytes = len(os.fsencode(name))
        if num_bytes > NAME_MAX:
            raise SelfSpecError(f"{named_by}: the name {name[:20]}... has {num_bytes} bytes and may have {NAME_MAX}; give a shorter one")
