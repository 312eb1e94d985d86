"""All policies on a grid of acceptances and length distributions, simulated on measured sweeps, and checks of `auto`.

    python -m calib.simulate_grid --model SWEEP.csv CONFIG.json GAMMA [--model ...] --jobs 2 > table.md

Per model: a sweep, the model's config.json (for the cost model that the policies are given, fitted on that sweep) and the gamma of `fixed`
and `toggle`. Each cell is `python -m openrlhf_sd.simulator` with its defaults otherwise: 8 engines, 128 requests each, 6 rollouts.
Printed: rollout time saved against plain vLLM, mean over seeds, over the rollouts after the first; Markdown.

Checks: auto saves at least what adaptive does; at least 90% of what the oracle does where that is more than 3%; and no seed is more than
0.5% slower than plain vLLM, in the first rollout neither. The last holds for auto without a calibration too, and in heavy tails from
acceptance 0.90 on it saves at least 70% of what auto does. Exit code 1 if a cell fails one.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from calib.command_line import CommandParser, number, numbers
from openrlhf_sd.config import SelfSpecConfig, SelfSpecError
from openrlhf_sd.policy.cost_model import CostModel
from openrlhf_sd.simulation.acceptance import acceptance_process
from openrlhf_sd.simulation.lengths import length_source
from openrlhf_sd.simulation.rollouts import ORACLE, RandomInputs, simulate_seed, summary
from openrlhf_sd.simulation.step_times import StepTimes
from openrlhf_sd.simulation.sweep_truth import costs_of_sweep, true_step_times

ACCEPTANCES = (0.80, 0.85, 0.90, 0.94, 0.97, 0.985)
TAILS = {"light": "lognormal:700,1.0,8192", "heavy": "lognormal:1500,1.0,8192"}
"""Longest response as in the paper's experiments; means of the uncut distribution."""

MODES = ("fixed", "toggle", "adaptive", "auto")
UNCALIBRATED = "auto without"
ENGINES, BATCH, PROMPT_TOKENS, ROLLOUTS = 8, 128, 512, 6

ORACLE_SHARE, ORACLE_MATTERS, SLOWER_AT_MOST = 0.9, 0.03, 0.005
UNCALIBRATED_SHARE, UNCALIBRATED_TAIL, UNCALIBRATED_FROM = 0.7, "heavy", 0.9


@dataclass(frozen=True)
class Model:
    name: str
    times: StepTimes
    costs: CostModel
    gamma: int


@dataclass(frozen=True)
class Cell:
    model: int
    tail: str
    acceptance: float


def main(argv: Sequence[str] | None = None) -> int:
    try:
        args = _parser().parse_args(argv)
        models = [_read_model(*given) for given in args.model]
    except SelfSpecError as error:
        print(f"calib.simulate_grid: {error}", file=sys.stderr)
        return 2
    cells = [Cell(m, tail, a) for m in range(len(models)) for tail in args.tails for a in args.acceptances]
    results = simulate_cells(models, cells, args)
    if args.json is not None:
        rows = [{"model": models[cell.model].name, **vars(cell), "policies": found} for cell, found in results.items()]
        args.json.write_text(json.dumps(rows, indent=1) + "\n")
    for line in markdown(models, results):
        print(line)
    return 1 if any(failures(cell, found) for cell, found in results.items()) else 0


def _read_model(sweep_path: str, config: str, gamma: str) -> Model:
    sweep, times = true_step_times(Path(sweep_path), BATCH)
    if not gamma.isdecimal():
        raise SelfSpecError(f"--model: the third value is the gamma of fixed and toggle; {gamma!r} is no whole number")
    SelfSpecConfig(mode="fixed", gamma=int(gamma))
    return Model(sweep.model, times, costs_of_sweep(sweep, Path(config)), int(gamma))


def simulate_cells(models: Sequence[Model], cells: Sequence[Cell], args: Any) -> dict[Cell, dict[str, Any]]:
    """Summary of each policy per cell, with a progress bar on standard error."""
    from rich.console import Console
    from rich.progress import Progress

    by_cell: dict[Cell, dict[int, Any]] = {cell: {} for cell in cells}
    with ProcessPoolExecutor(args.jobs) as pool, Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("simulating cells", total=len(cells) * args.seeds)
        futures = {
            pool.submit(_simulate, models[cell.model], cell, seed, args.noise): (cell, seed) for cell in cells for seed in range(args.seeds)
        }
        for future in as_completed(futures):
            cell, seed = futures[future]
            by_cell[cell][seed] = future.result()
            progress.advance(task)
    return {
        cell: {name: summary([by_seed[seed][name] for seed in sorted(by_seed)]) for name in (*MODES, UNCALIBRATED, ORACLE)}
        for cell, by_seed in by_cell.items()
    }


