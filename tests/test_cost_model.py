"""The cost model's physics: by hand where only one thing costs anything, and as monotone and sane where all do."""

import dataclasses
import json
import math

import numpy as np
import pytest

from calib.term_priors import starting_terms
from openrlhf_sd.config import SelfSpecError
from openrlhf_sd.policy import kernel_seconds as kernels
from openrlhf_sd.policy.cost_model import TERM_NAMES, CostModel, Terms
from openrlhf_sd.policy.model_constants import ModelConstants

LLAMA = ModelConstants(32, 4096, 14336, 32, 8, 128, 128256, False)  # Llama-3.1-8B
QWEN = ModelConstants(28, 3584, 18944, 28, 4, 128, 152064, False)  # Qwen2.5-7B
SMALL = ModelConstants(24, 896, 4864, 14, 2, 64, 151936, True)  # Qwen2.5-0.5B

GPU = starting_terms("NVIDIA A100-SXM4-80GB")
CPU = starting_terms("Some CPU @ 2 GHz")

# Memory only, at 1 TB/s, and next to no time for anything else.
BYTES_ONLY = Terms(
    **dict.fromkeys(TERM_NAMES, 0.0)
    | dict.fromkeys(("gemm_flops_per_s", "draft_flops_per_s"), 1e30)
    | dict.fromkeys(("wide_tile_gain", "draft_bytes_per_stream_byte", "switch_half_rows"), 1.0)
    | {"stream_bytes_per_s": 1e12, "roofline_exponent": 1.0, "draft_exponent": 1.0}
)


def model(constants=LLAMA, terms=GPU, prompts="distinct", quant="w4"):
    return CostModel(constants, quant, terms, prompts)


def test_with_free_compute_a_step_is_its_bytes_over_the_bandwidth():
    costs = model(terms=BYTES_ONLY)
    kv_bytes = 4 * 1000 * LLAMA.kv_bytes_per_token
    assert costs.target_step_s(4, 1000) == pytest.approx((LLAMA.weight_bytes("none") + kv_bytes) / 1e12)
    assert costs.draft_step_s(4, 1000) == pytest.approx((LLAMA.weight_bytes("w4") + kv_bytes) / 1e12)
    assert costs.verify_step_s(4, 1000, 3) == costs.target_step_s(4, 1000)


def test_with_free_bytes_a_verify_step_is_its_flops():
    terms = dataclasses.replace(BYTES_ONLY, stream_bytes_per_s=1e30, gemm_flops_per_s=1e12)
    assert model(terms=terms).verify_step_s(4, 1000, 3) == pytest.approx(16 * LLAMA.dense_flops_per_token / 1e12)


def test_identical_prompts_are_read_once_and_distinct_ones_per_request():
    longer_by = {}
    for prompts in ("distinct", "identical"):
        costs = model(terms=BYTES_ONLY, prompts=prompts)
        longer_by[prompts] = costs.target_step_s(8, 3000) - costs.target_step_s(8, 1000)
    assert longer_by["distinct"] == pytest.approx(8 * 2000 * LLAMA.kv_bytes_per_token / 1e12)
    assert longer_by["identical"] == pytest.approx(2000 * LLAMA.kv_bytes_per_token / 1e12)


def test_regimes_agree_for_a_single_request():
    distinct, identical = model(), model(prompts="identical")
    assert distinct.target_step_s(1, 4000) == identical.target_step_s(1, 4000)
    assert distinct.under("identical") == identical
    assert identical.under("distinct").draft_step_s(32, 4000) > identical.draft_step_s(32, 4000)


def test_cascade_attention_makes_eight_identical_requests_cheaper_to_verify_than_seven():
    costs = model(prompts="identical")
    assert costs.verify_step_s(8, 4096, 3) < costs.verify_step_s(7, 4096, 3)
    assert costs.under("distinct").verify_step_s(8, 4096, 3) > costs.under("distinct").verify_step_s(7, 4096, 3)


def test_an_engine_for_gamma_11_pads_its_drafts_to_twelves():
    # 16, 32 and 64 requests run as 24, 36 and 72 rows: dearer. 24 and 48 are multiples already.
    costs = model()
    for batch in (16, 32, 64):
        assert costs.draft_step_s(batch, 512, 11) > 1.05 * costs.draft_step_s(batch, 512, 7)
    for batch in (24, 48):
        assert costs.draft_step_s(batch, 512, 11) == costs.draft_step_s(batch, 512, 7)


def test_graphs_round_requests_up():
    assert [kernels.graph_rows(batch, 1) for batch in (1, 2, 3, 4, 5, 8, 9, 17, 256)] == [1, 2, 4, 4, 8, 8, 16, 24, 256]
    assert [kernels.graph_rows(batch, 12) for batch in (1, 8, 16, 24, 32, 64)] == [12, 12, 24, 24, 36, 72]


def test_attention_tiles_go_by_waves_in_pairs():
    # 108 units; 2 tiles on one take 1.6: one wave 1, two 1.6, three 2.6, four 3.2
    assert [kernels.attention_waves(tiles, 108, 0.6) for tiles in (1, 108, 109, 216, 217, 432)] == pytest.approx([1, 1, 1.6, 1.6, 2.6, 3.2])


def test_a_ragged_last_wave_of_gemm_tiles_costs_a_whole_one():
    # 28672 outputs are 224 tiles: 2.07 waves of 108, paid as 3. 27648 are 216: 2 waves, paid as 2. FLOPs are free.
    def seconds(outputs):
        return kernels.gemm_s(64, outputs, 4096, 108, 1e12, 1e30, 1.0, 1.0)

    assert seconds(28672) / seconds(27648) == pytest.approx(3 / 2)


