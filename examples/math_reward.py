r"""Rule-based reward for mathematics, as OpenRLHF's `--reward.remote_url examples/math_reward.py`: 1 if the last \boxed{...} of the
response equals the label, else 0.

Equality is math-verify's and not that of `openrlhf.utils.math_utils`, because the latter refuses more right answers (sets and lists in
another order, powers, scientific notation) and its time limit does not work outside a main thread, where OpenRLHF calls this;
tests/test_math_reward.py holds the table that both were measured on.

OpenRLHF (openrlhf/utils/agent.py, SingleTurnAgentExecutor) loads this file by its path inside an actor and calls `reward_func` from
several threads, with one query each. What it raises is only logged and leaves a response without a reward, so it never raises. Each actor
keeps one checking process (math_check.py), which dies at an answer's time limit, or with its actor, and is started again when needed.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

MATH_CHECK = Path(__file__).resolve().with_name("math_check.py")

LIMIT_CPU_S = 3.0
"""Of one answer. Real ones take milliseconds; what takes longer are powers and sums that no one can write out."""

MAX_ANSWER_CHARS = 1000
"""Answers are numbers and short formulas; a longer one is wrong without a check, unless it is the label letter by letter."""

RIGHT, WRONG, TIMED_OUT, UNCHECKED = "right", "wrong", "timed out", "unchecked"

TIMER_SIGNALS = (signal.SIGPROF, signal.SIGALRM)
"""What the checking process dies of at a time limit."""

BRACES = re.compile(r"\\boxed\s*\{|\\.|[{}]", re.DOTALL)
"""An escaped brace is text, and so belongs to the second alternative."""

PROMPT_TAIL_CHARS = 32

if importlib.util.find_spec("math_verify") is None:  # at once, where OpenRLHF loads this file: later it would only log it
    raise ModuleNotFoundError("math_reward.py: math-verify is not installed; run examples/setup.sh")


def reward_func(queries: list[str], prompts: list[str], labels: list[str]) -> dict:
    """1.0 for a right final answer, else 0.0.

    Args:
        queries: prompt and response decoded together, special tokens kept.
        prompts: the prompts alone.
        labels: the right answers, LaTeX.

    Returns:
        `rewards` and `scores`, float tensors of shape (len(queries),), and `extra_logs`, tensors of the same shape that OpenRLHF averages
        into its logs: `has_box`; `timed_out`, the check was stopped at its time limit; `unchecked`, there is no label or the check broke
        down. Both of the latter count as wrong.
    """
    import torch

    answers = [last_box(response_of(query, prompt)) for query, prompt in zip(queries, prompts)]
    verdicts = [judge(answer, label) for answer, label in zip(answers, labels)]
    rewards = torch.tensor([float(verdict == RIGHT) for verdict in verdicts])
    logs = {
        "has_box": [answer is not None for answer in answers],
        "timed_out": [verdict == TIMED_OUT for verdict in verdicts],
        "unchecked": [verdict == UNCHECKED for verdict in verdicts],
    }
    return {"rewards": rewards, "scores": rewards, "extra_logs": {name: torch.tensor(log).float() for name, log in logs.items()}}


def response_of(query: str, prompt: str) -> str:
    r"""What follows the prompt. The prompt itself says "\boxed{}", so it must not be searched.

    Decoding may give back another spelling of the question (Unicode normal forms) or, after truncation, only its end; then the prompt's
    last characters, which are the chat template's, say where it ends.
    """
    if query.startswith(prompt):
        return query[len(prompt) :]
    return query.partition(prompt[-PROMPT_TAIL_CHARS:])[2] or query


def last_box(response: str) -> str | None:
    r"""The content of the \boxed{...} that opens last, of those that are closed; None without one. One pass, whatever the text."""
    starts: list[int | None] = []
    last, content = -1, None
    for match in BRACES.finditer(response):
        token = match[0]
        if token == "{":
            starts.append(None)
        elif token == "}":
            start = starts.pop() if starts else None
            if start is not None and start > last:
                last, content = start, response[start : match.start()]
        elif token.startswith("\\boxed"):
            starts.append(match.end())
    return content


def judge(answer: str | None, label: object) -> str:
    """RIGHT, WRONG, TIMED_OUT or UNCHECKED."""
    label = "" if label is None else str(label).strip()
    if not label:
        return UNCHECKED
    answer = "" if answer is None else answer.strip()
    if answer == label:
        return RIGHT
    if not answer or len(answer) > MAX_ANSWER_CHARS:
        return WRONG
    return _CHECKER.ask(answer, label)


class Checker:
    """One checking process for all threads of this process, started when first needed."""

    def __init__(self, limit_cpu_s: float = LIMIT_CPU_S) -> None:
        self._command = [sys.executable, str(MATH_CHECK), str(limit_cpu_s)]
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None

    def ask(self, answer: str, label: str) -> str:
        """RIGHT, WRONG, TIMED_OUT or UNCHECKED."""
        request = json.dumps([answer, label]) + "\n"
        with self._lock:
            was_running = self._process is not None
            reply = self._exchange(request)
            if was_running and reply == UNCHECKED:  # something else may have ended a process that was there already
                reply = self._exchange(request)
            return reply

    def _exchange(self, request: str) -> str:
        try:
            if self._process is None:
                self._process = subprocess.Popen(self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, encoding="ascii")
            self._process.stdin.write(request)
            self._process.stdin.flush()
            reply = self._process.stdout.readline()
        except OSError:
            reply = ""
        except BaseException:  # an interrupt: the reply that is still to come would be taken for the next one's
            self._clear_up()
            raise
        if reply:
            return {"1\n": RIGHT, "0\n": WRONG}.get(reply, UNCHECKED)
        return TIMED_OUT if self._clear_up() in TIMER_SIGNALS else UNCHECKED

    def _clear_up(self) -> int | None:
        """End the process if it has not ended; the signal that it died of."""
        process, self._process = self._process, None
        if process is None:
            return None
        process.kill()
        with contextlib.suppress(OSError):
            process.stdin.close()
        process.stdout.close()
        return -process.wait()


_CHECKER = Checker()
