"""Counts against numbers worked out by hand."""

import pytest

from openrlhf_sd.config import SelfSpecError
from openrlhf_sd.policy.model_constants import ModelConstants, model_constants

QWEN = {  # Qwen2.5-7B
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
    "tie_word_embeddings": False,
}


def test_linears_of_a_layer_are_those_that_vllm_fuses():
    # qkv: 28 * 128 + 2 * 4 * 128 = 4608 outputs; gate and up: 2 * 18944
    assert model_constants(QWEN).layer_linears == ((4608, 3584), (3584, 3584), (37888, 3584), (3584, 18944))


def test_parameters_bytes_and_flops_by_hand():
    constants = model_constants(QWEN)
    # 3584 * (4608 + 3584 + 37888) + 3584 * 18944 = 233,046,016 per layer
    assert constants.layers_parameters == 28 * 233_046_016 == 6_525_288_448
    assert constants.head_parameters == 152064 * 3584 == 544_997_376
    assert constants.dense_flops_per_token == 2 * (6_525_288_448 + 544_997_376)
    # keys and values: 2 * 28 layers * 4 heads * 128 * 2 bytes
    assert constants.kv_bytes_per_token == 57_344
    # scores and values: 2 * 2 FLOPs * 28 layers * 28 heads * 128
    assert constants.attention_flops_per_token_and_context == 401_408


def test_weight_bytes_count_scales_and_a_bf16_head_and_no_embedding():
    constants = model_constants(QWEN)
    head = 2 * 544_997_376
    assert constants.weight_bytes("none") == 2 * 6_525_288_448 + head
    # 4 bits and a 16-bit scale per 128 weights: 4.125 bits, 0.258 of bf16
    assert constants.weight_bytes("w4") == 6_525_288_448 * 4.125 / 8 + head
    assert constants.weight_bytes("w4", group_size=32) == 6_525_288_448 * 4.5 / 8 + head
    # a byte per weight and a float32 scale per output: 4608 + 3584 + 37888 + 3584 = 49664 per layer
    assert constants.weight_bytes("w8a8") == constants.weight_bytes("fp8") == 6_525_288_448 + 28 * 49664 * 4 + head


def test_a_policy_holds_its_embedding_too_unless_the_head_is_tied_to_it():
    # Qwen2.5-7B has 7.6156e9 parameters, 7.0703e9 of them in linears and head
    assert model_constants(QWEN).policy_bytes == 2 * (6_525_288_448 + 2 * 544_997_376)
    assert model_constants(QWEN | {"tie_word_embeddings": True}).policy_bytes == 2 * (6_525_288_448 + 544_997_376)


def test_a_tied_head_is_streamed_all_the_same():
    assert model_constants(QWEN | {"tie_word_embeddings": True}).weight_bytes("none") == model_constants(QWEN).weight_bytes("none")


def test_a_head_size_in_the_config_wins_over_hidden_size_by_heads():
    # Qwen3-0.6B: hidden 1024, 16 heads of 128, not of 64
    constants = model_constants(QWEN | {"hidden_size": 1024, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128})
    assert constants.layer_linears[0] == (16 * 128 + 2 * 8 * 128, 1024)
    assert constants.layer_linears[1] == (1024, 2048)


def test_null_head_size_and_missing_kv_heads_mean_the_usual():
    config = {key: value for key, value in QWEN.items() if key != "num_key_value_heads"} | {"head_dim": None}
    constants = model_constants(config)
    assert (constants.head_dim, constants.num_kv_heads) == (128, 28)


def test_tensor_parallel_ranks_share_everything_but_too_few_kv_heads():
    half, eighth = model_constants(QWEN, 2), model_constants(QWEN | {"num_attention_heads": 32, "head_dim": 128}, 8)
    assert half.layers_parameters * 2 == model_constants(QWEN).layers_parameters
    assert half.kv_bytes_per_token * 2 == model_constants(QWEN).kv_bytes_per_token
    # 4 heads on 8 ranks: each holds a whole one
    assert eighth.rank_kv_heads == 1


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"num_experts": 64}, "num_experts says mixture of experts"),
        ({"vocab_size": None}, "vocab_size is None"),
        ({"hidden_size": 3584.0}, "hidden_size is 3584.0"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
    ],
)
def test_a_config_that_cannot_be_counted_is_refused(changed, says):
    with pytest.raises(SelfSpecError, match=says):
        model_constants(QWEN | changed)


def test_a_config_without_a_field_is_refused_by_name():
    with pytest.raises(SelfSpecError, match="no 'hidden_size'"):
        model_constants({"num_attention_heads": 8})


def test_ranks_that_do_not_divide_the_heads_are_refused():
    with pytest.raises(SelfSpecError, match="3 does not divide 28 heads"):
        model_constants(QWEN, 3)


def test_an_unknown_scheme_is_refused():
    with pytest.raises(SelfSpecError, match="unknown scheme 'w3'"):
        model_constants(QWEN).weight_bytes("w3")


def test_constants_survive_a_trip_and_refuse_a_bad_one():
    values = model_constants(QWEN, 2).to_dict()
    assert ModelConstants.from_dict(values) == model_constants(QWEN, 2)
    for bad in (
        values | {"layers": 1},
        {"num_layers": 1},
        values | {"num_heads": -1},
        values | {"tied_head": 1},
        [],
        values | {"head_dim": True},
    ):
        with pytest.raises(SelfSpecError):
            ModelConstants.from_dict(bad)
