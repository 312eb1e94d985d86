"""Where speculation is predicted to pay: the run's own policy objects, asked over batch and context at assumed acceptances.

Step times come from, first found:

    1. the file of --self-spec.calibration,
    2. the calibration shipped for this GPU, model, drafter and tensor-parallel size, or kept from measuring this machine,
    3. a shipped calibration of another model on this GPU, transferred (`calib.transfer`: the machine's terms kept, the model's counted
       anew),
    4. the same of a GPU with the same chip, its memory bandwidth scaled by the data sheets' ratio.

There is no fifth. An A100's times are not scaled to an H100 or B200 by peak figures: which share of its peaks a kernel reaches is what a
calibration measures; the w4 drafter runs on another kernel there, with other stairs; and launches, which do not get shorter with the
peaks, are a third of a 7B model's draft step on an A100 already (by its fit) and would decide the sign. Chips that differ in their memory
alone differ in one term, the bandwidth.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from calib.transfer import transfer
from openrlhf_sd import calibration as calibration_file
from openrlhf_sd.calibration import KINDS, Calibration
from openrlhf_sd.calibration_choice import calibration_of_file
from openrlhf_sd.config import CALIBRATED_MODES, SelfSpecConfig
from openrlhf_sd.gpus import GPUS, Gpu, same_chip
from openrlhf_sd.policy.auto import MIN_GAIN
from openrlhf_sd.policy.controller import Controller, make_controller
from openrlhf_sd.policy.model_constants import model_constants
from openrlhf_sd.policy.observation import RolloutAcceptance, StepObservation
from openrlhf_sd.policy.speedup import StepCosts, geometric_acceptance_length, speedup

ACCEPTANCES = (0.85, 0.90, 0.95)
"""Assumed probabilities that a draft token is accepted. The paper's runs lie within; a run's own are in metrics.jsonl."""

TABLE_ACCEPTANCE = 0.90
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128)
CONTEXTS = (512, 1024, 2048, 4096, 8192, 16384, 32768)
"""And --data.max_len, in the place of what lies just below it."""

SETTLING_ROLLOUTS = 64
"""Rollouts at a constant acceptance after which the ladder stands still: four rungs take `patience` each."""


@dataclass(frozen=True)
class StepTimes:
    """A calibration to predict with, and what to say of it."""

    calibration: Calibration
    origin: str
    role: str
    """What the run itself will do with them."""


@dataclass(frozen=True)
class Cell:
    batch: int
    context: int
    gamma: int
    speedup: float
    pays: bool
    """The run's policy speculates there; `fixed`, which always does, does not lose there."""
    fits: bool
    """So many tokens fit into the KV cache at once."""


@dataclass(frozen=True)
class SwitchOn:
    """The largest batch at which speculation pays in a rollout that shrinks, and its gamma; 0 and 0 where it never does."""

    acceptance: float | None
    """None: the first rollout of a run, before any acceptance is known."""
    context: int
    batch: int
    gamma: int


@dataclass(frozen=True)
class Region:
    origin: str
    role: str
    measured_range: str | None
    cells: tuple[Cell, ...]
    switch_on: tuple[SwitchOn, ...]


def find_step_times(
    config: SelfSpecConfig, model_config: dict[str, Any], model: str, device: str, tensor_parallel_size: int, logprobs: int, is_here: bool
) -> StepTimes | None:
    """Args:
        config: with its scheme resolved.
        device: as calibrations call it.
        logprobs: per sampled token that the run asks for.
        is_here: it is this machine, which may have been measured.

    Raises:
        SelfSpecError: the file that --self-spec.calibration names is bad or for something else.
    """
    decided_by = role(config, decides=True)
    if config.calibration not in ("auto", "none"):
        chosen = calibration_of_file(config, device, model_config, tensor_parallel_size)
        return StepTimes(chosen, f"{config.calibration}: {chosen.describe()}", decided_by)
    identity = {"quant": config.quant, "tensor_parallel_size": tensor_parallel_size}
    shipped = calibration_file.shipped(device=device, model_config=model_config, **identity)
    if shipped is not None:
        return StepTimes(shipped, f"shipped: {shipped.describe()}", decided_by)
    if is_here:
        # Asks the machine for its name and versions.
        from calib.automatic import kept_calibration

        kept = kept_calibration(model_config, **identity, logprobs=logprobs)
        if kept is not None:
            return StepTimes(kept, f"measured on this machine before: {kept.describe()}", decided_by)
    for gpu in (None, *same_chip(device)):
        source = _nearest_model(gpu.device if gpu else device, model_config, **identity)
        if source is not None:
            moved = transfer(source, model_config, model, argv=())
            origin = f"transferred from {source.model}, {source.kind} on {source.device}; this model was not measured"
            if gpu is not None:
                moved, ratio = _with_bandwidth_of(moved, gpu, device)
                origin += (
                    f"; bandwidth scaled by {ratio:.2f}, the data sheets' ratio to this GPU of the same chip, which was not measured either"
                )
            return StepTimes(moved, origin, role(config, decides=False))
    return None


def role(config: SelfSpecConfig, decides: bool) -> str:
    """What step times are to the run; `decides`: it has exactly these."""
    if config.mode not in CALIBRATED_MODES:
        return f"{config.mode} needs no step times"
    if config.calibration == "none":
        return f"{config.mode} learns step times from its own steps (--self-spec.calibration none)"
    return "the run decides by these" if decides else "the run measures its own machine first, once, and decides by that"


