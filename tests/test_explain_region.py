"""Where speculation is predicted to pay: which step times are taken, and that they are asked through the run's own policy."""

import pytest
from calibrations import make_calibration
from explained_models import LLAMA_8B, QWEN_7B, QWEN_14B

from calib import automatic
from calib.device import device_name
from openrlhf_sd.calibration import load, shipped, shipped_paths
from openrlhf_sd.config import SelfSpecConfig, SelfSpecError
from openrlhf_sd.explain_region import StepTimes, decide, find_step_times, predict_region
from openrlhf_sd.gpus import GPUS
from openrlhf_sd.policy.model_constants import model_constants

A100, A100_40 = GPUS["a100-80gb"].device, GPUS["a100-40gb"].device
AUTO = SelfSpecConfig(quant="w4", group_size=128)

NEW_MODEL = LLAMA_8B | {"num_hidden_layers": 36}


def find(config=AUTO, model_config=QWEN_7B, device=A100, ranks=1, is_here=False):
    return find_step_times(config, model_config, "Some-Model", device, ranks, 0, is_here)


def test_the_shipped_calibration_is_what_the_run_decides_by():
    times = find()
    assert times.calibration == shipped(device=A100, model_config=QWEN_7B, quant="w4", tensor_parallel_size=1)
    assert times.origin == "shipped: fitted for Qwen2.5-7B, drafter w4, TP 1, on NVIDIA A100-SXM4-80GB"
    assert times.role == "the run decides by these"


@pytest.mark.parametrize(
    ("config", "role"),
    [
        (SelfSpecConfig(mode="fixed", quant="w4"), "fixed needs no step times"),
        (SelfSpecConfig(quant="w4", calibration="none"), "auto learns step times from its own steps (--self-spec.calibration none)"),
    ],
)
def test_a_run_that_does_not_decide_by_them_says_so(config, role):
    assert find(config).role == role


def test_another_model_on_a_measured_gpu_is_transferred_from_the_nearest():
    times = find(model_config=NEW_MODEL)
    assert times.origin == ("transferred from Llama-3.1-8B-Instruct, fitted on NVIDIA A100-SXM4-80GB; this model was not measured")
    assert times.calibration.constants == model_constants(NEW_MODEL)
    assert (
        times.calibration.cost_model.terms
        == shipped(device=A100, model_config=LLAMA_8B, quant="w4", tensor_parallel_size=1).cost_model.terms
    )
    assert times.role == "the run measures its own machine first, once, and decides by that"


def test_a_transferred_calibration_is_no_source_of_another_transfer():
    larger = QWEN_14B | {"num_hidden_layers": 50}
    assert "transferred from Llama-3.1-8B-Instruct, fitted" in find(model_config=larger).origin


def test_of_the_same_chip_only_the_bandwidth_is_scaled():
    there, here = find(), find(device=A100_40)
    assert "bandwidth scaled by 0.76, the data sheets' ratio to this GPU of the same chip, which was not measured either" in here.origin
    terms, scaled = there.calibration.cost_model.terms, here.calibration.cost_model.terms
    assert scaled.stream_bytes_per_s == pytest.approx(terms.stream_bytes_per_s * 1555 / 2039)
    assert scaled.gemm_flops_per_s == terms.gemm_flops_per_s
    # A plain step of one request streams 14.14 GB of weights: about 1 / 0.763 of the time
    step_s = [times.calibration.cost_model.target_step_s(1, 512) for times in (here, there)]
    assert step_s[0] / step_s[1] == pytest.approx(2039 / 1555, abs=0.05)


@pytest.mark.parametrize(
    "changed",
    [
        {"device": GPUS["h100"].device},
        {"device": GPUS["h200"].device},
        {"device": GPUS["b200"].device},
        {"device": "Some GPU"},
        {"ranks": 2},
        {"config": SelfSpecConfig(quant="w8a8")},
    ],
)
def test_what_nobody_measured_is_not_predicted(changed):
    assert find(**changed) is None


def test_a_file_is_taken_and_must_fit(tmp_path):
    path = tmp_path / "cal.json"
    make_calibration(device=A100).save(path)
    config = SelfSpecConfig(quant="w4", calibration=str(path))
    assert find(config).calibration == load(path)
    with pytest.raises(SelfSpecError, match="--self-spec.calibration: was measured on NVIDIA A100-SXM4-80GB, this is NVIDIA H200"):
        find(config, device=GPUS["h200"].device)


