"""No process of ours outlives the launcher. Linux only, as vLLM and Ray are here."""

from __future__ import annotations

import ctypes
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager

PR_SET_CHILD_SUBREAPER = 36
GRACE_S = 5.0


def adopt_orphans() -> None:
    """From now on a descendant whose parent dies becomes our child, not init's, so that `end_descendants` still finds
    it.

    Ray ends its workers, but the engine processes vLLM started inside them notice only some time later.

    Raises:
        OSError: the kernel refuses.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Within, a second Ctrl-C of somebody who does not want to wait goes unheard: it would leave to themselves what the first one has not
    ended yet. For the main thread."""
    handlers = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


@_undisturbed()
def end_descendants() -> None:
    """Terminate every process started under this one; kill what is left after `GRACE_S` seconds. Takes no Ctrl-C meanwhile, three times
    `GRACE_S` at most."""
    import psutil

    descendants = psutil.Process(os.getpid()).children(recursive=True)
    trackers = [process for process in descendants if _is_resource_tracker(process)]
    others = [process for process in descendants if process not in trackers]
    for process in others:
        _signal(process.terminate)
    _, alive = psutil.wait_procs(others, timeout=GRACE_S)
    for process in alive:
        _signal(process.kill)
    psutil.wait_procs(alive, timeout=GRACE_S)
    # They come last: each removes the shared memory of the processes it stands for when the last of those is gone.
    _, alive = psutil.wait_procs(trackers, timeout=GRACE_S)
    for process in alive:
        _signal(process.kill)
    psutil.wait_procs(alive, timeout=GRACE_S)


def _is_resource_tracker(process) -> bool:
    """Python's `multiprocessing/resource_tracker.py`, one for each tree of spawned processes."""
    import psutil

    try:
        return any("multiprocessing.resource_tracker" in word for word in process.cmdline())
    except psutil.NoSuchProcess:  # a zombie, too
        return False


def _signal(send) -> None:
    import psutil

    try:
        send()
    except psutil.NoSuchProcess:
        pass  # it ended by itself, which is what was wanted
