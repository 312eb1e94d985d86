"""OpenRLHF 0.11.2: a sampled token whose logprob is missing gets 0.0, probability 1

`SingleTurnAgentExecutor` fills it in without a word, and importance sampling corrects by it.

Expected: an error.
"""

import asyncio
import sys
from types import SimpleNamespace

import torch
from openrlhf.utils.agent import SingleTurnAgentExecutor
from vllm import SamplingParams


class Engine:
    async def generate(self, prompt_token_ids, sampling_params, multi_modal_data=None):
        logprobs = [{7: SimpleNamespace(logprob=-0.5)}, {}]  # of the second token there is none
        return SimpleNamespace(outputs=[SimpleNamespace(token_ids=[7, 8], logprobs=logprobs, finish_reason="stop")])


def tokenizer(text, **_):
    return {"input_ids": torch.tensor([[1]])}


params = SamplingParams(max_tokens=4, logprobs=1)
output = asyncio.run(SingleTurnAgentExecutor().execute("prompt", "label", params, 8, tokenizer, Engine()))
print("logprobs of the prompt's token and two sampled ones:", output["rollout_log_probs"])
if output["rollout_log_probs"][-1] != 0.0:
    sys.exit("not reproduced")
