"""A sweep file as truth, and as what the policies would have been calibrated with.

Contaminated points (by the rule of calib/contamination.py) are left out of the truth and filled from their neighbours.
"""

from __future__ import annotations

import json
from pathlib import Path

from calib.contamination import contaminated
from calib.sweep_csv import Sweep, read_sweep
from openrlhf_sd.config import SelfSpecError
from openrlhf_sd.policy.cost_model import CostModel
from openrlhf_sd.policy.model_constants import model_constants
from openrlhf_sd.simulation.step_times import StepTimes, from_timings

PUBLISHED_QUANT = "w4"
"""The published sweeps do not say; the paper's drafter is W4."""


def true_step_times(path: Path, max_batch: int) -> tuple[Sweep, StepTimes]:
    """Raises SelfSpecError as `read_sweep` and `from_timings` do."""
    sweep = read_sweep(path)
    left_out = contaminated(sweep.timings, sweep.distinct_prompts)
    timings = [timing for timing in sweep.timings if timing not in left_out]
    return sweep, from_timings(timings, max_batch, off_costs_target_sd=sweep.distinct_prompts, source=str(path))


def costs_of_sweep(sweep: Sweep, model_config: Path) -> CostModel:
    """The calibration that a user of this sweep would have. Raises SelfSpecError."""
    from calib.fit import fit

    path = model_config / "config.json" if model_config.is_dir() else model_config
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise SelfSpecError(f"--model-config: cannot read {path} ({error}); give a model's config.json or its folder") from None
    return fit(sweep, model_constants(config, sweep.tensor_parallel_size or 1), sweep.quant or PUBLISHED_QUANT)
