"""Which calibration a run decides by: `--self-spec.calibration` FILE, auto or none."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from openrlhf_sd import calibration as calibration_file
from openrlhf_sd.calibration import Calibration
from openrlhf_sd.config import CALIBRATED_MODES, SelfSpecConfig, SelfSpecError


def rollout_logprobs(flags: Mapping[str, Any]) -> int:
    """Per sampled token, as OpenRLHF's rollouts ask for them (`trainer/ppo_utils/samples_generator.py`). They are a good part of a small
    model's step.

    Args:
        flags: OpenRLHF's, flat.
    """
    return int(flags["algo.advantage.is_correction_level"] != "off")


def choose_calibration(config: SelfSpecConfig, model: str, tensor_parallel_size: int, logprobs: int = 0) -> Calibration | None:
    """Load and check the file; with `auto` take the shipped or the cached one, or measure this machine now (a minute or two, once).

    Args:
        config: with its scheme resolved.
        model: folder or hub name of the policy.
        logprobs: per sampled token that rollouts ask for: measuring includes them.

    Returns:
        None where the mode or `none` wants no calibration.

    Raises:
        SelfSpecError: the file is bad or for another machine, model, scheme or tensor-parallel size; or measuring failed.
    """
    if config.mode not in CALIBRATED_MODES or config.calibration == "none":
        return None
    from calib.automatic import calibrate_this_machine
    from calib.device import device_name, read_model_config

    if config.calibration == "auto":
        return calibration_file.load(calibrate_this_machine(model, config.quant, tensor_parallel_size, logprobs))
    return calibration_of_file(config, device_name(), read_model_config(model), tensor_parallel_size)


def calibration_of_file(config: SelfSpecConfig, device: str, model_config: Mapping[str, Any], tensor_parallel_size: int) -> Calibration:
    """The file that `--self-spec.calibration` names. Raises SelfSpecError when it is bad or for something else."""
    try:
        chosen = calibration_file.load(config.calibration)
    except SelfSpecError as error:
        raise SelfSpecError(f"--self-spec.calibration: {error}") from error
    calibration_file.check_matches(
        chosen, device=device, model_config=model_config, quant=config.quant, tensor_parallel_size=tensor_parallel_size
    )
    return chosen
