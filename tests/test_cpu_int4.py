"""The int4 kernels compute what the quantized checkpoint says, and vLLM chooses them for a w4 drafter on CPU."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from vllm import _custom_ops as ops
from vllm.model_executor.kernels.linear.mixed_precision.MPLinearKernel import MPLinearLayerConfig
from vllm.model_executor.layers.quantization.utils.quant_utils import pack_quantized_values_into_int32
from vllm.scalar_type import scalar_types

from openrlhf_sd.config import GROUP_SIZES
from openrlhf_sd.engine import cpu_int4, quantize

FUSED_QKV = MPLinearLayerConfig(
    full_weight_shape=(256, 160),
    partition_weight_shape=(256, 160),
    weight_type=scalar_types.uint4b8,
    act_type=torch.bfloat16,
    group_size=128,
    zero_points=False,
    has_g_idx=False,
)
HAS_VNNI = cpu_int4.VnniInt4LinearKernel.can_implement(FUSED_QKV)[0]
KERNELS = [
    pytest.param(cpu_int4.TorchInt4LinearKernel, id="torch"),
    pytest.param(cpu_int4.VnniInt4LinearKernel, id="vnni", marks=pytest.mark.skipif(not HAS_VNNI, reason="no AVX-512 VNNI instructions")),
]


def linear(kernel_class: type, group_size: int, weight: torch.Tensor) -> tuple[cpu_int4.TorchInt4LinearKernel, torch.nn.Module]:
    shape = tuple(reversed(weight.shape))
    config = dataclasses.replace(FUSED_QKV, full_weight_shape=shape, partition_weight_shape=shape, group_size=group_size)
    kernel = kernel_class(config, "packed", "scale", "zero_point", "g_idx")
    layer = torch.nn.Module()
    for name, tensor in zip(("packed", "scale"), quantize.quantize_w4(weight, group_size)):
        layer.register_parameter(name, torch.nn.Parameter(tensor, requires_grad=False))
    kernel.process_weights_after_loading(layer)
    return kernel, layer


def nibbles(packed: torch.Tensor) -> torch.Tensor:
    return torch.stack([packed >> shift & 15 for shift in range(0, 32, 4)], dim=-1).view(packed.shape[0], -1)


def dequantized(weight: torch.Tensor, group_size: int) -> torch.Tensor:
    packed, scale = quantize.quantize_w4(weight, group_size)
    return (nibbles(packed).float() - 8) * scale.float().repeat_interleave(group_size, dim=1)


@pytest.mark.parametrize("num_tokens", [1, 4, 7, 32, 40])
@pytest.mark.parametrize("num_rows", [32, 96, 160, 320])
@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("kernel_class", KERNELS)
def test_it_computes_with_the_quantized_weights(kernel_class, group_size, num_rows, num_tokens):
    generator = torch.Generator().manual_seed(num_rows)
    weight = torch.randn(num_rows, 256, generator=generator).bfloat16()
    x = torch.randn(num_tokens, 256, generator=generator).bfloat16()
    bias = torch.randn(num_rows, generator=generator).bfloat16()
    kernel, layer = linear(kernel_class, group_size, weight)
    wanted = x.float() @ dequantized(weight, group_size).t()
    for some_bias in (None, bias):
        output = kernel.apply_weights(layer, x, some_bias)
        assert output.dtype == torch.bfloat16
        difference = output.float() - (wanted if some_bias is None else wanted + bias.float())
        # bf16 keeps 8 bits, and int8 activations 7 of their largest.
        assert difference.norm() / wanted.norm() < (2**-8 if kernel_class is cpu_int4.TorchInt4LinearKernel else 2**-6)


def test_repacking_in_chunks_is_repacking_at_once():
    packed, _ = quantize.quantize_w4(torch.randn(cpu_int4.CHUNK_ROWS + 80, 128), 128)
    at_once = torch.ops.aten._convert_weight_to_int4pack_for_cpu(nibbles(packed).int(), 1)
    assert torch.equal(cpu_int4.repack_for_torch(packed), at_once)


@pytest.mark.skipif(not HAS_VNNI, reason="no AVX-512 VNNI instructions")
@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_repacking_is_vllms(group_size):
    num_rows, num_columns = cpu_int4.CHUNK_ROWS + 96, 256
    packed, scale = quantize.quantize_w4(torch.randn(num_rows, num_columns).bfloat16(), group_size)
    # vllm/model_executor/kernels/linear/mixed_precision/cpu.py: in AWQ's order of nibbles along the outputs
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    values = nibbles(packed).t().reshape(num_columns, -1, 8)[:, :, order].reshape(num_columns, num_rows)
    awq = pack_quantized_values_into_int32(values, scalar_types.uint4b8, 1).contiguous()
    eights = torch.full((num_columns // group_size, num_rows // 8), 0x88888888 - 2**32, dtype=torch.int32)
    upstream = ops.convert_weight_packed_scale_zp(awq, eights, scale.t().contiguous(), ops.CPUQuantAlgo.AWQ)
    kernel, layer = linear(cpu_int4.VnniInt4LinearKernel, group_size, torch.zeros(num_rows, num_columns).bfloat16())
    assert torch.equal(cpu_int4.repack_for_vnni(packed, group_size), upstream[0])
    assert torch.equal(kernel._zero_points, upstream[1])
    assert layer.scale.shape == upstream[2].shape and layer.scale.dtype == upstream[2].dtype


@pytest.mark.parametrize(
    "change",
    [
        {"weight_type": scalar_types.uint4},
        {"zero_points": True},
        {"has_g_idx": True},
        {"group_size": 16},
        {"partition_weight_shape": (256, 24)},
    ],
)
def test_what_they_cannot_do_is_left_to_others(change):
    assert cpu_int4.TorchInt4LinearKernel.can_implement(FUSED_QKV) == (True, None)
    for kernel_class in (cpu_int4.TorchInt4LinearKernel, cpu_int4.VnniInt4LinearKernel):
        possible, reason = kernel_class.can_implement(dataclasses.replace(FUSED_QKV, **change))
        assert not possible and reason


@pytest.mark.skipif(torch.cuda.is_available(), reason="vLLM chooses by the platform, which is CUDA here")
def test_vllm_chooses_the_fast_one(monkeypatch):
    from vllm.model_executor.kernels.linear import choose_mp_linear_kernel

    cpu_int4.install()
    cpu_int4.install()
    if HAS_VNNI:
        assert choose_mp_linear_kernel(FUSED_QKV) is cpu_int4.VnniInt4LinearKernel
    monkeypatch.setenv("VLLM_CPU_INT4_W4A8", "0")
    assert choose_mp_linear_kernel(FUSED_QKV) is cpu_int4.TorchInt4LinearKernel
    monkeypatch.delenv("VLLM_CPU_INT4_W4A8")
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: False)
    assert choose_mp_linear_kernel(FUSED_QKV) is cpu_int4.TorchInt4LinearKernel