def _nearest_model(device: str, model_config: dict[str, Any], quant: str, tensor_parallel_size: int) -> Calibration | None:
    """The shipped calibration of this device and drafter, of the best kind and then nearest in size."""
    size = model_constants(model_config, tensor_parallel_size).layers_parameters
    found = [
        calibration
        for calibration in map(calibration_file.load, calibration_file.shipped_paths())
        if (calibration.device, calibration.quant, calibration.tensor_parallel_size) == (device, quant, tensor_parallel_size)
    ]
    return min(
        found,
        key=lambda calibration: (KINDS.index(calibration.kind), abs(calibration.constants.layers_parameters / size - 1)),
        default=None,
    )


def _with_bandwidth_of(calibration: Calibration, source: Gpu, device: str) -> tuple[Calibration, float]:
    target = next(gpu for gpu in GPUS.values() if gpu.device == device)
    ratio = target.bandwidth_bytes_per_s / source.bandwidth_bytes_per_s
    costs = calibration.cost_model
    terms = dataclasses.replace(costs.terms, stream_bytes_per_s=costs.terms.stream_bytes_per_s * ratio)
    return dataclasses.replace(calibration, device=device, cost_model=dataclasses.replace(costs, terms=terms)), ratio


def predict_region(config: SelfSpecConfig, times: StepTimes, requests_at_once: int, longest_tokens: int, kv_tokens: int) -> Region:
    """Args:
    requests_at_once, longest_tokens: the largest batch and context asked about.
    """
    costs = times.calibration.cost_model
    contexts = _up_to(longest_tokens, CONTEXTS)
    batches = _up_to(requests_at_once, BATCHES)
    cells = []
    for batch in batches:
        for context in contexts:
            gamma, pays = decide(config, costs, batch, context, TABLE_ACCEPTANCE)
            gain = _gain(costs, batch, context, gamma, TABLE_ACCEPTANCE)
            cells.append(Cell(batch, context, gamma, gain, pays, fits=batch * context <= kv_tokens))
    acceptances = (None, *ACCEPTANCES) if config.mode in ("toggle", "adaptive") else ACCEPTANCES
    switch_on = tuple(
        _switch_on(config, costs, range(requests_at_once, 0, -1), context, acceptance) for acceptance in acceptances for context in contexts
    )
    return Region(times.origin, times.role, _measured_range(times.calibration), tuple(cells), switch_on)


def _up_to(largest: int, steps: Iterable[int]) -> list[int]:
    return [*(step for step in steps if 1.25 * step < largest), largest]


def decide(config: SelfSpecConfig, costs: StepCosts, batch: int, context: int, acceptance: float | None) -> tuple[int, bool]:
    """(gamma, whether it pays) of the run's policy in a rollout where it knows `acceptance`, None being the first.

    `auto` is taken at its goal: the gamma of the greatest gain. In a run it counts with the lower bound of what it has measured, and goes
    on a little later.
    """
    if config.mode in ("toggle", "adaptive"):
        controller = _controller_after(config, costs, acceptance)
        pays = controller.next_gamma(StepObservation(num_decodes=batch, mean_context=context)) > 0
        return _gamma_of(controller), pays
    if config.mode == "fixed":
        return config.gamma, _gain(costs, batch, context, config.gamma, acceptance) >= 1
    gains = {gamma: _gain(costs, batch, context, gamma, acceptance) for gamma in range(1, config.gamma_max + 1)}
    best = max(gains, key=gains.__getitem__)
    return best, gains[best] > 1 + MIN_GAIN


def _gain(costs: StepCosts, batch: int, context: int, gamma: int, acceptance: float) -> float:
    return float(speedup(costs, batch, context, gamma, geometric_acceptance_length(acceptance, gamma)))


def _switch_on(config: SelfSpecConfig, costs: StepCosts, batches: Iterable[int], context: int, acceptance: float | None) -> SwitchOn:
    for batch in batches:
        gamma, pays = decide(config, costs, batch, context, acceptance)
        if pays:
            return SwitchOn(acceptance, context, batch, gamma)
    return SwitchOn(acceptance, context, 0, 0)


def _controller_after(config: SelfSpecConfig, costs: StepCosts, acceptance: float | None) -> Controller:
    """The engine's controller after many rollouts at this acceptance, past its ramp-up guard."""
    controller = make_controller(dataclasses.replace(config, ramp_up=0), costs)
    if acceptance is not None:
        num_drafts = 1_000_000
        for _ in range(SETTLING_ROLLOUTS):
            gamma = _gamma_of(controller)
            num_accepted = round(num_drafts * (geometric_acceptance_length(acceptance, gamma) - 1))
            controller.end_rollout(RolloutAcceptance(num_drafts, num_drafts * gamma, num_accepted))
    return controller


def _gamma_of(controller: Controller) -> int:
    return controller.state()["ladder"]["gamma"]


def _measured_range(calibration: Calibration) -> str | None:
    points = calibration.provenance.fitted_points
    if not points:
        return None
    batches, contexts, _ = zip(*points)
    return f"batch {min(batches)} to {max(batches)}, context {min(contexts)} to {max(contexts)}"
