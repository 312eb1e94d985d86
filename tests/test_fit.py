"""Fit, few shots, transfer and contamination on made-up sweeps: of the form itself, and of a machine unlike it."""

import dataclasses
import itertools
import json
import math

import numpy as np
import pytest
from calibrations import write_published

from calib import crossval
from calib import fit as fit_command
from calib import transfer as transfer_command
from calib.accuracy import prediction_pairs, score
from calib.contamination import contaminated
from calib.few_shot import few_shot_points
from calib.fit import fit
from calib.sweep_csv import Sweep, Timing
from calib.term_priors import compute_units, draft_pass_rows, starting_terms
from openrlhf_sd.calibration import load, shipped_paths
from openrlhf_sd.config import SelfSpecError
from openrlhf_sd.policy.cost_model import CostModel
from openrlhf_sd.policy.model_constants import model_constants

CONFIG = {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
    "num_key_value_heads": 4, "vocab_size": 152064}  # fmt: skip
OTHER_CONFIG = {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 48, "num_attention_heads": 40,
    "num_key_value_heads": 8, "vocab_size": 152064}  # fmt: skip
SMALL_CONFIG = {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14,
    "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True}  # fmt: skip

BATCHES, CONTEXTS, GAMMAS = (1, 2, 4, 8, 16, 24, 32, 48, 64), (256, 512, 1024, 2048, 4096), (3, 7, 11, 15)
GPU = "NVIDIA Some H100"

# Unlike the starting point: 1.8 times its bandwidth, 2.5 times its FLOPs, faster launches and requests.
FASTER = dataclasses.replace(
    starting_terms(GPU),
    stream_bytes_per_s=3e12,
    gemm_flops_per_s=6.5e14,
    draft_flops_per_s=3.5e14,
    attention_tile_s=1.1e-8,
    layer_s=1.2e-5,
    draft_layer_s=3e-5,
    target_request_s=6e-6,
)


def make_sweep(costs, points, noise=0.0, device=GPU, **changed):
    """What `costs` would measure at (batch, context, gamma), each time off by a normal logarithm."""
    random = np.random.default_rng(0)
    timings = []

    def add(kind, batch, context, gamma, seconds):
        timings.append(Timing(kind, batch, context, gamma, float(seconds * math.exp(random.normal(0, noise)))))

    for batch, context, gamma in points:
        if gamma == 0:
            add("target", batch, context, 0, costs.target_step_s(batch, context))
        else:
            add("draft", batch, context, gamma, costs.draft_step_s(batch, context))
            add("verify", batch, context, gamma, costs.verify_step_s(batch, context, gamma))
    values = {"model": "M", "device": device, "quant": "w4", "tensor_parallel_size": 1, "distinct_prompts": True}
    return Sweep(**values | changed, timings=tuple(timings), sha256="", path="made-up.csv")


def grid(batches=BATCHES, contexts=CONTEXTS, gammas=GAMMAS):
    return list(itertools.product(batches, contexts, (0, *gammas)))


def machine(config=CONFIG, terms=FASTER):
    return CostModel(model_constants(config), "w4", terms)


def errors(model, sweep):
    return score(prediction_pairs(model, sweep)).mape


def test_a_fit_finds_a_machine_unlike_its_starting_point():
    sweep = make_sweep(machine(), grid(), noise=0.005)
    fitted = fit(sweep, machine().constants, "w4")
    assert max(errors(fitted, make_sweep(machine(), grid((6, 40, 96), (700, 3000, 8000)))).values()) < 0.02


def test_a_few_wild_times_do_not_move_a_fit():
    sweep = make_sweep(machine(), grid(), noise=0.005)
    wild = tuple(
        dataclasses.replace(t, seconds=t.seconds / 2) if t.kind == "draft" and t.context == 4096 and t.batch >= 32 else t
        for t in sweep.timings
    )
    fitted = fit(dataclasses.replace(sweep, timings=wild), machine().constants, "w4")
    assert max(errors(fitted, make_sweep(machine(), grid())).values()) < 0.02


def test_transfer_keeps_the_machine_and_counts_the_model_anew():
    fitted = fit(make_sweep(machine(), grid(), noise=0.005), machine().constants, "w4")
    moved = dataclasses.replace(fitted, constants=model_constants(OTHER_CONFIG))
    assert max(errors(moved, make_sweep(machine(OTHER_CONFIG), grid())).values()) < 0.04


def test_few_timings_and_a_prior_follow_a_model_whose_kernels_are_less_efficient():
    # The new model's matrices run 10% slower and its drafter 20%: what no transfer can know.
    slower = dataclasses.replace(FASTER, gemm_flops_per_s=5.9e14, stream_bytes_per_s=2.8e12, draft_flops_per_s=2.9e14)
    other = machine(OTHER_CONFIG, slower)
    prior = fit(make_sweep(machine(), grid(), noise=0.005), machine().constants, "w4")
    few = make_sweep(other, few_shot_points(BATCHES, CONTEXTS, GAMMAS), noise=0.005)
    assert len(few.timings) == 24
    fitted = fit(few, other.constants, "w4", prior)
    truth = make_sweep(other, grid())
    assert errors(fitted, truth)["cycle"] < 0.025
    assert errors(fitted, truth)["cycle"] < errors(dataclasses.replace(prior, constants=other.constants), truth)["cycle"]


class InvertedCpu:
    """A CPU without native bf16, by a linear's milliseconds measured on one: a cheap first row, then a jump."""

    rows = (1, 4, 8, 16, 32, 64)
    bf16_ms = (8, 37, 44, 61, 95, 161)
    w4_ms = (12, 15, 18, 26, 40, 73)

    def __init__(self, constants):
        self.constants = constants

    def _seconds(self, table, rows, parameters):
        return np.interp(rows, self.rows, table) * 1e-3 * parameters / (1536 * 17920)

    def target_step_s(self, batch, context):
        return self.verify_step_s(batch, context, 0)

    def verify_step_s(self, batch, context, gamma):
        parameters = self.constants.layers_parameters + self.constants.head_parameters
        attention_s = batch * context * self.constants.kv_bytes_per_token / 1e10
        return self._seconds(self.bf16_ms, batch * (gamma + 1), parameters) + attention_s + 4e-3 + 3e-4 * batch

    def draft_step_s(self, batch, context):
        head_s = self._seconds(self.bf16_ms, batch, self.constants.head_parameters)
        return self._seconds(self.w4_ms, batch, self.constants.layers_parameters) + head_s + 3e-3 + 3e-4 * batch


def test_the_same_form_follows_a_cpu_where_one_request_is_the_cheap_case():
    truth = InvertedCpu(model_constants(SMALL_CONFIG))
    cpu = {"device": "Some CPU", "noise": 0.03}
    few = make_sweep(truth, few_shot_points((1, 2, 4, 8, 16), (64, 256, 512), (1, 2, 3)), **cpu)
    fitted = fit(few, truth.constants, "w4")
    found = errors(fitted, make_sweep(truth, grid((1, 2, 4, 8, 16), (64, 128, 256, 512), (1, 2, 3)), device="Some CPU"))
    assert max(found.values()) < 0.12
    assert fitted.target_step_s(4, 256) > 3 * fitted.target_step_s(1, 256)
    steps_s = fitted.target_step_s(np.arange(1, 65), 256)
    assert np.all(np.diff(steps_s) > 0) and np.all(np.isfinite(steps_s))


def test_a_fit_predicts_for_the_prompts_of_its_sweep_and_identical_ones_have_a_smaller_slope():
    truth = machine().under("identical")
    sweep = make_sweep(truth, grid(), noise=0.003, distinct_prompts=False)
    fitted = fit(sweep, truth.constants, "w4")
    assert fitted.prompts == "identical"
    slope = fitted.target_step_s(64, 4096) - fitted.target_step_s(64, 1024)
    in_rl = fitted.under("distinct")
    # Distinct prompts: at least 64 requests' 3072 tokens of keys and values at the machine's true bandwidth.
    bytes_s = 64 * 3072 * truth.constants.kv_bytes_per_token / FASTER.stream_bytes_per_s
    assert in_rl.target_step_s(64, 4096) - in_rl.target_step_s(64, 1024) > 0.8 * bytes_s > 1.2 * slope


def test_a_sweep_without_a_kind_of_step_cannot_be_fitted():
    sweep = make_sweep(machine(), grid())
    for kind, says in (("target", "no plain decode step"), ("draft", "no draft step"), ("verify", "no verify step")):
        rest = dataclasses.replace(sweep, timings=tuple(timing for timing in sweep.timings if timing.kind != kind))
        with pytest.raises(SelfSpecError, match=says):
            fit(rest, machine().constants, "w4")


def row(kind, seconds_by_context, batch=32, gamma=7):
    return [Timing(kind, batch, context, gamma, seconds) for context, seconds in seconds_by_context.items()]


def test_a_time_off_the_line_through_shorter_contexts_is_contaminated():
    # 10 ms + 1 ms per 1000 tokens, but for 4000: 12 where 14 is due (-14%).
    times = row("draft", {1000: 0.011, 2000: 0.012, 3000: 0.013, 4000: 0.012})
    assert contaminated(times) == {times[3]}
    # Upwards too: 16 where 14 is due; and what comes after is judged by the good ones.
    times = row("verify", {1000: 0.011, 2000: 0.012, 4000: 0.016, 8000: 0.018})
    assert contaminated(times) == {times[2]}


def test_a_time_below_that_of_a_shorter_context_is_contaminated_without_a_line():
    times = row("draft", {1000: 0.011, 2000: 0.010})  # -9%
    assert contaminated(times) == {times[1]}
    assert contaminated(row("draft", {1000: 0.011, 2000: 0.0107})) == set()  # -3%


def test_the_onset_of_cascade_attention_is_no_contamination():
    # 10% more from 256 to 512, as cascade attention begins, then 1 ms per 1000 tokens.
    seconds = {256: 0.0100, 512: 0.0110, 1024: 0.0115, 2048: 0.0125, 4096: 0.0146}
    assert contaminated(row("verify", seconds)) == set()
    # With distinct prompts there is no cascade: the line through 256 and 512 asks for 13 ms at 1024.
    assert contaminated(row("verify", seconds), distinct_prompts=True) != set()


def test_rows_of_other_batches_gammas_and_kinds_do_not_judge_each_other():
    times = (
        row("draft", {1000: 0.010})
        + row("draft", {2000: 0.005}, batch=8)
        + row("verify", {3000: 0.002})
        + row("draft", {4000: 0.001}, gamma=3)
    )
    assert contaminated(times) == set()


def test_few_shot_points_are_24_timings_that_span_the_lists():
    points = few_shot_points(BATCHES, CONTEXTS, GAMMAS)
    assert points == [
        (1, 256, 0), (1, 256, 3), (2, 4096, 0), (2, 4096, 7), (4, 1024, 0), (4, 1024, 11), (8, 256, 0), (8, 256, 15),
        (24, 1024, 0), (24, 1024, 3), (32, 1024, 0), (32, 1024, 7), (48, 256, 0), (48, 256, 11),
        (64, 1024, 0), (64, 1024, 15),
    ]  # fmt: skip
    assert sum(1 if gamma == 0 else 2 for _, _, gamma in points) == 24


def test_few_shot_points_make_do_with_short_lists_and_refuse_empty_ones():
    points = few_shot_points((1, 4), (64, 512), (0, 2))
    assert {batch for batch, _, _ in points} == {1, 4} and {gamma for _, _, gamma in points} == {0, 2}
    assert len(points) == len(set(points))
    for lists in (((), (64,), (1,)), ((1,), (64,), (0,))):
        with pytest.raises(SelfSpecError, match="few-shot points"):
            few_shot_points(*lists)


def test_devices_are_known_by_name():
    gpus = (None, "NVIDIA A100-SXM4-80GB", "NVIDIA A10G", "NVIDIA H200", "NVIDIA L40S", "NVIDIA L4")
    assert [compute_units(name) for name in gpus] == [108, 108, 72, 132, 142, 58]
    others = ("AMD EPYC, 2 cores", "Intel(R) Xeon(R) L4 CPU", "NVIDIA Unheard-of")
    assert [compute_units(name) for name in others] == [0, 0, 0]
    # Marlin goes in passes of 64 rows; Hopper runs another kernel, and so do other schemes.
    assert [
        draft_pass_rows("NVIDIA A100", "w4"),
        draft_pass_rows("NVIDIA H200", "w4"),
        draft_pass_rows("NVIDIA A100", "w8a8"),
    ] == [64, 0, 0]


@pytest.fixture
def published(tmp_path):
    """A sweep in the published format of a made-up A100, and the model's config."""
    truth = machine(terms=starting_terms(None)).under("identical")
    write_published(tmp_path / "sweep.csv", "M-7B", make_sweep(truth, grid(gammas=(3, 7)), noise=0.003).timings)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "other-14b.config.json").write_text(json.dumps(OTHER_CONFIG))
    return tmp_path


