"""The linears of a `w8a8` drafter on a CPU without VNNI instructions: PyTorch's int8 kernel, activations as they come.

vLLM's kernel, oneDNN's, has nothing for such a processor but to pack the weights anew in every call: 17 against 0.74 ms for one row through
1024x4096 on one core of an AMD EPYC (Zen 3).
"""

from __future__ import annotations

import torch
from vllm.model_executor.kernels.linear import _POSSIBLE_INT8_KERNELS
from vllm.model_executor.kernels.linear.scaled_mm.cpu import CPUInt8ScaledMMLinearKernel
from vllm.model_executor.kernels.linear.scaled_mm.ScaledMMLinearKernel import Int8ScaledMMLinearLayerConfig
from vllm.platforms import PlatformEnum

INPUT_MULTIPLE = 16
"""PyTorch's kernel reads whole registers, beyond a row's end too."""


def install() -> None:
    """Before vLLM's kernel in this process's order of choice. Idempotent."""
    kernels = _POSSIBLE_INT8_KERNELS[PlatformEnum.CPU]
    if TorchInt8LinearKernel not in kernels:
        kernels.insert(kernels.index(CPUInt8ScaledMMLinearKernel), TorchInt8LinearKernel)


class TorchInt8LinearKernel(CPUInt8ScaledMMLinearKernel):
    """Symmetric int8 weights with a scale per output channel."""

    @classmethod
    def is_supported(cls, compute_capability: int | None = None) -> tuple[bool, str | None]:
        if torch.cpu._is_vnni_supported():
            return False, "oneDNN is faster where there are VNNI instructions"
        return super().is_supported(compute_capability)

    @classmethod
    def can_implement(cls, c: Int8ScaledMMLinearLayerConfig) -> tuple[bool, str | None]:
        if not c.is_channelwise or c.is_static_input_scheme or not c.input_symmetric:
            return False, "only a scale per output channel, and activations that would be scaled as they come"
        return super().can_implement(c)

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """The checkpoint's (out, in) int8 and (out, 1) float32 are what the kernel reads."""
        weight, _, _, _, _ = self._get_layer_params(layer)
        if weight.shape[1] % INPUT_MULTIPLE:
            super().process_weights_after_loading(layer)
            return
        self.linear_method = self._apply_weights_torch
        self._ones = torch.ones(len(weight), dtype=torch.bfloat16)

    def _apply_weights_torch(self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        # The kernel wants scales in bf16. They are float32: those of the quantization, so they multiply what it has summed up.
        weight, scale, _, _, _ = self._get_layer_params(layer)
        output = torch._weight_int8pack_mm(x.reshape(-1, x.shape[-1]), weight, self._ones) * scale.view(1, -1)
        if bias is not None:
            output += bias
        return output.to(x.dtype).view(*x.shape[:-1], output.shape[-1])
