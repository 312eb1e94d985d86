"""A calibration and a sweep to go with it: its times are the cost model's own, off by a factor that the test names."""

import itertools

from calib.sweep_csv import PUBLISHED_COLUMNS, SweepRow, point_digests, write
from calib.term_priors import starting_terms
from openrlhf_sd.calibration import Calibration, Provenance
from openrlhf_sd.policy.cost_model import CostModel
from openrlhf_sd.policy.model_constants import model_constants

CONFIG = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
    "tie_word_embeddings": False,
}
DEVICE = "Some GPU"
MODEL = "Some-7B"

TERMS = starting_terms("NVIDIA A100")
"""Of the size found on a large GPU; nothing depends on their values."""

BATCHES, CONTEXTS, GAMMAS = (1, 8, 32, 64), (256, 1024, 4096), (3, 7)


def make_calibration(fitted_on=(), **changed):
    """Calibration that saw the timings `fitted_on`."""
    values = {
        "kind": "fitted",
        "device": DEVICE,
        "model": MODEL,
        "quant": "w4",
        "tensor_parallel_size": 1,
        "cost_model": CostModel(model_constants(CONFIG), "w4", TERMS),
        "provenance": Provenance(
            git_sha="0" * 40,
            argv=("--sweep", "sweep.csv"),
            packages={"numpy": "2.3.5"},
            machine={"cpu_model": "Some CPU", "num_cpus": 2},
            sweep_file="sweep.csv",
            sweep_sha256="0" * 64,
            fitted_points=point_digests(fitted_on),
        ),
    }
    return Calibration(**values | changed)


def make_rows(calibration, too_high=0.0, **changed):
    """Rows of our own format; each prediction is `too_high` above its measured time (0.1: 1.1 x measured)."""
    costs = calibration.cost_model
    rows = []
    for batch, context, gamma in itertools.product(BATCHES, CONTEXTS, GAMMAS):
        target_s = costs.target_step_s(batch, context) / (1 + too_high)
        draft_s = costs.draft_step_s(batch, context) / (1 + too_high)
        verify_s = costs.verify_step_s(batch, context, gamma) / (1 + too_high)
        identity = {"device": DEVICE, "model": MODEL, "quant": "w4", "tensor_parallel_size": 1, "vllm": "0.29.0"}
        times = {"target_step_s": target_s, "draft_step_s": draft_s, "verify_step_s": verify_s}
        cycle = {"cycle_s": gamma * draft_s + verify_s}
        point = {"batch": batch, "context": context, "gamma": gamma, "prompts": "distinct", "logprobs": 0}
        rows.append(SweepRow(**identity | point | times | cycle | changed))
    return rows


def write_sweep(path, calibration, too_high=0.0, **changed):
    write(path, make_rows(calibration, too_high, **changed))
    return path


def write_published(path, model, timings):
    """Target, draft and verify steps as the published sweeps have them."""
    modes = {"target": "target_decode", "draft": "drafter_decode", "verify": "target_verify"}
    lines = [",".join(PUBLISHED_COLUMNS)]
    for t in timings:
        ms = 1000 * t.seconds
        lines.append(",".join(map(str, (model, t.batch, t.context, t.gamma, modes[t.kind], ms, ms, 0.1, ms, ms, 200))))
    path.write_text("\n".join(lines) + "\n")