def run_fit(folder, *more):
    arguments = ["--sweep", "sweep.csv", "--model-config", ".", "--out", "cal.json"]
    return fit_command.main([str(folder / word) if word in ("sweep.csv", ".", "cal.json") else word for word in [*arguments, *more]])


def test_the_command_writes_a_calibration_for_rollouts_and_transfer_carries_it_over(published, capsys):
    assert run_fit(published) == 0
    fitted = load(published / "cal.json")
    assert (fitted.kind, fitted.model, fitted.quant, fitted.device) == ("fitted", "M-7B", "w4", "NVIDIA A100-SXM4-80GB")
    assert fitted.cost_model.prompts == "distinct"
    assert "predicts for distinct prompts" in capsys.readouterr().out
    out = published / "other.json"
    config = published / "other-14b.config.json"
    arguments = ["--calibration", str(published / "cal.json"), "--model-config", str(config), "--out", str(out)]
    assert transfer_command.main(arguments) == 0
    moved = load(out)
    assert (moved.kind, moved.model, moved.constants) == ("transferred", "other-14b", model_constants(OTHER_CONFIG))
    assert moved.cost_model.terms == fitted.cost_model.terms
    assert moved.provenance.sweep_file == "sweep.csv" and not moved.provenance.fitted_points
    assert transfer_command.main([*arguments, "--model", "Other-14B"]) == 0
    assert load(out).model == "Other-14B"