@pytest.mark.parametrize("constants", [LLAMA, QWEN, SMALL])
@pytest.mark.parametrize("terms", [GPU, CPU], ids=["gpu", "cpu"])
def test_steps_grow_with_batch_context_and_gamma_up_to_batch_256_and_context_16k(constants, terms):
    costs = model(constants, terms)
    batch = np.arange(1, 257)[:, None, None]
    context = np.array([1, 64, 256, 257, 1000, 4096, 16384])[None, :, None]
    gamma = np.arange(1, 17)[None, None, :]
    for seconds in (
        costs.target_step_s(batch, context),
        costs.draft_step_s(batch, context),
        costs.verify_step_s(batch, context, gamma),
    ):
        for axis in range(3):
            # Equal steps may differ in the last bits.
            assert np.all(np.diff(seconds, axis=axis) >= -1e-12 * seconds.min())


@pytest.mark.parametrize("constants", [LLAMA, QWEN])
@pytest.mark.parametrize("prompts", ["distinct", "identical"])
def test_extrapolated_steps_keep_between_physical_bounds(constants, prompts):
    costs = model(constants, prompts=prompts)
    for batch in (1, 64, 256):
        for context in (256, 16384):
            kv_reads = batch if prompts == "distinct" else 1
            weights_s = constants.weight_bytes("none") / GPU.stream_bytes_per_s
            floor_s = weights_s + kv_reads * context * constants.kv_bytes_per_token / GPU.stream_bytes_per_s
            for gamma in (1, 15):
                tokens = batch * (gamma + 1)
                flops = tokens * (constants.dense_flops_per_token + context * constants.attention_flops_per_token_and_context)
                # Attention pads queries to tiles of 64, up to 32 times gamma 1's; all of it serial is the ceiling.
                ceiling_s = 2 * floor_s + 40 * flops / GPU.gemm_flops_per_s + 0.05
                assert 0.9 * weights_s < costs.verify_step_s(batch, context, gamma) < ceiling_s
            assert floor_s < costs.target_step_s(batch, context) < 3 * floor_s + 0.05
            # Marlin loses to a bf16 GEMM at hundreds of rows, but to no worse than half its speed.
            assert prompts == "identical" or costs.draft_step_s(batch, context) < 2 * costs.target_step_s(batch, context)


def test_numbers_and_arrays_give_the_same_seconds():
    for terms in (GPU, CPU):
        for prompts in ("distinct", "identical"):
            costs = model(QWEN, terms, prompts)
            batches, contexts, gammas = (
                np.array([1, 7, 16, 64, 256]),
                np.array([1, 256, 999, 4096, 300]),
                np.array([1, 3, 7, 11, 2]),
            )
            points = list(zip(batches.tolist(), contexts.tolist(), gammas.tolist(), strict=True))
            assert [costs.target_step_s(b, s) for b, s, _ in points] == pytest.approx(costs.target_step_s(batches, contexts))
            assert [costs.draft_step_s(b, s, g) for b, s, g in points] == pytest.approx(costs.draft_step_s(batches, contexts, gammas))
            assert [costs.verify_step_s(*point) for point in points] == pytest.approx(costs.verify_step_s(batches, contexts, gammas))


def test_linears_computed_by_the_block_are_those_of_each_number():
    for terms in (GPU, CPU):
        costs = model(QWEN, terms)
        for rows in (1, 2, 255, 256, 257, 1000):
            assert costs._linears(rows) == pytest.approx(costs._target_linears_s(rows), rel=1e-12)
            assert costs._draft_linears(rows) == pytest.approx(costs._draft_linears_s(rows), rel=1e-12)
            assert type(costs._linears(rows)) is float


def test_an_unquantized_drafter_costs_a_target_step_of_linears():
    terms = dataclasses.replace(BYTES_ONLY)
    assert model(terms=terms, quant="none").draft_step_s(4, 100) == pytest.approx(model(terms=terms).target_step_s(4, 100))


def test_a_model_survives_the_trip_through_json():
    costs = model(prompts="identical")
    assert CostModel.from_dict(json.loads(json.dumps(costs.to_dict()))) == costs


def _with_term(name, value):
    values = model().to_dict()
    return values | {"terms": values["terms"] | {name: value}}


def _without(name):
    values = model().to_dict()
    return {key: value for key, value in values.items() if key != name}


@pytest.mark.parametrize(
    ("values", "says"),
    [
        (_with_term("layer_s", math.nan), "term layer_s is nan"),
        (_with_term("layer_s", math.inf), "term layer_s is inf"),
        (_with_term("layer_s", -1e-6), "term layer_s is -1e-06"),
        (_with_term("layer_s", "1"), "term layer_s is '1'"),
        (_with_term("layer_s", True), "term layer_s is True"),
        (_with_term("stream_bytes_per_s", 0), "stream_bytes_per_s is 0, not a finite number above 0"),
        (_with_term("roofline_exponent", 0.5), "roofline_exponent is 0.5, not a finite number of 1 or more"),
        (_with_term("lyaer_s", 1.0), "unknown lyaer_s"),
        (_without("prompts"), "missing prompts"),
        (model().to_dict() | {"extra": 1}, "unknown extra"),
        (model().to_dict() | {"prompts": "same"}, "prompts is 'same'"),
        (model().to_dict() | {"quant": "w3"}, "unknown scheme 'w3'"),
        (model().to_dict() | {"terms": {}}, "missing compute_units"),
        ([], "is not a table"),
    ],
)
def test_a_malformed_model_is_one_clear_error(values, says):
    with pytest.raises(SelfSpecError, match=says):
        CostModel.from_dict(values)
