"""PyTorch's int8 kernels compute what the quantized checkpoint says, and vLLM chooses it where there are no AVX-512 VNNI instructions."""

from __future__ import annotations

import dataclasses
import gc
import threading

import pytest
import torch
from vllm.model_executor.kernels.linear import _POSSIBLE_INT8_KERNELS, choose_scaled_mm_linear_kernel
from vllm.model_executor.kernels.linear.scaled_mm.cpu import CPUInt8ScaledMMLinearKernel
from vllm.model_executor.kernels.linear.scaled_mm.ScaledMMLinearKernel import Int8ScaledMMLinearLayerConfig

from openrlhf_sd.engine import cpu_int8, quantize

needs_fbgemm = pytest.mark.skipif("fbgemm" not in torch.backends.quantized.supported_engines, reason="x86 only")

CHANNELS = Int8ScaledMMLinearLayerConfig(is_static_input_scheme=False, is_channelwise=True, input_symmetric=True)
NAMES = ["weight", "weight_scale", "input_scale", "input_zero_point", "azp_adj"]


def linear(weight: torch.Tensor) -> tuple[cpu_int8.TorchInt8LinearKernel, torch.nn.Module]:
    layer = torch.nn.Module()
    for name, tensor in zip(NAMES, quantize.quantize_w8(weight)):
        layer.register_parameter(name, torch.nn.Parameter(tensor, requires_grad=False))
    kernel = cpu_int8.TorchInt8LinearKernel(CHANNELS, NAMES)
    kernel.process_weights_after_loading(layer)
    return kernel, layer


@pytest.mark.parametrize("num_tokens", [1, 3, 20])
@pytest.mark.parametrize("shape", [(17, 64), (96, 80), (320, 256)])
def test_it_computes_with_the_quantized_weights(shape, num_tokens):
    """The products of this test are small ones."""
    weight, bias, x = (torch.randn(*size).bfloat16() for size in (shape, shape[:1], (num_tokens, shape[1])))
    kernel, layer = linear(weight)
    values, scale = quantize.quantize_w8(weight)
    wanted = x.float() @ (values.float() * scale).t()
    for some_bias in (None, bias):
        output = kernel.apply_weights(layer, x, some_bias)
        assert output.dtype == torch.bfloat16
        difference = output.float() - (wanted if some_bias is None else wanted + bias.float())
        assert difference.norm() / wanted.norm() < 2**-7  # two roundings to bf16


@needs_fbgemm
def test_large_products_are_those_of_inputs_rounded_per_token():
    weight, x = torch.randn(96, 64).bfloat16(), torch.randn(1000, 64).bfloat16()
    x[0] *= 1000  # an outlier is its own token's affair
    x[1] = 0
    kernel, layer = linear(weight)
    assert len(x) * weight.numel() > cpu_int8.SMALL_PRODUCT
    values, scale = quantize.quantize_w8(weight)
    steps = x.float().abs().amax(dim=-1, keepdim=True) / 63
    inputs = torch.where(steps > 0, (x.float() / steps).round(), 0)
    wanted = (inputs * steps) @ (values.float() * scale).t()
    output = kernel.apply_weights(layer, x)
    assert output.dtype == torch.bfloat16
    errors = (output.float() - wanted).norm(dim=-1) / wanted.norm(dim=-1).clamp(min=1)
    assert errors.max() < 0.02  # an input between two steps may be rounded the other way
    assert not output[1].any()


@needs_fbgemm
def test_the_largest_sums_do_not_overflow():
    """Two products of 8 by 8 bits do not fit in the 16 that FBGEMM adds them in; it would clip them silently."""
    weight = torch.ones(64, 64).bfloat16()
    x = torch.ones(1000, 64).bfloat16()
    kernel, layer = linear(weight)
    for sign in (1, -1):
        assert torch.allclose(kernel.apply_weights(layer, sign * x).float(), torch.tensor(sign * 64.0), rtol=0.01)


@needs_fbgemm
@pytest.mark.parametrize("num_tokens", [2, 2000])
def test_reloaded_weights_are_computed_with(num_tokens):
    """As vLLM's layerwise reload changes them: new tensors are processed, then copied to where the old ones were."""
    kernel, layer = linear(torch.randn(32, 64).bfloat16())
    weight = torch.randn(32, 64).bfloat16() * 3
    old = {name: getattr(layer, name) for name in NAMES[:2]}
    for name, tensor in zip(NAMES, quantize.quantize_w8(weight)):
        setattr(layer, name, torch.nn.Parameter(tensor, requires_grad=False))
    kernel.process_weights_after_loading(layer)
    for name, parameter in old.items():
        parameter.data.copy_(getattr(layer, name).data)
        setattr(layer, name, parameter)
    x = torch.randn(num_tokens, 64).bfloat16()
    wanted = x.float() @ weight.float().t()
    assert (kernel.apply_weights(layer, x).float() - wanted).norm() / wanted.norm() < 0.03


