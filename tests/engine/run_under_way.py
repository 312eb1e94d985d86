"""A training that is looked at, and hurt, while it goes."""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
from training import STEPS, command

ENDS_WITHIN_S = 300
"""On one core a training takes two and a half minutes."""


class Run:
    """A training under way, with every process it ever had."""

    def __init__(self, run_dir: Path, policy: Path, data: Path, *flags: object, mode: str = "fixed", steps: int = STEPS) -> None:
        self.run_dir = run_dir
        self.log = run_dir.parent / f"{run_dir.name}.log"
        self._seen: dict[int, psutil.Process] = {}
        self.ray_folders: set[str] = set()
        with open(self.log, "wb") as log:
            line = command(run_dir, policy, data, "--self-spec", mode, *flags, steps=steps)
            self.process = psutil.Popen(line, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)

    def command_lines(self) -> dict[psutil.Process, str]:
        """Of every descendant that lives."""
        with contextlib.suppress(psutil.NoSuchProcess):
            for process in self.process.children(recursive=True):
                self._seen[process.pid] = process
        lines = {}
        for process in self._seen.values():
            with contextlib.suppress(psutil.NoSuchProcess):
                lines[process] = " ".join(process.cmdline())
        self.ray_folders |= {folder for line in lines.values() for folder in re.findall(r"/tmp/ray-\w+", line)}
        return lines

    def named(self, title: str) -> list[psutil.Process]:
        return [process for process, line in self.command_lines().items() if title in line]

    def wait_until(self, happens: Callable[[], object], what: str, within_s: float = 400) -> None:
        deadline = time.monotonic() + within_s
        while not happens():
            assert self.process.is_running() and self.process.status() != psutil.STATUS_ZOMBIE, self.output()[-4000:]
            assert time.monotonic() < deadline, f"{what}: not within {within_s} s\n{self.output()[-4000:]}"
            time.sleep(0.1)
            self.command_lines()

    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def ended(self) -> int:
        self.command_lines()
        return self.process.wait(timeout=ENDS_WITHIN_S)

    def survivors(self) -> list[str]:
        _, alive = psutil.wait_procs(list(self._seen.values()), timeout=5)
        return [f"{process.pid} {process.name()}" for process in alive]

    def kill(self) -> None:
        for process in [*self._seen.values(), self.process]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


@contextlib.contextmanager
def running(*args: object, **kwargs: object) -> Iterator[Run]:
    run = Run(*args, **kwargs)
    try:
        yield run
    finally:
        run.kill()


def status(run_dir: Path) -> str:
    return json.loads((run_dir / "provenance.json").read_text())["status"]
