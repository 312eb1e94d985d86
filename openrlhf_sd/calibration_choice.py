"""Which calibration a run decides by: `--self-spec.calibration` FILE, auto or none."""

from __future__ import annotations

from openrlhf_sd import calibration as calibration_file
from openrlhf_sd.calibration import Calibration
from openrlhf_sd.config import CALIBRATED_MODES, SelfSpecConfig, SelfSpecError


def choose_calibration(config: SelfSpecConfig, model: str, tensor_parallel_size: int) -> Calibration | None:
    """Load and check the file; with `auto` take the shipped or the cached one, or measure this machine now (a minute or two, once).

    Args:
        config: with its scheme resolved.
        model: folder or hub name of the policy.

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
        return calibration_file.load(calibrate_this_machine(model, config.quant, tensor_parallel_size))
    try:
        chosen = calibration_file.load(config.calibration)
    except SelfSpecError as error:
        raise SelfSpecError(f"--self-spec.calibration: {error}") from error
    calibration_file.check_matches(
        chosen,
        device=device_name(),
        model_config=read_model_config(model),
        quant=config.quant,
        tensor_parallel_size=tensor_parallel_size,
    )
    return chosen