@needs_fbgemm
def test_packed_weights_go_with_their_linear():
    gc.collect()
    before = len(cpu_int8._packed)
    kernel, layer = linear(torch.randn(32, 64).bfloat16())
    kernel.process_weights_after_loading(layer)
    assert len(cpu_int8._packed) == before + 1
    del kernel
    gc.collect()
    assert len(cpu_int8._packed) == before


@needs_fbgemm
def test_packing_is_over_when_it_is_said_to_be_and_few_linears_wait_for_it(monkeypatch):
    cpu_int8.finish_packing()
    may_go_on, packed = threading.Event(), []

    def slow_pack(weight, scale):
        may_go_on.wait(timeout=60)
        packed.append(weight)
        return pack(weight, scale)

    pack = cpu_int8.pack
    monkeypatch.setattr(cpu_int8, "pack", slow_pack)
    linears = [linear(torch.randn(32, 64).bfloat16()) for _ in range(cpu_int8.MAX_UNDER_WAY)]
    assert not packed, "the next layer does not wait"
    threading.Timer(0.2, may_go_on.set).start()
    linears.append(linear(torch.randn(32, 64).bfloat16()))
    assert packed, "but for a whole layer it does"
    cpu_int8.finish_packing()
    assert len(packed) == len(linears)


@needs_fbgemm
def test_what_goes_wrong_with_a_packing_is_an_error_of_the_sync(monkeypatch):
    cpu_int8.finish_packing()
    monkeypatch.setattr(cpu_int8, "pack", lambda weight, scale: 1 / 0)
    linear(torch.randn(32, 64).bfloat16())
    with pytest.raises(ZeroDivisionError):
        cpu_int8.finish_packing()


@needs_fbgemm
def test_compiled_it_computes_the_same_and_follows_a_reload():
    kernel, layer = linear(torch.randn(96, 64).bfloat16())
    x = torch.randn(1000, 64).bfloat16()
    compiled = torch.compile(lambda tokens: kernel.apply_weights(layer, tokens), backend="aot_eager", fullgraph=True)
    for _ in range(2):
        assert torch.equal(compiled(x), kernel.apply_weights(layer, x))
        for name, tensor in zip(NAMES, quantize.quantize_w8(torch.randn(96, 64).bfloat16())):
            getattr(layer, name).data.copy_(tensor)
        kernel.process_weights_after_loading(layer)


@needs_fbgemm
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("num_tokens", [2, 2000])
def test_an_engine_of_another_dtype_gets_the_same(dtype, num_tokens):
    kernel, layer = linear(torch.randn(32, 64).bfloat16())
    x = torch.randn(num_tokens, 64).bfloat16()
    given = x.to(dtype)
    output = kernel.apply_weights(layer, given)
    assert output.dtype == dtype
    assert torch.equal(given, x.to(dtype))
    assert torch.allclose(output.float(), kernel.apply_weights(layer, x).float(), rtol=2**-8, atol=0)  # rounded otherwise


def test_leading_dimensions_are_kept():
    kernel, layer = linear(torch.randn(32, 64).bfloat16())
    assert kernel.apply_weights(layer, torch.randn(2, 3, 64).bfloat16()).shape == (2, 3, 32)


def test_widths_that_it_would_read_beyond_are_left_to_vllm(monkeypatch):
    asked = []
    monkeypatch.setattr(CPUInt8ScaledMMLinearKernel, "process_weights_after_loading", lambda self, layer: asked.append(layer))
    linear(torch.randn(32, 72).bfloat16())
    assert len(asked) == 1


@pytest.mark.parametrize("change", [{"is_static_input_scheme": True}, {"is_channelwise": False}, {"input_symmetric": False}])
def test_other_schemes_are_left_to_vllm(change):
    possible, reason = cpu_int8.TorchInt8LinearKernel.can_implement(dataclasses.replace(CHANNELS, **change))
    assert not possible and reason


@pytest.mark.skipif(torch.cuda.is_available(), reason="vLLM chooses by the platform, which is CUDA here")
@pytest.mark.parametrize(("has_vnni", "chosen"), [(True, CPUInt8ScaledMMLinearKernel), (False, cpu_int8.TorchInt8LinearKernel)])
def test_vllm_chooses_it_without_vnni_only(monkeypatch, has_vnni, chosen):
    cpu_int8.install()
    cpu_int8.install()
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: has_vnni)
    assert choose_scaled_mm_linear_kernel(CHANNELS, _POSSIBLE_INT8_KERNELS) is chosen
