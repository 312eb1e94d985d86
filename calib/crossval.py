"""How well the cost model predicts what it was not fitted on: the tables of docs/calibration.md.

    python -m calib.crossval --sweep A.csv --model-config A.json [--sweep B.csv --model-config B.json]

For every sweep: cross-validation over (batch, context) cells in five folds (a cell's timings all in one fold), and a fit on batches up to
32 scored on larger ones. For two sweeps of one machine, in both directions: transfer without any timing of the new model, and a fit of 24
timings of it (calib/few_shot.py) with the other's fit as the prior, scored on all its other points. Mean absolute percentage errors and the
toggle's sign accuracy at acceptance 0.80 to 0.97; each over clean timings / over all, contaminated ones (calib/contamination.py) included.
The fits see contaminated timings too, unless `--exclude-contaminated`. Prints Markdown.
"""

from __future__ import annotations

import dataclasses
import itertools
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from calib.accuracy import SCORED_KINDS, Pair, prediction_pairs, score
from calib.command_line import CommandParser, number
from calib.contamination import contaminated
from calib.few_shot import few_shot_points
from calib.fit import FITTED_KINDS, PUBLISHED_QUANT, fit
from calib.model_config import read_model_config
from calib.sweep_csv import Sweep, Timing, read_sweep
from openrlhf_sd.config import SelfSpecError
from openrlhf_sd.policy.cost_model import CostModel
from openrlhf_sd.policy.model_constants import ModelConstants, model_constants

NUM_FOLDS = 5
LARGEST_FITTED_BATCH = 32


@dataclass(frozen=True)
class Subject:
    """A sweep with its model, and which of its timings are contaminated."""

    sweep: Sweep
    constants: ModelConstants
    quant: str
    bad: frozenset[Timing]
    exclude_bad: bool

    def fitted(self, timings: Iterable[Timing], prior: CostModel | None = None) -> CostModel:
        kept = tuple(timing for timing in timings if not (self.exclude_bad and timing in self.bad))
        return fit(dataclasses.replace(self.sweep, timings=kept), self.constants, self.quant, prior)

    def pairs(self, cost_model: CostModel, timings: Iterable[Timing]) -> tuple[list[Pair], list[Pair]]:
        """(over clean timings, over all)."""
        timings = tuple(timings)
        clean = tuple(timing for timing in timings if timing not in self.bad)
        of = [prediction_pairs(cost_model, dataclasses.replace(self.sweep, timings=part)) for part in (clean, timings)]
        return of[0], of[1]


def main(argv: Sequence[str] | None = None) -> int:
    try:
        args = _parser().parse_args(argv)
        if len(args.sweep) != len(args.model_config) or len(args.sweep) > 2:
            raise SelfSpecError("--sweep: give one or two, each with its --model-config")
        subjects = [
            load_subject(sweep, config, args.exclude_contaminated) for sweep, config in zip(args.sweep, args.model_config, strict=True)
        ]
        for line in report(subjects, args.seed):
            print(line, flush=True)
    except SelfSpecError as error:
        print(f"calib.crossval: {error}", file=sys.stderr)
        return 2
    return 0


def load_subject(sweep_path: str, config_path: str, exclude_bad: bool) -> Subject:
    sweep = read_sweep(sweep_path)
    sweep = dataclasses.replace(sweep, timings=tuple(timing for timing in sweep.timings if timing.kind in FITTED_KINDS))
    constants = model_constants(read_model_config(config_path), sweep.tensor_parallel_size or 1)
    bad = frozenset(contaminated(sweep.timings, sweep.distinct_prompts))
    return Subject(sweep, constants, sweep.quant or PUBLISHED_QUANT, bad, exclude_bad)


