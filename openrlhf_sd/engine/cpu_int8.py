"""The linears of a `w8a8` drafter on an x86 CPU without AVX-512 VNNI instructions: PyTorch's int8 kernels.

vLLM's kernel, oneDNN's, has nothing for such a processor but to pack the weights anew in every call: 17 ms for one row through 1024x4096
on one core of an AMD EPYC (Zen 3). PyTorch has two. FBGEMM's multiplies int8 by int8, with weights packed once; what it does around a
product costs more than a small one itself. The other multiplies bf16 by int8 as they come. One row takes them 0.5 and 1.2 ms, eight
0.8 and 2.5.
"""

from __future__ import annotations

import itertools
import platform
import warnings
import weakref
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from vllm.model_executor.kernels.linear import _POSSIBLE_INT8_KERNELS
from vllm.model_executor.kernels.linear.scaled_mm.cpu import CPUInt8ScaledMMLinearKernel
from vllm.model_executor.kernels.linear.scaled_mm.ScaledMMLinearKernel import Int8ScaledMMLinearLayerConfig
from vllm.platforms import PlatformEnum
from vllm.utils.torch_utils import direct_register_custom_op

INPUT_MULTIPLE = 16
"""The kernel for small products reads whole registers, beyond a row's end too."""

SMALL_PRODUCT = 1 << 21
"""Multiplications up to which FBGEMM does not pay."""

MAX_INPUT = 63
"""Inputs are rounded to -63..63, seven bits: FBGEMM sums two products in 16 bits, and 8 bits by 8 would not fit. A shift by 64 makes them
unsigned, as it wants them."""

MAX_UNDER_WAY = 4
"""Linears whose packing may wait its turn, a decoder layer's: each holds its int8 weights in memory until then."""

_packed: dict[int, Future] = {}
"""FBGEMM's weights by number. A compiled graph holds a number, in a tensor, because it cannot hold these."""

_numbers = itertools.count()

_packer = ThreadPoolExecutor(1, thread_name_prefix="int8-packing")
"""FBGEMM packs on one core, and that is most of a re-quantization: it goes on while the next layer is quantized. One thread, because the
choice of FBGEMM is a setting of the whole process."""

_under_way: deque[Future] = deque()


def install() -> None:
    """Before vLLM's kernel in this process's order of choice. Idempotent."""
    kernels = _POSSIBLE_INT8_KERNELS[PlatformEnum.CPU]
    if TorchInt8LinearKernel not in kernels:
        kernels.insert(kernels.index(CPUInt8ScaledMMLinearKernel), TorchInt8LinearKernel)


class TorchInt8LinearKernel(CPUInt8ScaledMMLinearKernel):
    """Symmetric int8 weights with a scale per output channel, inputs with one per token."""

    _number: torch.Tensor | None = None

    @classmethod
    def is_supported(cls, compute_capability: int | None = None) -> tuple[bool, str | None]:
        if platform.machine() != "x86_64" or torch.cpu._is_vnni_supported():
            return False, "oneDNN is faster where there are AVX-512 VNNI instructions, and elsewhere nobody has measured"
        return super().is_supported(compute_capability)

    @classmethod
    def can_implement(cls, c: Int8ScaledMMLinearLayerConfig) -> tuple[bool, str | None]:
        if not c.is_channelwise or c.is_static_input_scheme or not c.input_symmetric:
            return False, "only a scale per output channel, and activations that would be scaled as they come"
        return super().can_implement(c)

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """The checkpoint's (out, in) int8 and (out, 1) float32 stay: small products read them."""
        weight, scale, _, _, _ = self._get_layer_params(layer)
        if weight.shape[1] % INPUT_MULTIPLE:
            super().process_weights_after_loading(layer)
            return
        self.linear_method = self._apply_weights_torch
        if self._number is None:
            number = next(_numbers)
            self._number = torch.tensor(number)
            weakref.finalize(self, _packed.pop, number, None)
        if _has_fbgemm():
            _packed[int(self._number)] = _pack_soon(weight.data, scale.data)

    def _apply_weights_torch(self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        weight, scale, _, _, _ = self._get_layer_params(layer)
        output = torch.ops.openrlhf_sd.int8_linear(x.reshape(-1, x.shape[-1]).bfloat16(), weight, scale, self._number)
        if bias is not None:
            output += bias
        return output.to(x.dtype).view(*x.shape[:-1], output.shape[-1])


def _has_fbgemm() -> bool:
    return "fbgemm" in torch.backends.quantized.supported_engines


def _pack_soon(weight: torch.Tensor, scale: torch.Tensor) -> Future:
    if len(_under_way) == MAX_UNDER_WAY:
        _under_way.popleft().result()
    _under_way.append(_packer.submit(pack, weight, scale))
    return _under_way[-1]


def finish_packing() -> None:
    """Return when all weights that were loaded are packed. Raises what went wrong with one."""
    while _under_way:
        _under_way.popleft().result()


def pack(weight: torch.Tensor, scale: torch.Tensor) -> Any:
    """(out, in) int8 and (out, 1) float32 -> FBGEMM's weights, a copy."""
    zero_points = torch.zeros(len(weight), dtype=torch.int64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tensors of quantized types will go, some day; nothing else packs for FBGEMM
        quantized = torch._make_per_channel_quantized_tensor(weight, scale.view(-1).double(), zero_points, 0)
    engine, torch.backends.quantized.engine = torch.backends.quantized.engine, "fbgemm"
    try:
        return torch.ops.quantized.linear_prepack(quantized, None)
    finally:
        torch.backends.quantized.engine = engine


def _int8_linear(tokens: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, number: torch.Tensor) -> torch.Tensor:
    """(tokens, in) bf16, (out, in) int8, (out, 1) float32 -> (tokens, out) float32."""
    packing = _packed.get(int(number)) if len(tokens) * weight.numel() > SMALL_PRODUCT else None
    if packing is None:
        # The kernel wants scales in bf16. They are float32: those of the quantization, so they multiply what it has summed up.
        ones = torch.ones(len(weight), dtype=torch.bfloat16)
        return torch._weight_int8pack_mm(tokens, weight, ones) * scale.view(1, -1)
    packed = packing.result()
    inputs = tokens.float()
    steps = inputs.abs().amax(dim=-1, keepdim=True).div_(MAX_INPUT).clamp_(min=torch.finfo(torch.float32).tiny)
    return torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(inputs.div_(steps), 1.0, MAX_INPUT + 1, packed).mul_(steps)


def _int8_linear_fake(tokens: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, number: torch.Tensor) -> torch.Tensor:
    return tokens.new_empty(tokens.shape[0], weight.shape[0], dtype=torch.float32)


_operators = torch.library.Library("openrlhf_sd", "FRAGMENT")  # they live as long as this does
direct_register_custom_op("int8_linear", _int8_linear, fake_impl=_int8_linear_fake, target_lib=_operators, dispatch_key="CPU")