def test_what_this_machine_has_measured_before_is_taken(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    device = device_name()
    assert find(device=device, is_here=True) is None
    identity = {"device": device, "quant": "w4", "tensor_parallel_size": 1}
    path = automatic.cache_folder() / f"{automatic.calibration_key(automatic.sweep_key(identity, QWEN_7B, 0))}.json"
    path.parent.mkdir(parents=True)
    make_calibration(device=device).save(path)
    times = find(device=device, is_here=True)
    assert times.origin.startswith("measured on this machine before: fitted for Some-7B")
    assert times.role == "the run decides by these"


class Costs:
    """A plain step takes 1 s, a draft step 0.2 s, a verify step 1 s + 1/16 s per request."""

    def target_step_s(self, batch, context):
        return 1.0

    def draft_step_s(self, batch, context):
        return 0.2

    def verify_step_s(self, batch, context, gamma):
        return 1 + batch / 16


def largest_batch_that_pays(config, acceptance):
    return max((batch for batch in range(1, 129) if decide(config, Costs(), batch, 1000, acceptance)[1]), default=0)


def test_fixed_does_not_lose_while_a_cycle_takes_no_more_than_its_tokens():
    # 1 + 0.9 + ... + 0.9^5 = 4.686 tokens in 5 x 0.2 + 1 + batch / 16 s: even at batch 42.97
    assert largest_batch_that_pays(SelfSpecConfig(mode="fixed", gamma=5), 0.9) == 42


def test_toggle_switches_on_at_its_margin():
    # 4.686 / (2 + batch / 16) = 1.05 at batch 39.4
    config = SelfSpecConfig(mode="toggle", gamma=5)
    assert largest_batch_that_pays(config, 0.9) == 39
    # Before acceptance is known it expects 0.8 x 5 tokens: 4 / (2 + batch / 16) = 1.05 at batch 28.95
    assert largest_batch_that_pays(config, None) == 28


def test_adaptive_stands_on_the_rung_its_ladder_settles_on():
    # At 0.9 the acceptance rate is 0.737 with gamma 5 and 0.813 with 3, both below 0.85, and 0.9 with 1
    down = SelfSpecConfig(mode="adaptive", gamma=5, ladder=(1, 3, 5))
    assert decide(down, Costs(), 1, 1000, 0.9)[0] == 1
    # At 0.99 it is 0.970 with gamma 5 and 0.961 with 7
    up = SelfSpecConfig(mode="adaptive", gamma=5, ladder=(5, 7))
    assert decide(up, Costs(), 1, 1000, 0.99)[0] == 7
    assert decide(up, Costs(), 1, 1000, None)[0] == 5


def test_auto_takes_the_gamma_of_the_greatest_gain():
    # At one request and 0.9: 5.217 / 2.2625 = 2.306 with 6, 5.695 / 2.4625 = 2.313 with 7, 6.126 / 2.6625 = 2.301 with 8
    assert decide(AUTO, Costs(), 1, 1000, 0.9) == (7, True)
    # At 128 requests a verify step takes 9 s: nothing pays
    assert decide(AUTO, Costs(), 128, 1000, 0.9)[1] is False


def test_the_table_covers_the_run_and_marks_what_memory_does_not_hold():
    times = StepTimes(make_calibration(), "made up", "made up")
    region = predict_region(AUTO, times, requests_at_once=20, longest_tokens=5000, kv_tokens=20_000)
    assert sorted({cell.batch for cell in region.cells}) == [1, 2, 4, 8, 20]  # 16 is next to 20
    assert sorted({cell.context for cell in region.cells}) == [512, 1024, 2048, 5000]
    fits = {(cell.batch, cell.context) for cell in region.cells if cell.fits}
    assert (4, 5000) in fits and (8, 5000) not in fits
    assert {entry.acceptance for entry in region.switch_on} == {0.85, 0.9, 0.95}


def test_more_acceptance_never_switches_on_later():
    for path in shipped_paths():
        times = StepTimes(load(path), "shipped", "")
        region = predict_region(SelfSpecConfig(mode="toggle", quant="w4"), times, 128, 9216, 500_000)
        for context in {entry.context for entry in region.switch_on}:
            batches = [entry.batch for entry in region.switch_on if entry.context == context and entry.acceptance is not None]
            assert batches == sorted(batches)
