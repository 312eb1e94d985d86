"""A rollout engine that cannot start ends the run.

OpenRLHF creates its engines without waiting for them; the policy's trainer then waits for them to join its process group, for minutes, also
for one whose process has ended with an error (after seven it was still waiting).
"""

from __future__ import annotations

import signal
import threading
from typing import Any


class EngineStartError(RuntimeError):
    """A rollout engine could not start."""


class RolloutStarts:
    """Made, asked and closed in the main thread, whose handler of SIGTERM raises KeyboardInterrupt."""

    def __init__(self) -> None:
        self._failure: Exception | None = None
        self._is_closed = False
        self._lock = threading.Lock()

    def watch(self, engines: list[Any]) -> None:
        """Ray actors that are starting. Returns at once; the main thread is interrupted when one has failed."""
        threading.Thread(target=self._wait, args=(engines,), daemon=True).start()

    def _wait(self, engines: list[Any]) -> None:
        import ray

        try:
            ray.get([engine.__ray_ready__.remote() for engine in engines])
        except ray.exceptions.RayError as failure:
            with self._lock:
                if not self._is_closed:
                    self._failure = failure
                    signal.pthread_kill(threading.main_thread().ident, signal.SIGTERM)

    def close(self) -> None:
        """What fails from now on is being ended, and interrupts nobody."""
        with self._lock:
            self._is_closed = True

    def raise_failure(self) -> None:
        """For the main thread, interrupted. Raises EngineStartError where it was for an engine."""
        if self._failure is not None:
            lines = [line.strip() for line in str(self._failure).splitlines() if line.strip()]
            cause = next((line for line in reversed(lines) if "Error" in line), lines[-1])
            raise EngineStartError(f"a rollout engine could not start ({cause}); what it printed above says why") from self._failure
