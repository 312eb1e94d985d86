"""PyTorch 2.13.0: products of bf16 matrices take ten times as long as in float32 on x86-64 without AVX-512

They go to loops of PyTorch's own there, forward and backward, and not to oneDNN. Needs a processor without AVX-512.

Expected: no slower than widened to float32, multiplied and rounded.
"""

import statistics
import sys
import time

import torch

torch.manual_seed(0)
x, weight = torch.randn(256, 1024, dtype=torch.bfloat16), torch.randn(1024, 1024, dtype=torch.bfloat16)


def median_ms(call) -> float:
    times = []
    for _ in range(10):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times)


bf16_ms = median_ms(lambda: x @ weight)
widened_ms = median_ms(lambda: (x.float() @ weight.float()).bfloat16())
print(f"256 x 1024 x 1024: bf16 {bf16_ms:.1f} ms, widened to float32 and rounded {widened_ms:.1f} ms")
if bf16_ms < 2 * widened_ms:
    sys.exit("not reproduced")