def report(subjects: Sequence[Subject], seed: int) -> Iterable[str]:
    """Lines of Markdown."""
    for subject in subjects:
        cycles = {timing.point for timing in subject.sweep.timings if timing.gamma}
        bad_cycles = {timing.point for timing in subject.bad if timing.gamma}
        yield (
            f"{subject.sweep.model}: {len(subject.bad)} of {len(subject.sweep.timings)} timings contaminated, "
            f"in {len(bad_cycles)} of {len(cycles)} cycles"
        )
    yield ""
    yield "| scored on what the fit did not see | target | draft | verify | cycle | toggle | toggle near 1.05 |"
    yield "|---|---|---|---|---|---|---|"
    for subject in subjects:
        yield _row(f"{subject.sweep.model}, {NUM_FOLDS} folds", cross_validated(subject, seed))
    for subject in subjects:
        yield _row(f"{subject.sweep.model}, batch > {LARGEST_FITTED_BATCH}", extrapolated(subject))
    for source, subject in itertools.permutations(subjects, 2):
        yield _row(f"{source.sweep.model} -> {subject.sweep.model}, no timing", transferred(source, subject))
    for source, subject in itertools.permutations(subjects, 2):
        num_timings, pairs = few_shot(source, subject)
        yield _row(f"{source.sweep.model} -> {subject.sweep.model}, {num_timings} timings", pairs)


def cross_validated(subject: Subject, seed: int) -> tuple[list[Pair], list[Pair]]:
    """Pairs of all folds, each predicted by a fit on the other folds."""
    cells = sorted({(timing.batch, timing.context) for timing in subject.sweep.timings})
    order = np.random.default_rng(seed).permutation(len(cells))
    fold_of = {cells[cell]: place % NUM_FOLDS for place, cell in enumerate(order)}
    clean, every = [], []
    for fold in range(NUM_FOLDS):
        seen, held_out = _split(subject.sweep.timings, lambda t, fold=fold: fold_of[t.batch, t.context] == fold)
        fold_clean, fold_every = subject.pairs(subject.fitted(seen), held_out)
        clean += fold_clean
        every += fold_every
    return clean, every


def extrapolated(subject: Subject) -> tuple[list[Pair], list[Pair]]:
    seen, held_out = _split(subject.sweep.timings, lambda timing: timing.batch > LARGEST_FITTED_BATCH)
    return subject.pairs(subject.fitted(seen), held_out)


def transferred(source: Subject, subject: Subject) -> tuple[list[Pair], list[Pair]]:
    cost_model = dataclasses.replace(source.fitted(source.sweep.timings), constants=subject.constants)
    return subject.pairs(cost_model, subject.sweep.timings)


def few_shot(source: Subject, subject: Subject) -> tuple[int, tuple[list[Pair], list[Pair]]]:
    """(timings used, pairs of all other points)."""
    timings = subject.sweep.timings
    gammas = [timing.gamma for timing in timings if timing.gamma]
    points = set(few_shot_points([timing.batch for timing in timings], [timing.context for timing in timings], gammas))
    held_out, seen = _split(timings, lambda timing: timing.point in points)
    return len(seen), subject.pairs(subject.fitted(seen, source.fitted(source.sweep.timings)), held_out)


def _split(timings: Iterable[Timing], takes) -> tuple[list[Timing], list[Timing]]:
    """(those not taken, those taken)."""
    parts: tuple[list[Timing], list[Timing]] = ([], [])
    for timing in timings:
        parts[takes(timing)].append(timing)
    return parts


def _row(name: str, pairs: tuple[list[Pair], list[Pair]]) -> str:
    clean, every = (score(part) for part in pairs)
    cells = [f"{_percent(clean.mape.get(kind))} / {_percent(every.mape.get(kind))}" for kind in SCORED_KINDS]
    cells.append(f"{_percent(clean.toggle.overall)} / {_percent(every.toggle.overall)}")
    cells.append(f"{_percent(clean.toggle.near_boundary)} / {_percent(every.toggle.near_boundary)}")
    return f"| {name} | {' | '.join(cells)} |"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f}"


def _parser() -> CommandParser:
    parser = CommandParser("calib.crossval", __doc__)
    parser.add_argument("--sweep", required=True, action="append", metavar="S.csv", help="once or twice")
    parser.add_argument("--model-config", required=True, action="append", metavar="DIR_OR_JSON", help="as often, in the same order")
    parser.add_argument("--exclude-contaminated", action="store_true", help="leave contaminated timings out of the fits")
    parser.add_argument("--seed", type=number(int, 0, 2**31), default=0, help="of the folds; default 0")
    return parser


if __name__ == "__main__":
    sys.exit(main())
