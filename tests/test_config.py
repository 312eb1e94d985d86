"""Bad values end in one line that names the flag."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from openrlhf_sd.config import SelfSpecConfig, SelfSpecError


@pytest.mark.parametrize(
    ("values", "flag"),
    [
        ({"mode": "always"}, "--self-spec:"),
        ({"gamma": -1}, "--self-spec.gamma"),
        ({"gamma": 17}, "--self-spec.gamma"),
        ({"quant": "fp3"}, "--self-spec.quant"),
        ({"group_size": 0}, "--self-spec.group_size"),
        ({"group_size": 33}, "--self-spec.group_size"),
        ({"group_size": 64, "quant": "w8a8"}, "--self-spec.group_size"),
        ({"ladder": (5, 3)}, "--self-spec.ladder"),
        ({"ladder": ()}, "--self-spec.ladder"),
        ({"mode": "adaptive", "gamma": 4}, "--self-spec.gamma"),
        ({"gamma_max": 0}, "--self-spec.gamma_max"),
        ({"gamma_max": 17}, "--self-spec.gamma_max"),
        ({"margin": -0.1}, "--self-spec.margin"),
        ({"mode": "toggle", "calibration": "none"}, "--self-spec.calibration"),
        ({"ramp_up": -1}, "--self-spec.ramp_up"),
        ({"raise_at": 0.5, "lower_at": 0.6}, "--self-spec.lower_at"),
        ({"patience": 0}, "--self-spec.patience"),
    ],
)
def test_bad_value_names_its_flag(values, flag):
    with pytest.raises(SelfSpecError) as error:
        SelfSpecConfig(**values)
    assert str(error.value).startswith(flag)
    assert "\n" not in str(error.value)


def test_survives_json():
    config = SelfSpecConfig(mode="adaptive", gamma=5, quant="w4", group_size=64)
    assert SelfSpecConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_unknown_field_is_refused():
    with pytest.raises(SelfSpecError, match="gama"):
        SelfSpecConfig.from_dict({"gama": 3})


@pytest.mark.parametrize(
    ("mode", "gamma", "num_tokens"), [("fixed", 3, 3), ("fixed", 0, 1), ("toggle", 5, 5), ("adaptive", 5, 11), ("auto", 3, 11)]
)
def test_vllm_is_told_the_largest_gamma_of_the_mode(mode, gamma, num_tokens):
    assert SelfSpecConfig(mode=mode, gamma=gamma).num_speculative_tokens == num_tokens


def test_pure_modules_import_nothing_heavy():
    """style.md: config, policy, metrics, report must work without torch, vllm, ray, transformers or openrlhf."""
    code = (
        "import sys, openrlhf_sd, openrlhf_sd.policy.controller, openrlhf_sd.metrics, openrlhf_sd.rollout_record, "
        "openrlhf_sd.policy.cost_model, openrlhf_sd.step_ledger, openrlhf_sd.calibration, openrlhf_sd.simulator, "
        "openrlhf_sd.report, openrlhf_sd.run_records, openrlhf_sd.flags;"
        "print([m for m in ('torch', 'vllm', 'ray', 'transformers', 'openrlhf') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
