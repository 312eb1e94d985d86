"""OpenRLHF 0.11.2: `--train.seed` does not seed the order of the prompts

`DeepspeedStrategy.setup_dataloader` hands its seed to the sampler only where a process group is there. The PPO trainer that loads the
prompts is in none, so the loader shuffles by torch's global generator, which nothing has seeded in that process.

Expected: two runs of one seed see their prompts in one order.
"""

import sys
from types import SimpleNamespace

import torch
from openrlhf.utils.deepspeed import DeepspeedStrategy


def order(process: int) -> list[int]:
    torch.manual_seed(process)  # in place of two processes, each with a generator that nothing has seeded
    loader = DeepspeedStrategy.setup_dataloader(SimpleNamespace(seed=42), list(range(8)), batch_size=1)
    return [int(prompt) for prompt in loader]


first, second = order(1), order(2)
print("seed 42, one run:", first)
print("seed 42, another:", second)
if first == second:
    sys.exit("not reproduced")