def _simulate(model: Model, cell: Cell, seed: int, noise: float) -> dict[str, Any]:
    def config(mode: str) -> SelfSpecConfig:
        return SelfSpecConfig(mode=mode, gamma=SelfSpecConfig.ladder[0] if mode == "adaptive" else model.gamma)

    process = acceptance_process(str(cell.acceptance))
    inputs = RandomInputs(length_source(TAILS[cell.tail]), process, ENGINES, BATCH, PROMPT_TOKENS)
    policies = [(mode, config(mode)) for mode in MODES] + [(ORACLE, None)]
    common = {"seed": seed, "num_rollouts": ROLLOUTS, "noise": noise}
    uncalibrated = simulate_seed([("auto", config("auto"))], inputs, model.times, None, **common)
    return simulate_seed(policies, inputs, model.times, model.costs, **common) | {UNCALIBRATED: uncalibrated["auto"]}


def failures(cell: Cell, found: dict[str, Any]) -> list[str]:
    """What `auto` misses in a cell, in words."""
    saved = {name: found[name]["reduction_after_first"]["mean"] for name in found}
    missed = []
    if saved["auto"] < saved["adaptive"]:
        missed.append("under adaptive")
    if saved[ORACLE] > ORACLE_MATTERS and saved["auto"] < ORACLE_SHARE * saved[ORACLE]:
        missed.append(f"under {ORACLE_SHARE:.0%} of oracle")
    for name in ("auto", UNCALIBRATED):
        lowest = min(found[name][when]["low"] for when in ("reduction_after_first", "reduction_first"))
        if lowest < -SLOWER_AT_MOST:
            missed.append(f"{name} {-lowest:.1%} slower than plain")
    must_save = cell.tail == UNCALIBRATED_TAIL and cell.acceptance >= UNCALIBRATED_FROM
    if must_save and saved[UNCALIBRATED] < UNCALIBRATED_SHARE * saved["auto"]:
        missed.append(f"{UNCALIBRATED} under {UNCALIBRATED_SHARE:.0%} of auto")
    return missed


def markdown(models: Sequence[Model], results: dict[Cell, dict[str, Any]]) -> Iterator[str]:
    for index, model in enumerate(models):
        yield f"### {model.name}, fixed and toggle at gamma {model.gamma}\n"
        yield (
            "| tail | acceptance | fixed | toggle | adaptive | auto (seeds) | oracle | auto / oracle | auto, first rollout "
            "| auto without a calibration (seeds) | the same, first rollout | missed |"
        )
        yield "|---|---|---|---|---|---|---|---|---|---|---|---|"
        for cell, found in results.items():
            if cell.model == index:
                yield _row(cell, found)
        yield ""
    num_failed = sum(bool(failures(cell, found)) for cell, found in results.items())
    shares = [engine["extrapolated_share"] for found in results.values() for engine in found.values()]
    outside = f"{min(shares):.0%} to {max(shares):.0%}"
    yield f"{len(results)} cells, {num_failed} with a missed check. Steps outside the measured grid: {outside}."


def _row(cell: Cell, found: dict[str, Any]) -> str:
    saved = {name: found[name]["reduction_after_first"] for name in found}
    oracle = saved[ORACLE]["mean"]
    share = f"{saved['auto']['mean'] / oracle:.0%}" if oracle > ORACLE_MATTERS else "-"

    def with_seeds(name: str) -> str:
        return f"{100 * saved[name]['mean']:.1f}% ({100 * saved[name]['low']:.1f} to {100 * saved[name]['high']:.1f})"

    cells = [
        cell.tail,
        f"{cell.acceptance:g}",
        *(f"{100 * saved[mode]['mean']:.1f}%" for mode in ("fixed", "toggle", "adaptive")),
        with_seeds("auto"),
        f"{100 * oracle:.1f}%",
        share,
        f"{100 * found['auto']['reduction_first']['mean']:.1f}%",
        with_seeds(UNCALIBRATED),
        f"{100 * found[UNCALIBRATED]['reduction_first']['mean']:.1f}%",
        "; ".join(failures(cell, found)) or "none",
    ]
    return "| " + " | ".join(cells) + " |"


def _parser() -> CommandParser:
    parser = CommandParser("calib.simulate_grid", __doc__)
    parser.add_argument("--model", nargs=3, action="append", required=True, metavar=("SWEEP", "CONFIG", "GAMMA"), help="may be repeated")
    parser.add_argument("--acceptances", type=numbers(float, 0, 1), default=ACCEPTANCES, help="default: 0.80 to 0.985")
    parser.add_argument("--tails", nargs="+", choices=sorted(TAILS), default=list(TAILS), help=f"of {TAILS}")
    parser.add_argument("--seeds", type=number(int, 1, 1000), default=3, help="seeds 0, 1, ... (default: 3)")
    parser.add_argument("--noise", type=number(float, 0, 1), default=0.03, help="log-standard-deviation of step times (default: 0.03)")
    parser.add_argument("--jobs", type=number(int, 1, 256), default=1, help="processes (default: 1)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all summaries there")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
