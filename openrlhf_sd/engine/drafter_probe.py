"""Whether the drafter's layers still compute what the policy's do: both get the same random input, and their outputs are compared.

This sees what no checksum of the weights can: a kernel left with pointers to freed scales, or a layer that a reload forgot to pack.
It reads every decoder weight of both once, as two decode steps would, after each weight sync.
"""

from __future__ import annotations

import torch
from vllm.model_executor.layers.linear import LinearBase

NUM_ROWS = 8

MAX_ERROR = 0.5
"""Round-to-nearest leaves a relative error of about 0.12 (w4) or 0.01 (w8a8) in a linear's output; unrelated weights of the same size leave
1.4. In between there is no scheme that could draft."""


@torch.inference_mode()
def relative_errors(policy: torch.nn.Module, drafter: torch.nn.Module) -> dict[str, float]:
    """Decoder linear -> |drafter's output - policy's| / |policy's| (Frobenius norms over NUM_ROWS random rows); NaN where either is not
    finite. With tensor parallelism every rank must call it at the same time."""
    counterparts = dict(policy.named_modules())
    errors = {}
    for name, linear in drafter.named_modules():
        if not isinstance(linear, LinearBase):
            continue
        rows = _random_rows(linear.input_size_per_partition, next(policy.parameters()))
        wanted = _output(counterparts[name], rows)
        errors[name] = torch.linalg.vector_norm(_output(linear, rows) - wanted) / torch.linalg.vector_norm(wanted)
    return dict(zip(errors, torch.stack(list(errors.values())).tolist()))


def _random_rows(width: int, like: torch.Tensor) -> torch.Tensor:
    # The same on every call and machine, so that errors of two syncs compare.
    generator = torch.Generator().manual_seed(0)
    return torch.randn(NUM_ROWS, width, generator=generator).to(device=like.device, dtype=like.dtype)


def _output(linear: LinearBase, rows: torch.Tensor) -> torch.Tensor:
    output = linear(rows)
    return (output[0] if isinstance(output, tuple) else output).float()
