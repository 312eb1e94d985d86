"""Matrix products of bf16 where the processor has no instructions for them."""

import subprocess
import sys

import pytest
import torch

from openrlhf_sd.cpu import bf16_products


@pytest.fixture(scope="module")
def kernels():
    return {name: (torch.library.get_kernel(f"aten::{name}", "CPU"), num_rounded) for name, num_rounded in bf16_products.PRODUCTS.items()}


def test_every_product_is_that_of_the_same_numbers_in_float32_rounded_once(kernels) -> None:
    torch.manual_seed(0)
    keyset = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
    matrix, other = torch.randn(40, 33).bfloat16(), torch.randn(33, 19).bfloat16()
    batch, others = torch.randn(3, 40, 33).bfloat16(), torch.randn(3, 33, 19).bfloat16()
    queries, keys, values = torch.randn(3, 2, 4, 11, 8).bfloat16()
    mask = torch.zeros(2, 1, 11, 11).bfloat16()
    mask[:, :, :, 7:] = float("-inf")
    attention = queries, keys, values, 0.0, False
    output, logsumexp = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*attention, attn_mask=mask)
    calls = {
        "mm": ((matrix, other), {}),
        "addmm": ((torch.randn(19).bfloat16(), matrix, other), {"beta": 0.5, "alpha": 2.0}),
        "bmm": ((batch, others), {}),
        "baddbmm": ((torch.randn(3, 40, 19).bfloat16(), batch, others), {"beta": 0.5, "alpha": 2.0}),
        "_scaled_dot_product_flash_attention_for_cpu": (attention, {"attn_mask": mask}),
        "_scaled_dot_product_flash_attention_for_cpu_backward": (
            (torch.randn_like(output), queries, keys, values, output, logsumexp, 0.0, False),
            {"attn_mask": mask},
        ),
    }
    assert calls.keys() == kernels.keys()
    for name, (args, kwargs) in calls.items():
        kernel, num_rounded = kernels[name]
        got = bf16_products.widened(kernel, num_rounded)(keyset, *args, **kwargs)
        wide_args, wide_kwargs = in_float32(args), dict(zip(kwargs, in_float32(kwargs.values())))
        expected = getattr(torch.ops.aten, name)(*wide_args, **wide_kwargs)
        own = getattr(torch.ops.aten, name)(*args, **kwargs)
        for one, wide, unpatched in zip(*map(as_tuple, (got, expected, own))):
            assert one.dtype == unpatched.dtype, name
            assert torch.equal(one, wide.to(one.dtype)), name


def test_few_rows_are_not_worth_widening_a_large_matrix_for() -> None:
    weight = torch.zeros(1024, 4096, dtype=torch.bfloat16)
    assert not bf16_products.pays(torch.zeros(4, 1024), weight)
    assert bf16_products.pays(torch.zeros(8, 1024), weight)
    assert not bf16_products.pays(torch.zeros(0, 1024), weight)
    assert bf16_products.pays(torch.zeros(1), torch.zeros(8, 1024), weight), "a bias before the factors"


def in_float32(values):
    return [value.float() if isinstance(value, torch.Tensor) else value for value in values]


def as_tuple(result):
    return result if isinstance(result, tuple) else (result,)


def test_other_types_go_to_the_kernel_as_they_are(kernels) -> None:
    keyset = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
    matrix = torch.randn(5, 5, dtype=torch.float64)
    assert torch.equal(bf16_products.widened(*kernels["mm"])(keyset, matrix, matrix), matrix @ matrix)


IN_A_PROCESS_OF_ITS_OWN = """
import torch
from openrlhf_sd.cpu import bf16_products

torch.manual_seed(0)
layer = torch.nn.Linear(64, 48).bfloat16()
inputs = torch.randn(2, 16, 64).bfloat16()
before = layer(inputs)
torch.ops.mkldnn._is_mkldnn_bf16_supported = lambda: False
bf16_products.install()
bf16_products.install()
layer(inputs).float().square().sum().backward()
exact = torch.nn.Linear(64, 48)
exact.load_state_dict(layer.state_dict())
exact(inputs.float()).square().sum().backward()
error = (layer.weight.grad.float() - exact.weight.grad).abs().max() / exact.weight.grad.abs().max()
print(float((layer(inputs) - before).abs().max()), float(error), layer.weight.grad.dtype)
"""


def test_installed_a_linear_layer_and_its_gradient_stay_what_they_were() -> None:
    run = subprocess.run([sys.executable, "-W", "ignore", "-c", IN_A_PROCESS_OF_ITS_OWN], capture_output=True, text=True, check=True)
    difference, error, dtype = run.stdout.split()
    assert float(difference) < 0.02  # outputs are of size 1: two roundings to bf16
    assert float(error) < 0.02
    assert dtype == "torch.bfloat16"
    assert run.stderr == ""
