"""Whether two LaTeX answers are the same mathematics, and the process that math_reward.py keeps for asking so.

    python math_check.py LIMIT_CPU_S

By math-verify (Apache-2.0). As a program it answers JSON lines [answer, label] with 1 or 0, and `?` for what made it fail. Each answer
has a limit of its own, set with the kernel, which then ends this process: the one way to stop a power tower that sits in a single
arithmetic operation. It counts processor time, so that a busy machine changes no verdict; the much longer limit of real time is for a
machine that stands still.
"""

from __future__ import annotations

import json
import logging
import os
import re
import resource
import signal
import sys
from typing import TextIO

from math_verify import LatexExtractionConfig, parse, verify

WALL_PER_CPU = 20.0
"""Limit of real time over limit of processor time."""

LIMIT_MEMORY_BYTES = 4 * 2**30


def is_equal(answer: str, label: str) -> bool:
    """Whether `answer` equals `label`, both LaTeX. Units and the signs of degree, currency and percent do not count.

    May take forever, and all memory; see the module's text.
    """
    answer, label = _tidy(answer), _tidy(label)
    if _verified(answer, label):
        return True
    # math-verify reads 12.5% as 0.125, and where the sign is left out 12.5 is meant.
    return answer.endswith("%") != label.endswith("%") and _verified(answer.rstrip("\\%"), label.rstrip("\\%"))


def _tidy(text: str) -> str:
    """One line without dollars, and without the full stop or the space command at its end."""
    return re.sub(r"(?<!\\)\$", " ", " ".join(text.split())).strip().rstrip("\\ .")


def _verified(answer: str, label: str) -> bool:
    # No time limits of the library's own: they need SIGALRM and cannot interrupt a single long operation.
    gold, guess = (parse(f"${text}$", [LatexExtractionConfig()], parsing_timeout=None) for text in (label, answer))
    return bool(verify(gold, guess, timeout_seconds=None))


def main() -> None:
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what libraries print is no reply
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the run, which ends this process by closing its input
    _, hard_limit = resource.getrlimit(resource.RLIMIT_AS)
    limit_bytes = LIMIT_MEMORY_BYTES if hard_limit == resource.RLIM_INFINITY else min(LIMIT_MEMORY_BYTES, hard_limit)
    resource.setrlimit(resource.RLIMIT_AS, (limit_bytes, hard_limit))
    logging.disable(logging.CRITICAL)
    serve(sys.stdin, replies, float(sys.argv[1]))


def serve(requests: TextIO, replies: TextIO, limit_cpu_s: float) -> None:
    for line in requests:
        answer, label = json.loads(line)
        _set_timers(limit_cpu_s, WALL_PER_CPU * limit_cpu_s)
        try:
            reply = str(int(is_equal(answer, label)))
        except Exception:
            reply = "?"
        _set_timers(0, 0)
        print(reply, file=replies, flush=True)


def _set_timers(cpu_s: float, wall_s: float) -> None:
    signal.setitimer(signal.ITIMER_PROF, cpu_s)
    signal.setitimer(signal.ITIMER_REAL, wall_s)


if __name__ == "__main__":
    main()
