"""Fit the cost model's terms to a sweep.

    python -m calib.fit --sweep S.csv --model-config DIR_OR_JSON --out CAL.json [--prior CAL.json] [--exclude-contaminated]

Least squares on logarithms (a relative error counts the same in a step of 5 and of 50 ms), with a loss that stops growing for timings far
off, and every term held to its starting point by a spread (calib/term_priors.py): what the timings do not determine stays there. With
`--prior`, another model's calibration on the same machine, the spreads are narrow and two dozen timings suffice
(calib/few_shot.py says which). Takes seconds on one core.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import math
import sys
from collections.abc import Iterable, Sequence

import numpy as np
from scipy.optimize import least_squares

from calib.accuracy import prediction_pairs, score
from calib.command_line import CommandParser, number
from calib.contamination import contaminated
from calib.fit_provenance import fit_provenance
from calib.model_config import read_model_config
from calib.sweep_csv import Sweep, Timing, read_sweep
from calib.term_priors import PUBLISHED_DEVICE, priors, starting_terms
from openrlhf_sd.calibration import Calibration, load
from openrlhf_sd.config import QUANT_SCHEMES, SelfSpecError
from openrlhf_sd.policy.cost_model import CostModel, Terms
from openrlhf_sd.policy.model_constants import ModelConstants, model_constants

PUBLISHED_QUANT = "w4"
"""The published sweeps do not say; the method's drafter is."""

FITTED_KINDS = ("target", "draft", "verify", "cycle")

GPU_TIMING_SPREAD = 0.01
CPU_TIMING_SPREAD = 0.04
"""A good timing's standard deviation from the form, relative: noise, and kernels that the form does not know."""

INDEPENDENT_TIMINGS = 50
"""Neighbouring timings err alike, in the kernels that the form does not know: a whole sweep counts as so many."""

OUTLIER_SPREADS = 2.0
"""From so many spreads on a timing's pull fades (Cauchy loss)."""

CASCADE_MIN_CONTEXTS = (256.0, 257.0)
"""With a BOS token a prompt of 256 shares the 256 tokens that vLLM's cascade needs; without one it does not."""

SWITCHES = (1.0, 50.0)
"""CPUs: the fit starts without and with a jump from one row to many, and the better end is taken; there is a valley between."""

MAX_LOG_CHANGE = 6.0


