"""`--train.agent_func_path`: an agent that lets the policy answer twice, the second time up to the end of the context."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from openrlhf.utils.agent import AgentInstanceBase, MultiTurnAgentExecutor

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples" / "quickstart"))
import task  # noqa: E402


class TwoTurns(AgentInstanceBase):
    def __init__(self) -> None:
        self._num_turns = 0

    async def step(self, states: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        self._num_turns += 1
        # vLLM leaves the end token out of the text.
        answer = states["action_text"].removesuffix(task.EOS) + task.EOS
        reward = torch.tensor(float(task.is_correct(answer, states["label"])))
        sampling_params = states["sampling_params"]
        if self._num_turns == 1:
            sampling_params.ignore_eos = True  # the second turn ends at max_model_len only
        return {
            "rewards": reward,
            "scores": reward,
            "environment_feedback": "\n12 modulo five\n" if self._num_turns == 1 else "",
            "done": self._num_turns == 2,
            "sampling_params": sampling_params,
            "extra_logs": {},
        }


class AgentExecutor(MultiTurnAgentExecutor):
    def __init__(self) -> None:
        super().__init__(TwoTurns)
