"""vLLM's bf16 linears in float32, where the processor has no instructions for bf16."""

import pytest
import torch
from vllm.model_executor.layers import utils
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.platforms import current_platform

from openrlhf_sd import provenance
from openrlhf_sd.cpu import float32_linears

pytestmark = pytest.mark.skipif(not current_platform.is_cpu(), reason="vLLM's CPU build only")


@pytest.fixture(scope="module", autouse=True)
def kernels():
    current_platform.import_kernels()


def layer_of(weight: torch.Tensor) -> torch.nn.Module:
    layer = torch.nn.Module()
    layer.weight = torch.nn.Parameter(weight, requires_grad=False)
    return layer


@pytest.mark.parametrize("rows", [1, 2, 5, 130])
@pytest.mark.parametrize("has_bias", [False, True])
def test_product_is_that_in_float32_rounded_once(rows, has_bias) -> None:
    torch.manual_seed(0)
    layer = layer_of(torch.randn(48, 64).bfloat16())
    bias = torch.randn(48).bfloat16() if has_bias else None
    float32_linears.dispatch(layer, remove_weight=True)
    x = torch.randn(rows, 64).bfloat16()
    got = layer.cpu_linear(x, layer.weight, bias)
    exact = torch.nn.functional.linear(x.float(), layer.weight.float(), None if bias is None else bias.float())
    assert got.dtype is torch.bfloat16
    # One rounding to 8 bits; a bias is added before it, but for PyTorch's single row, which rounds twice.
    assert torch.allclose(got.float(), exact, rtol=2**-7, atol=2**-6)
    assert torch.equal(layer.cpu_linear(x.view(1, rows, 64), layer.weight, bias)[0], got)


def test_rows_are_padded_by_an_eighth_at_most_and_to_few_numbers() -> None:
    sizes = {rows: float32_linears.padded(rows) for rows in range(1, 4097)}
    assert all(rows <= size <= rows * 1.125 for rows, size in sizes.items())
    assert [sizes[rows] for rows in (1, 15, 16, 17, 33, 130, 4096)] == [1, 15, 16, 18, 36, 144, 4096]
    assert len(set(sizes.values())) <= float32_linears.NUM_PRIMITIVES


def test_new_weights_are_packed_anew() -> None:
    layer = layer_of(torch.ones(16, 32).bfloat16())
    float32_linears.dispatch(layer, remove_weight=True)
    layer.weight.data = torch.full((16, 32), 2.0).bfloat16()
    float32_linears.dispatch(layer, remove_weight=True)
    for rows in (1, 3):
        assert layer.cpu_linear(torch.ones(rows, 32).bfloat16(), layer.weight, None).eq(64).all()


def test_what_is_told_of_a_run_before_it_starts_is_what_its_engines_do() -> None:
    assert provenance.lacks_bf16() == float32_linears.are_needed()


def test_what_is_not_bf16_is_left_to_vllm() -> None:
    layer = layer_of(torch.randn(48, 64))
    float32_linears.dispatch(layer, remove_weight=False)
    assert not isinstance(layer.cpu_linear, float32_linears.Float32Linear)
    assert torch.allclose(layer.cpu_linear(torch.ones(3, 64), layer.weight, None), layer.weight.sum(1).expand(3, -1), atol=1e-4)


def test_compiled_it_chooses_by_the_rows_of_every_call_and_rounds_between_linears() -> None:
    torch.manual_seed(0)
    first, second = layer_of(torch.randn(64, 64).bfloat16()), layer_of(torch.randn(64, 64).bfloat16())
    for layer in (first, second):
        float32_linears.dispatch(layer, remove_weight=True)

    def both(x: torch.Tensor) -> torch.Tensor:
        return second.cpu_linear(first.cpu_linear(x, first.weight, None), second.weight, None)

    compiled = torch.compile(both, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (3, 7, 1):
        x = torch.randn(rows, 64).bfloat16()
        assert torch.equal(compiled(x), both(x))
    float32_linears.dispatch(second, remove_weight=True)
    x = torch.randn(3, 64).bfloat16()
    assert torch.equal(compiled(x), both(x))


@pytest.mark.parametrize("machine, has_bf16, needed", [("x86_64", False, True), ("x86_64", True, False), ("aarch64", False, False)])
def test_they_are_for_an_x86_without_bf16(monkeypatch, machine, has_bf16, needed) -> None:
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: has_bf16)
    monkeypatch.setattr(float32_linears.platform, "machine", lambda: machine)
    assert float32_linears.are_needed() == needed


def test_installed_they_are_what_vllm_dispatches_to(monkeypatch) -> None:
    monkeypatch.setattr(utils, "dispatch_cpu_unquantized_gemm", utils.dispatch_cpu_unquantized_gemm)
    float32_linears.install()
    float32_linears.install()
    layer = layer_of(torch.randn(16, 32).bfloat16())
    UnquantizedLinearMethod().process_weights_after_loading(layer)
    assert isinstance(layer.cpu_linear, float32_linears.Float32Linear)
    assert layer.weight.shape == (16, 32)  # for one row