def main(argv: Sequence[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        args = _parser().parse_args(argv)
        sweep = read_sweep(args.sweep)
        prior = load(args.prior) if args.prior else None
        calibration, fitted_on = calibrate(sweep, read_model_config(args.model_config), args, argv, prior)
        calibration.save(args.out)
    except (SelfSpecError, OSError) as error:
        print(f"calib.fit: {error}", file=sys.stderr)
        return 2
    print(f"{args.out}: {calibration.describe()}; predicts for {calibration.cost_model.prompts} prompts")
    print(f"errors on the {len(fitted_on.timings)} times that it was fitted on (calib.validate scores others):")
    for kind, error in score(prediction_pairs(calibration.cost_model, fitted_on)).mape.items():
        print(f"  {kind:7s} {error:6.2%}")
    return 0


def calibrate(
    sweep: Sweep, model_config: dict, args: argparse.Namespace, argv: Sequence[str], prior: Calibration | None
) -> tuple[Calibration, Sweep]:
    """(calibration, the sweep without what was left out of the fit).

    Args:
        args: quant, tensor_parallel_size (None: what the sweep says, w4 and 1 if it does not) and exclude_contaminated.

    Raises:
        SelfSpecError: the prior is of another machine or drafter, the arguments contradict the sweep, or it cannot be fitted.
    """
    quant = _agreed("--quant", args.quant, sweep.quant, PUBLISHED_QUANT)
    ranks = _agreed("--tensor-parallel-size", args.tensor_parallel_size, sweep.tensor_parallel_size, 1)
    device = sweep.device or PUBLISHED_DEVICE
    if prior is not None and (prior.device, prior.quant, prior.tensor_parallel_size) != (device, quant, ranks):
        raise SelfSpecError(
            f"--prior: {prior.describe()}, the sweep is of drafter {quant}, TP {ranks}, on {device}; give one of the same, or none"
        )
    timings = tuple(timing for timing in sweep.timings if timing.kind in FITTED_KINDS)
    if args.exclude_contaminated:
        bad = contaminated(timings, sweep.distinct_prompts)
        timings = tuple(timing for timing in timings if timing not in bad)
    fitted_on = dataclasses.replace(sweep, timings=timings)
    cost_model = fit(fitted_on, model_constants(model_config, ranks), quant, prior.cost_model if prior else None)
    few = prior is not None and len(timings) <= INDEPENDENT_TIMINGS
    calibration = Calibration(
        kind="few-shot" if few else "fitted",
        device=device,
        model=sweep.model,
        quant=quant,
        tensor_parallel_size=ranks,
        # The file is for rollouts; what scores it against a sweep asks for that sweep's regime.
        cost_model=cost_model.under("distinct"),
        provenance=fit_provenance(argv, sweep),
    )
    return calibration, fitted_on


def fit(sweep: Sweep, constants: ModelConstants, quant: str, prior: CostModel | None = None) -> CostModel:
    """The cost model of `constants` on the sweep's machine, predicting for the sweep's own regime of prompts.

    Args:
        prior: another model's fit on the same machine, or none.

    Raises:
        SelfSpecError: there is no timing of a plain decode step in the sweep, or of drafting.
    """
    groups = _groups(sweep.timings)
    for kind, what in (("target", "plain decode step"), ("verify", "verify step"), ("draft", "draft step")):
        if kind not in groups:
            raise SelfSpecError(f"{sweep.path}: no {what} in it; measure it with calib.sweep")
    start = CostModel(constants, quant, starting_terms(sweep.device, quant), sweep.prompts)
    if prior is None:
        start = dataclasses.replace(start, terms=starting_terms(sweep.device, quant, _speed(start, groups)))
    else:
        start = dataclasses.replace(start, terms=prior.terms)
    contexts = (start.terms.cascade_min_context,) if sweep.distinct_prompts else CASCADE_MIN_CONTEXTS
    switches = SWITCHES if prior is None and not start.terms.compute_units else (1.0,)
    fits = []
    for context, switch in itertools.product(contexts, switches):
        terms = dataclasses.replace(
            start.terms, cascade_min_context=context, gemm_switch_s_per_byte=switch * start.terms.gemm_switch_s_per_byte
        )
        fits.append(_fit_from(dataclasses.replace(start, terms=terms), groups, prior is not None, sweep.engine_per_gamma))
    return min(fits, key=lambda found: found[0])[1]


def _fit_from(start: CostModel, groups, on_same_machine: bool, engine_per_gamma: bool) -> tuple[float, CostModel]:
    """(loss, model)."""
    table = priors(start.terms.compute_units)
    names = list(table)
    spreads = np.array([prior.spread_on_same_machine if on_same_machine else prior.spread for prior in table.values()])

    def model_at(logs) -> CostModel:
        moved = {name: _moved(start.terms, name, log) for name, log in zip(names, logs * spreads, strict=True)}
        return dataclasses.replace(start, terms=dataclasses.replace(start.terms, **moved))

    def residuals(logs):
        return np.concatenate([weight * _log_errors(model_at(logs), groups, engine_per_gamma) / spread, logs])

    num_timings = sum(len(columns[0]) for columns in groups.values())
    spread = GPU_TIMING_SPREAD if start.terms.compute_units else CPU_TIMING_SPREAD
    weight = math.sqrt(min(1.0, INDEPENDENT_TIMINGS / num_timings))

    def loss(squares):
        # Rows: value, first and second derivative. Timings get Cauchy's loss, the priors stay quadratic.
        scaled = squares[:num_timings] / (weight * OUTLIER_SPREADS) ** 2
        value, slope, curvature = squares.copy(), np.ones_like(squares), np.zeros_like(squares)
        value[:num_timings] = (weight * OUTLIER_SPREADS) ** 2 * np.log1p(scaled)
        slope[:num_timings] = 1 / (1 + scaled)
        curvature[:num_timings] = -1 / (1 + scaled) ** 2 / (weight * OUTLIER_SPREADS) ** 2
        return np.stack([value, slope, curvature])

    limit = MAX_LOG_CHANGE / spreads
    found = least_squares(residuals, np.zeros(len(names)), loss=loss, bounds=(-limit, limit), max_nfev=60)
    return float(found.cost), model_at(found.x)


def _moved(terms: Terms, name: str, log: float) -> float:
    value = getattr(terms, name)
    if name.endswith("exponent"):
        return 1 + (value - 1) * math.exp(log)  # an exponent below 1 is no roofline
    return value * math.exp(log)


def _groups(timings: Iterable[Timing]) -> dict[str, np.ndarray]:
    """kind -> array of (4, timings): batch, context, gamma, seconds."""
    timings = list(timings)
    columns = {
        kind: np.array([(t.batch, t.context, t.gamma, t.seconds) for t in timings if t.kind == kind], dtype=float).T
        for kind in FITTED_KINDS
    }
    return {kind: found for kind, found in columns.items() if found.size}


def _predicted(model: CostModel, kind: str, batch, context, gamma, engine_per_gamma: bool):
    built_for = gamma if engine_per_gamma else None
    if kind == "target":
        return model.target_step_s(batch, context)
    if kind == "draft":
        return model.draft_step_s(batch, context, built_for)
    if kind == "verify":
        return model.verify_step_s(batch, context, gamma)
    return gamma * model.draft_step_s(batch, context, built_for) + model.verify_step_s(batch, context, gamma)


def _log_errors(model: CostModel, groups, engine_per_gamma: bool) -> np.ndarray:
    errors = []
    for kind, (batch, context, gamma, seconds) in groups.items():
        errors.append(np.log(_predicted(model, kind, batch, context, gamma, engine_per_gamma) / seconds))
    return np.concatenate(errors)


def _speed(start: CostModel, groups) -> float:
    """How many times as fast as the starting point this machine is, by its plain steps at the smallest batch."""
    targets = groups["target"]
    smallest = targets[:, targets[0] == targets[0].min()]
    return math.exp(np.median(_log_errors(start, {"target": smallest}, engine_per_gamma=False)))


def _agreed(flag: str, given, measured, otherwise):
    if given is not None and measured is not None and given != measured:
        raise SelfSpecError(f"{flag}: {given} contradicts the sweep, which was measured with {measured}; drop the flag")
    return given if given is not None else measured if measured is not None else otherwise


def _parser() -> CommandParser:
    parser = CommandParser("calib.fit", __doc__)
    parser.add_argument("--sweep", required=True, metavar="S.csv", help="written by calib.sweep, or a published one")
    parser.add_argument("--model-config", required=True, metavar="DIR_OR_JSON", help="the model's config.json or its folder")
    parser.add_argument("--out", required=True, metavar="CAL.json")
    parser.add_argument("--prior", metavar="CAL.json", help="another model's calibration on the same machine; makes few timings suffice")
    parser.add_argument("--exclude-contaminated", action="store_true", help="leave out timings by the rule of calib/contamination.py")
    parser.add_argument("--quant", choices=QUANT_SCHEMES, help="drafter, if the sweep does not say; default w4")
    parser.add_argument("--tensor-parallel-size", type=number(int, 1, 1024), help="if the sweep does not say; default 1")
    return parser


if __name__ == "__main__":
    sys.exit(main())
