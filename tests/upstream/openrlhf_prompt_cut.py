"""OpenRLHF 0.11.2: `--rollout.max_new_tokens` of `--data.max_len` or more cuts prompts the wrong way, or not at all

`SingleTurnAgentExecutor` leaves a prompt the last `max_len - max_new_tokens` of its tokens, as `tokens[-room:]`. Without room that is
`tokens[-0:]`, the whole prompt, and with less than none `tokens[2:]` and so on: the first tokens are gone, and a warning in the log is all.

Expected: an error about the two flags.
"""

import asyncio
import sys
from types import SimpleNamespace

import torch
from openrlhf.utils.agent import SingleTurnAgentExecutor
from vllm import SamplingParams

PROMPT = [1, 2, 3, 4]


class Engine:
    async def generate(self, prompt_token_ids, sampling_params, multi_modal_data=None):
        self.seen = prompt_token_ids
        return SimpleNamespace(outputs=[SimpleNamespace(token_ids=[9], logprobs=None, finish_reason="stop")])


def tokenizer(text, **_):
    return {"input_ids": torch.tensor([PROMPT])}


found = {}
for max_new_tokens in (8, 10, 12):
    engine = Engine()
    params = SamplingParams(max_tokens=max_new_tokens)
    asyncio.run(SingleTurnAgentExecutor().execute("prompt", "label", params, 8, tokenizer, engine))
    found[max_new_tokens] = engine.seen
    print(f"--data.max_len 8 --rollout.max_new_tokens {max_new_tokens}: prompt {PROMPT} becomes {engine.seen}")
if found == {8: [], 10: [], 12: []}:
    sys.exit("not reproduced")
