"""Quantized checkpoint tensors are those of compressed-tensors."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from openrlhf_sd import drafter_scheme, provenance
from openrlhf_sd.config import SelfSpecConfig, SelfSpecError
from openrlhf_sd.engine import quantize
from openrlhf_sd.policy.model_constants import model_constants


def weight(rows: int, columns: int, dtype=torch.bfloat16) -> torch.Tensor:
    return (torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)) * 0.02).to(dtype)


def test_w4_literally():
    # One group [-7.5, 0, 1, 7.5]: scale 7.5 / 7.5 = 1; round half to even: -7.5 -> -8, 0 -> 0, 1 -> 1, 7.5 -> 8, clamped to 7.
    # Offset binary adds 8: 0, 8, 9, 15, and twice, low nibble first: 0xF980F980.
    packed, scale = quantize.quantize_w4(torch.tensor([[-7.5, 0, 1, 7.5] * 2]), group_size=4)
    assert scale.tolist() == [[1, 1]]
    assert packed.tolist() == [[0xF980F980 - 2**32]]


def test_w8_literally():
    # Scale 255 / 127.5 = 2: 255 -> 127.5 -> 128, clamped to 127; -3 / 2 = -1.5 -> -2.
    values, scale = quantize.quantize_w8(torch.tensor([[255.0, -3.0]]))
    assert scale.tolist() == [[2]]
    assert values.tolist() == [[127, -2]]


@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_w4_equals_compressed_tensors(group_size):
    from compressed_tensors.compressors.pack_quantized import pack_to_int32
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import quantize as reference_quantize
    from compressed_tensors.quantization.utils import calculate_qparams

    values = weight(300, 512, torch.float32)
    args = QuantizationArgs(num_bits=4, type="int", symmetric=True, strategy="group", group_size=group_size)
    groups = values.view(300, -1, group_size)
    scale, zero = calculate_qparams(groups.amin(-1), groups.amax(-1), args)
    packed = pack_to_int32(reference_quantize(values, scale, zero, args, dtype=torch.int8), 4)
    ours, our_scale = quantize.quantize_w4(values, group_size)
    torch.testing.assert_close(our_scale, scale, rtol=1e-6, atol=0)
    # A quotient within an ulp of a half may round the other way.
    assert (ours != packed).float().mean() < 1e-3


def test_all_zero_groups_stay_zero():
    for tensor, zero in ((torch.zeros(2, 64), -2004318072), (torch.zeros(1, 32, dtype=torch.bfloat16), -2004318072)):
        packed, scale = quantize.quantize_w4(tensor, 32)
        assert packed.unique().tolist() == [zero]  # 0x88888888: offset binary of 0
        assert scale.isfinite().all()
    values, scale = quantize.quantize_w8(torch.zeros(2, 8))
    assert not values.any() and scale.isfinite().all()


def test_only_linears_of_decoder_layers_are_quantized():
    linear, norm, bias = weight(32, 32), torch.ones(32), torch.zeros(32)
    names = [name for name, _ in quantize.checkpoint_tensors("model.layers.0.mlp.up_proj.weight", linear, "w4", 32)]
    assert names == [f"model.layers.0.mlp.up_proj.weight{suffix}" for suffix in ("_packed", "_scale", "_shape")]
    assert quantize.checkpoint_tensors("model.layers.0.input_layernorm.weight", norm, "w4", 32) == [
        ("model.layers.0.input_layernorm.weight", norm)
    ]
    assert quantize.checkpoint_tensors("model.layers.0.self_attn.q_proj.bias", bias, "w8a8", 32)[0][1] is bias
    assert quantize.checkpoint_tensors("model.layers.0.mlp.up_proj.weight", linear, "none", 32)[0][1] is linear
    assert not quantize.is_decoder_weight("lm_head.weight")
    assert not quantize.is_decoder_weight("model.norm.weight")


QWEN_7B = SimpleNamespace(hidden_size=3584, num_attention_heads=28, head_dim=None, intermediate_size=18944)


@pytest.mark.parametrize(("ranks", "group_size"), [(1, 128), (2, 128), (4, 128), (8, 64)])
def test_group_size_divides_every_rank(ranks, group_size):
    # 18944 / 8 = 2368 = 37 * 64
    assert drafter_scheme.default_group_size(drafter_scheme.linear_input_widths(QWEN_7B, ranks)) == group_size


def test_group_size_that_does_not_divide_names_flag_and_mend():
    with pytest.raises(SelfSpecError, match=r"--self-spec.group_size: 96 does not divide.*use 128"):
        drafter_scheme.check_group_size(96, drafter_scheme.linear_input_widths(QWEN_7B))


@pytest.mark.parametrize(
    ("quant", "group_size"),
    [("w4", 128), ("w4", 64), ("w4", 32), ("w8a8", 128), ("none", 128)],
)
def test_drafter_bytes_are_the_sizes_of_the_quantized_tensors(quant, group_size):
    config = {"hidden_size": 256, "intermediate_size": 384, "num_hidden_layers": 2, "vocab_size": 512}
    constants = model_constants(config | {"num_attention_heads": 4, "num_key_value_heads": 2})
    # 4 query heads and 2 key and value heads of 64; a Hugging Face checkpoint has the matrices that vLLM fuses one by one
    attention, mlp = [(256, 256), (128, 256), (128, 256), (256, 256)], [(384, 256), (384, 256), (256, 384)]
    num_bytes = 0
    for shape in 2 * (attention + mlp):
        for name, tensor in quantize.checkpoint_tensors("model.layers.0.some_proj.weight", weight(*shape), quant, group_size):
            if not name.endswith("_shape"):  # two numbers for the loader, no part of the layer
                num_bytes += tensor.nbytes
    assert constants.drafter_bytes(quant, group_size) == num_bytes


@pytest.mark.parametrize(
    ("instructions", "on_gpu", "asked", "quant"),
    [
        ("AVX2", False, {}, "w8a8"),
        ("AVX2", False, {"group_size": 64}, "w4"),
        ("AVX2", False, {"quant": "w4"}, "w4"),
        ("AVX2", True, {}, "w4"),
        ("AVX-512 with VNNI", False, {}, "w4"),
        ("AVX2 with bf16", False, {}, "w4"),
    ],
)
def test_scheme_where_none_is_named(monkeypatch, instructions, on_gpu, asked, quant):
    monkeypatch.setattr(provenance, "_cpu_model", lambda: f"A CPU (family 25, model 1, {instructions})")
    config = SelfSpecConfig(mode="fixed", **asked)
    assert drafter_scheme.resolve_scheme(config, (512, 2048), on_gpu).quant == quant


def test_model_without_a_group_size_is_told_to_use_w8a8():
    with pytest.raises(SelfSpecError, match="--self-spec.quant w8a8"):
        drafter_scheme.default_group_size((80,))


def test_w8a8_is_refused_where_vllm_has_no_int8_kernel():
    for quant, capability in (("w8a8", None), ("w8a8", (9, 0)), ("w4", (10, 0)), ("none", (12, 0))):
        drafter_scheme.check_capability(quant, capability)
    for capability in ((10, 0), (12, 0)):
        with pytest.raises(SelfSpecError, match=r"--self-spec.quant: .* use w4"):
            drafter_scheme.check_capability("w8a8", capability)