def test_the_command_fits_few_shots_from_a_prior_and_checks_that_it_fits(published, capsys):
    assert run_fit(published) == 0
    truth = machine(OTHER_CONFIG, starting_terms(None)).under("identical")
    write_published(published / "few.csv", "Other", make_sweep(truth, few_shot_points(BATCHES, CONTEXTS, (3, 7))).timings)
    arguments = ["--sweep", str(published / "few.csv"), "--model-config", str(published / "other-14b.config.json")]
    arguments += ["--out", str(published / "few.json"), "--prior", str(published / "cal.json")]
    assert fit_command.main(arguments) == 0
    assert load(published / "few.json").kind == "few-shot"
    capsys.readouterr()
    assert fit_command.main([*arguments, "--quant", "w8a8"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("calib.fit: --prior: ") and error.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--sweep", "gone.csv"], "gone.csv: cannot be read"),
        (["--model-config", "gone.json"], "gone.json cannot be read"),
        (["--quant", "w3"], "invalid choice"),
        (["--prior", "gone.json"], "gone.json: cannot be read"),
    ],
)
def test_bad_arguments_of_fit_are_one_line_and_exit_code_2(published, capsys, arguments, says):
    assert run_fit(published, *arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("calib.fit: ") and says in error and error.count("\n") == 1


def test_bad_arguments_of_transfer_and_crossval_are_one_line_and_exit_code_2(published, capsys):
    for command, arguments in (
        (transfer_command, ["--calibration", "gone.json", "--model-config", str(published), "--out", "x.json"]),
        (crossval, ["--sweep", "gone.csv", "--model-config", str(published)]),
        (crossval, ["--sweep", str(published / "sweep.csv")]),
    ):
        assert command.main(arguments) == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_crossval_prints_a_row_per_question(published, capsys):
    sweep, config = str(published / "sweep.csv"), str(published)
    assert crossval.main(["--sweep", sweep, "--model-config", config] * 2) == 0
    rows = [line.split(" | ")[0] for line in capsys.readouterr().out.splitlines() if line.startswith("| M-7B")]
    assert (
        rows
        == ["| M-7B, 5 folds"] * 2 + ["| M-7B, batch > 32"] * 2 + ["| M-7B -> M-7B, no timing"] * 2 + ["| M-7B -> M-7B, 24 timings"] * 2
    )


def test_shipped_calibrations_say_what_they_are_and_predict_for_rollouts():
    shipped = {calibration.model: calibration for calibration in map(load, shipped_paths())}
    assert {model: calibration.kind for model, calibration in shipped.items()} == {
        "Qwen2.5-7B": "fitted", "Llama-3.1-8B-Instruct": "fitted", "Qwen2.5-14B": "transferred",
    }  # fmt: skip
    for calibration in shipped.values():
        assert (calibration.device, calibration.quant, calibration.tensor_parallel_size) == (
            "NVIDIA A100-SXM4-80GB",
            "w4",
            1,
        )
        assert calibration.cost_model.prompts == "distinct"
    assert shipped["Qwen2.5-7B"].constants == model_constants(CONFIG)
    assert shipped["Qwen2.5-14B"].constants == model_constants(OTHER_CONFIG)
    assert shipped["Qwen2.5-14B"].cost_model.terms == shipped["Qwen2.5-7B"].cost_model.terms
