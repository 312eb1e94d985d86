"""The rule-based reward of the quickstart, as OpenRLHF's `--reward.remote_url examples/quickstart/reward.py`.

OpenRLHF (openrlhf/utils/agent.py, SingleTurnAgentExecutor) loads this file by its path inside an actor, calls
`reward_func` with one query at a time and only logs what it raises, so the checker accepts any text.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))  # loaded by path: this folder is not importable otherwise
import task  # noqa: E402


def reward_func(queries: list[str], prompts: list[str], labels: list[str]) -> dict:
    """1.0 for a correct final answer, else 0.0.

    Args:
        queries: prompt and response decoded together, special tokens kept.
        prompts: the prompts alone.
        labels: the right answers.

    Returns:
        `rewards` and `scores`, float tensors of shape (len(queries),), and `extra_logs`, tensors of the same shape that
        OpenRLHF averages into its logs: `shows_work`, whether the response counts instead of guessing.
    """
    responses = [query.removeprefix(prompt) for query, prompt in zip(queries, prompts)]
    rewards = torch.tensor([float(task.is_correct(r, label)) for r, label in zip(responses, labels)])
    shows_work = torch.tensor([float(r.startswith("work")) for r in responses])
    return {"rewards": rewards, "scores": rewards, "extra_logs": {"shows_work": shows_work}}
