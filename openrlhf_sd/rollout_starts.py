"""A rollout engine that cannot start ends the run.

OpenRLHF creates its engines without waiting for them; the policy's trainer then waits for them to join its process group, for minutes, also
for one whose process has ended with an error (after seven it was still waiting).
"""

from __future__ import annotations

import signal
import threading
from typing import Any

LOOK_EVERY_S = 0.2
"""The thread that waits is in Ray for so long at a time, and out of it before Ray shuts down: a `ray.get` under way then reads memory that
is gone, and the launcher ends by a segmentation fault."""


class EngineStartError(RuntimeError):
    """A rollout engine could not start."""


class RolloutStarts:
    """Made, asked and closed in the main thread, whose handler of SIGTERM raises KeyboardInterrupt."""

    def __init__(self) -> None:
        self._failure: Exception | None = None
        self._is_closed = False
        self._lock = threading.Lock()
        self._threads: list[threading.Thread] = []

    def watch(self, engines: list[Any]) -> None:
        """Ray actors that are starting. Returns at once; the main thread is interrupted when one has failed."""
        self._threads.append(threading.Thread(target=self._wait, args=(engines,), daemon=True))
        self._threads[-1].start()

    def _wait(self, engines: list[Any]) -> None:
        import ray

        try:
            starting = [engine.__ray_ready__.remote() for engine in engines]
            while starting and not self._is_closed:
                ready, starting = ray.wait(starting, timeout=LOOK_EVERY_S)
                ray.get(ready)
        except ray.exceptions.RayError as failure:
            with self._lock:
                if not self._is_closed:
                    self._failure = failure
                    signal.pthread_kill(threading.main_thread().ident, signal.SIGTERM)

    def close(self) -> None:
        """What fails from now on is being ended, and interrupts nobody. Ray may shut down after it."""
        with self._lock:
            self._is_closed = True
        for thread in self._threads:
            thread.join()

    def raise_failure(self) -> None:
        """For the main thread, interrupted. Raises EngineStartError where it was for an engine."""
        if self._failure is not None:
            lines = [line.strip() for line in str(self._failure).splitlines() if line.strip()]
            cause = next((line for line in reversed(lines) if "Error" in line), lines[-1])
            raise EngineStartError(f"a rollout engine could not start ({cause}); what it printed above says why") from self._failure
