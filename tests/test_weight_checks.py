"""Checksums and finiteness of the weights of a sync."""

import pytest
import torch

from openrlhf_sd.engine.weight_checks import ReceivedWeights, fingerprint


def received(**weights: torch.Tensor) -> ReceivedWeights:
    result = ReceivedWeights()
    for name, weight in weights.items():
        result.add(name, weight)
    return result


@pytest.mark.parametrize("shape", [(64, 48), (7,), (3, 5), (1,)])
def test_one_changed_bit_changes_the_checksum(shape):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).bfloat16()
    before = received(w=weight.clone()).checksums()
    for position in (0, weight.numel() - 1):
        changed = weight.clone()
        changed.view(torch.int16).flatten()[position] ^= 1
        assert received(w=changed).checksums() != before
    assert received(w=weight.clone()).checksums() == before


def test_a_slice_is_read_by_its_values():
    weight = torch.randn(8, 16).bfloat16()
    assert received(w=weight[:, 4:8]).checksums() == received(w=weight[:, 4:8].clone()).checksums()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_parameter_that_is_not_finite_is_named(value):
    broken = torch.randn(4, 4).bfloat16()
    broken[2, 3] = value
    weights = received(first=torch.randn(4), second=broken, third=torch.zeros(2, 2))
    assert weights.non_finite() == ["second"]
    assert received().non_finite() == [] and received().checksums() == {}


def test_fingerprint_is_of_the_weights_not_of_their_order():
    a, b = torch.randn(4, 4), torch.randn(3)
    assert fingerprint(received(a=a, b=b).checksums()) == fingerprint(received(b=b, a=a).checksums())
    assert fingerprint({"a": -1, "b": -1}) == f"{2**64 - 2:016x}"
