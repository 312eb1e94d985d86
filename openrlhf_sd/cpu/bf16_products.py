"""Matrix products of bf16 on a processor without AVX-512, in float32.

There PyTorch 2.13 has no library for them and takes loops of its own, ten times slower than to widen the factors, multiply and
round the product: 40 against 4 ms for 512x192 by 192x1024 on one core of an AMD EPYC (Zen 3). The sums are float32 either way.
This is for the trainer. Engines have it for what is not a linear: those are vLLM's own there (float32_linears.py).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

PRODUCTS = {
    # Linear layers, their gradients and Muon end in these four.
    "mm": 1,
    "addmm": 1,
    "bmm": 1,
    "baddbmm": 1,
    # Attention, whose second output is float32 in any case.
    "_scaled_dot_product_flash_attention_for_cpu": 1,
    "_scaled_dot_product_flash_attention_for_cpu_backward": 3,
}
"""Operator -> how many outputs have the type of its inputs."""

MIN_REUSE = 6.0
"""Multiplications per widened number from which on widening pays. A product of few rows with a large matrix, decoding, has less."""

_libraries: list[Any] = []
"""What is registered stays as long as these do."""


def install() -> None:
    """Into this process's PyTorch, where the processor needs it. Idempotent."""
    import torch

    if _libraries or torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return
    library = torch.library.Library("aten", "IMPL")
    for name, num_rounded in PRODUCTS.items():
        kernel = torch.library.get_kernel(f"aten::{name}", "CPU")
        library.impl(name, widened(kernel, num_rounded), "CPU", with_keyset=True, allow_override=True)
    _libraries.append(library)


def pays(*args: Any) -> bool:
    """Whether the product of the last two matrices is worth widening them. Attention always is: what follows its factors are numbers."""
    left, right = args[-2:]
    if not hasattr(left, "shape") or not hasattr(right, "shape"):
        return True
    sizes = left.shape[-2], right.shape[-1], right.shape[-2]
    # The first part is implied by the second, but for empty matrices.
    return min(sizes) >= MIN_REUSE and 1 / sum(1 / size for size in sizes) >= MIN_REUSE


def widened(kernel: Any, num_rounded: int) -> Callable[..., Any]:
    """The operator that `kernel` implements, with bf16 factors taken to float32 and the first `num_rounded` outputs back."""
    import torch

    def widen(value: Any) -> Any:
        return value.float() if isinstance(value, torch.Tensor) and value.dtype is torch.bfloat16 else value

    def compute(keyset: Any, first: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if first.dtype is not torch.bfloat16 or not pays(first, *args):
            return kernel.call_boxed(keyset, first, *args, **kwargs)
        product = kernel.call_boxed(keyset, *map(widen, (first, *args)), **{name: widen(value) for name, value in kwargs.items()})
        if isinstance(product, torch.Tensor):
            return product.bfloat16()
        return tuple(output.bfloat16() if place < num_rounded else output for place, output in enumerate(product))

    return compute
