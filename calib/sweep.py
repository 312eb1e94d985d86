"""Measure this machine's engine: plain vLLM's decode step; the self-speculating engine's draft step, verify step and cycle.

    python -m calib.sweep --model DIR --out sweep.csv [--quant w4] [--batches 1,4,16] [--seqs 64,512] [--gammas 1,2,3,5] [--quick]

Whole engine steps as a rollout has them: head and sampling included, distinct random prompts, no prefix caching, temperature 1.
Two engines, each in a process of its own, take turns; within a turn the gammas take turns (`calib/sweep_plan.py` says how the
parts of a step are told apart, `openrlhf_sd/engine/step_timing.py` what a step's time holds). On a CPU engines run eagerly, on a
GPU as vLLM runs them by default. Weights may be random: a rejected draft costs what an accepted one does.

Output: one CSV row per (batch, context, gamma), medians in seconds, columns as in `calib/sweep_csv.py`. A row's context is the
one asked for; a bout of steps is centred on it by prompts that are shorter by half of what it adds, and the mean over the
measured steps is within 20% of it, or the sweep ends with an error. Rows are written as soon as their cell is measured; the same
command continues after an interrupt. A draft step that is lost in the noise is left empty and counted.
"""

from __future__ import annotations

import dataclasses
import math
import random
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from calib import sweep_plan
from calib.cell_times import CellTimes
from calib.command_line import CommandParser, number, numbers
from calib.few_shot import few_shot_points
from calib.quick_budget import StepEstimate, within_budget
from calib.sweep_csv import SweepRow, append, read_rows
from calib.sweep_plan import Cell
from calib.taking_turns import TakingTurns
from calib.timing_engine import EngineSettings, TimingEngine
from openrlhf_sd.config import MAX_GAMMA, QUANT_SCHEMES, SelfSpecConfig, SelfSpecError
from openrlhf_sd.drafter_scheme import default_quant
from openrlhf_sd.explain_memory import FP32_BYTES, VERIFY_TENSORS
from openrlhf_sd.path_names import check_names
from openrlhf_sd.policy.model_constants import ModelConstants
from openrlhf_sd.preflight import VLLM_MAX_NUM_SEQS

CELL_S = 4.0
QUICK_CELL_S = 1.5
"""Seconds a cell is measured for at least, once its rounds are done."""

QUICK_BUDGET_S = 75.0
"""For measuring, after the engines have started: with them a quick sweep ends within two minutes."""

RESTLESS_SPREAD = 0.25
"""The median point spread over 8% on a CPU of two cores with some other work on it; medians hold up to a few times that."""

OVERHEAD_BYTES = 2 << 30
"""Per engine, beside weights and KV cache: the processes on a CPU; workspace, activations and CUDA graphs on a GPU."""


@dataclass(frozen=True)
class Setting:
    """What all rows of a file have in common."""

    device: str
    model: str
    quant: str
    tensor_parallel_size: int
    vllm: str
    prompts: str = "distinct"
    logprobs: int = 0


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 2 on bad input or an engine that fails, 130 on Ctrl-C."""
    try:
        args = _parser().parse_args(argv)
        return sweep(args)
    except SelfSpecError as error:
        print(f"calib.sweep: {str(error).removeprefix('calib.sweep: ')}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("calib.sweep: interrupted; the same command continues where it was", file=sys.stderr)
        return 130


def sweep(args: Any) -> int:
    from rich.console import Console

    from calib.device import device_name, has_gpu, read_model_config
    from openrlhf_sd.engine.compat import installed_version
    from openrlhf_sd.model_support import check_model, check_weights
    from openrlhf_sd.policy.model_constants import model_constants

    # No markup: names of files and models are printed.
    console = Console(markup=False) if sys.stdout.isatty() else Console(markup=False, width=120)
    check_names(args.out, "--out")
    config = read_model_config(args.model)
    check_model(config, "--model")
    check_weights(args.model, "--model")
    constants = model_constants(config, args.tensor_parallel_size)
    vllm = installed_version("vllm")
    if vllm is None:
        raise SelfSpecError("vllm: is not installed here; install with `bash examples/setup.sh` and use its Python")
    setting = Setting(
        device=device_name(),
        model=Path(args.model).resolve().name,
        quant=args.quant,
        tensor_parallel_size=args.tensor_parallel_size,
        vllm=vllm,
        logprobs=args.logprobs,
    )
    max_positions = config.get("max_position_embeddings") or 1 << 20
    cells = planned_cells(args, has_gpu(), max_positions)
    sweep_plan.check_fits(cells, max_positions)
    done = measured_points(args.out, setting)
    wanted = points_of(cells)
    if wanted & done:
        console.print(f"{args.out}: {len(wanted & done)} of {len(wanted)} points are there already and are not measured again")
    missing = missing_cells(cells, done)
    if missing:
        missing = cells_in_memory(missing, constants, setting, is_asked_for=bool(args.batches or args.seqs), console=console)
        measure(args, setting, constants.kv_bytes_per_token, missing, done, console)
        console.print(f"{args.out}: {len(measured_points(args.out, setting) - done)} points measured")
    return 0


def points_of(cells: Sequence[Cell]) -> set[tuple[int, int, int]]:
    return {(cell.batch, cell.context, gamma) for cell in cells for gamma in (0, *cell.gammas)}


def planned_cells(args: Any, on_gpu: bool, max_positions: int) -> list[Cell]:
    """The cells that flags and platform ask for; default contexts are capped by the model's positions, given ones are not."""
    if args.quick and (args.batches or args.seqs or args.gammas):
        raise SelfSpecError("--quick: chooses batches, contexts and gammas itself; drop it, or --batches, --seqs and --gammas")
    batches = args.batches or (sweep_plan.GPU_BATCHES if on_gpu else sweep_plan.CPU_BATCHES)
    contexts = args.seqs or (sweep_plan.GPU_CONTEXTS if on_gpu else sweep_plan.CPU_CONTEXTS)
    if args.quick:
        gammas = sweep_plan.QUICK_GPU_GAMMAS if on_gpu else sweep_plan.QUICK_CPU_GAMMAS
        cells = sweep_plan.quick_cells(few_shot_points(batches, contexts, gammas), gammas)
        return sweep_plan.capped(cells, max_positions)
    gammas = args.gammas or (sweep_plan.GPU_GAMMAS if on_gpu else sweep_plan.CPU_GAMMAS)
    if args.seqs:
        return sweep_plan.grid(batches, args.seqs, gammas)
    return sweep_plan.capped(sweep_plan.grid(batches, contexts, gammas), max_positions)


def cells_in_memory(cells: Sequence[Cell], constants: ModelConstants, setting: Setting, is_asked_for: bool, console: Any) -> list[Cell]:
    """Cells of the default grids that memory does not allow are left out, and said so.

    Raises:
        SelfSpecError: not even the weights fit, or a cell that was asked for does not.
    """
    from calib.device import free_bytes, has_gpu

    policy_bytes, drafter_bytes = constants.policy_bytes, constants.drafter_bytes(setting.quant)
    gamma_max = max(gamma for cell in cells for gamma in cell.gammas)
    # A self-speculating engine takes these when it starts, on a GPU; one on a CPU does not profile.
    drafts_bytes = VERIFY_TENSORS * FP32_BYTES * max_num_seqs(cells) * gamma_max * constants.vocab_size if has_gpu() else 0
    free = free_bytes(setting.tensor_parallel_size)
    budget = (free - 2 * policy_bytes - drafter_bytes - drafts_bytes - 2 * OVERHEAD_BYTES) / 2
    fitting = [cell for cell in cells if cell.kv_tokens * constants.kv_bytes_per_token <= budget]
    if len(fitting) == len(cells):
        return fitting
    largest = max(cells, key=lambda cell: cell.kv_tokens)
    need = largest.kv_tokens * constants.kv_bytes_per_token
    shortage = (
        f"batch {largest.batch} at context {largest.context} needs {need / 2**30:.1f} GiB of KV cache in each of two engines; "
        f"{free / 2**30:.1f} GiB are free, which leaves {max(0.0, budget) / 2**30:.1f} GiB for each "
        f"beside {policy_bytes / 2**30:.1f} GiB of weights"
        + (f" and, in one of them, {drafts_bytes / 2**30:.1f} GiB to verify the longest drafts in" if drafts_bytes else "")
    )
    if is_asked_for or not fitting:
        raise SelfSpecError(f"--batches, --seqs: {shortage}; give smaller ones, or free memory")
    console.print(f"{len(cells) - len(fitting)} of {len(cells)} cells are left out for want of memory: {shortage}")
    return fitting


def max_num_seqs(cells: Sequence[Cell]) -> int:
    """A rollout engine's, unless a cell asks for more: CUDA graphs are captured, and so batches padded, by it."""
    return max(VLLM_MAX_NUM_SEQS, *(cell.batch for cell in cells))


def measured_points(out: Path, setting: Setting) -> set[tuple[int, int, int]]:
    """(batch, context, gamma) that `out` holds.

    Raises:
        SelfSpecError: `out` is of another machine, model or drafter, or no sweep of ours, or cannot be written.
    """
    if not out.parent.is_dir():
        raise SelfSpecError(f"--out: no folder {out.parent}; make it first")
    if not out.exists() or out.stat().st_size == 0:
        return set()
    rows = read_rows(out)
    for field in dataclasses.fields(setting):
        theirs, ours = getattr(rows[0], field.name), getattr(setting, field.name)
        if theirs != ours:
            raise SelfSpecError(f"--out: {out} is a sweep with {field.name} {theirs!r}, this one has {ours!r}; name another file")
    return {(row.batch, row.context, row.gamma) for row in rows}


def missing_cells(cells: Sequence[Cell], done: set[tuple[int, int, int]]) -> list[Cell]:
    """Cells that are not all in `done`, each with the gammas that are missing; at least one, because without there is nothing to play."""
    missing = []
    for cell in cells:
        gammas = tuple(gamma for gamma in cell.gammas if (cell.batch, cell.context, gamma) not in done)
        if gammas or (cell.batch, cell.context, 0) not in done:
            missing.append(dataclasses.replace(cell, gammas=gammas or cell.gammas[:1]))
    return missing


def measure(
    args: Any, setting: Setting, kv_bytes_per_token: int, cells: Sequence[Cell], done: set[tuple[int, int, int]], console: Any
) -> None:
    """Start both engines, measure the cells in a random order, append their rows."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    gamma_max = max(gamma for cell in cells for gamma in cell.gammas)
    settings = EngineSettings(
        model=args.model,
        drafter=None,
        tensor_parallel_size=setting.tensor_parallel_size,
        max_model_len=max(cell.request_tokens for cell in cells),
        kv_cache_bytes=max(cell.kv_tokens for cell in cells) * kv_bytes_per_token,
        max_num_seqs=max_num_seqs(cells),
        logprobs=setting.logprobs,
    )
    drafter = SelfSpecConfig(mode="fixed", gamma=gamma_max, quant=setting.quant, calibration="none")
    # Whatever order batch and context rise in, the machine's drift must not rise with them.
    cells = random.Random(0).sample(cells, len(cells))
    num_lost = 0
    spreads = []
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TextColumn("so far, to go:"), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("starting two engines", total=None)
        with running(settings, dataclasses.replace(settings, drafter=drafter), args.out) as (plain, self_spec):
            progress.update(task, description="warming up")
            taking_turns = TakingTurns(plain, self_spec, QUICK_CELL_S if args.quick else CELL_S)
            step_seconds = taking_turns.warm_up(cells)
            if args.quick:
                cells = cells_in_time(cells, step_seconds, done, console)
            progress.update(task, total=sum(map(_weight, cells)))
            finished = 0.0
            for cell in cells:
                progress.update(task, description=f"batch {cell.batch}, context {cell.context}")

                def report(share: float, before: float = finished, weight: float = _weight(cell)) -> None:
                    progress.update(task, completed=before + share * weight)

                times = taking_turns.measure(cell, report)
                for row in rows_of(cell, times, setting):
                    if (row.batch, row.context, row.gamma) not in done:
                        append(args.out, row)
                        num_lost += row.gamma > 0 and row.draft_step_s is None
                spreads += [gamma_times.cycle_spread for gamma_times in times.by_gamma.values()]
                finished += _weight(cell)
    spread = statistics.median(spreads) if spreads else 0.0  # every point was there already
    if num_lost or spread > RESTLESS_SPREAD:
        lost = f", and {num_lost} draft steps were lost in the noise and left empty" if num_lost else ""
        console.print(
            f"the machine was restless: the middle half of a point's cycles spread over {spread:.0%}{lost}; "
            "other programs were running? Delete the file and measure again",
            style="bold",
        )


def cells_in_time(cells: Sequence[Cell], step_seconds: dict[int, float], done: set[tuple[int, int, int]], console: Any) -> list[Cell]:
    """The quick plan, made cheaper where this machine is slow for the model, and that said. Points that are in `done` go."""
    estimate = StepEstimate(step_seconds)
    fitting = within_budget(cells, QUICK_BUDGET_S, estimate)
    if fitting != cells:
        seconds = sum(estimate.cell_s(cell) for cell in fitting)
        console.print(
            f"a step of one token takes {1000 * estimate.step_s(1):.0f} ms here: the quick plan is cut from {len(points_of(cells))} to "
            f"{len(points_of(fitting))} points at shorter contexts, about {seconds:.0f} s; name --batches, --seqs and --gammas for more"
        )
    return missing_cells(fitting, done)


def _weight(cell: Cell) -> float:
    """Of a cell in the progress bar: decoding takes about as long in all of them, prefill as long as it has tokens."""
    return 1 + cell.batch * cell.context / 4096


def rows_of(cell: Cell, times: CellTimes, setting: Setting) -> Iterator[SweepRow]:
    point = {**dataclasses.asdict(setting), "batch": cell.batch, "context": cell.context}
    yield SweepRow(**point, gamma=0, target_step_s=times.target_step_s, target_step_sd_s=times.target_step_sd_s)
    for gamma, gamma_times in times.by_gamma.items():
        yield SweepRow(**point, gamma=gamma, **dataclasses.asdict(gamma_times))


@contextmanager
def running(plain: EngineSettings, self_spec: EngineSettings, out: Path) -> Iterator[tuple[TimingEngine, TimingEngine]]:
    """Both engines, started at the same time. Their logs stay beside `out` if something goes wrong."""
    logs = [out.with_name(f"{out.name}.{settings.name}.log") for settings in (plain, self_spec)]
    with ExitStack() as at_end:
        folder = Path(at_end.enter_context(tempfile.TemporaryDirectory()))
        engines = []
        for settings, log in ((plain, logs[0]), (self_spec, logs[1])):
            engines.append(TimingEngine(settings, folder, log))
            at_end.callback(engines[-1].close)
        for engine in engines:
            engine.wait_until_ready()
        yield engines[0], engines[1]
    for log in logs:
        log.unlink(missing_ok=True)


def _parser() -> CommandParser:
    from calib.device import has_gpu

    parser = CommandParser("calib.sweep", __doc__)
    count = numbers(int, 1, math.inf)
    parser.add_argument("--model", required=True, metavar="DIR", help="folder or hub name of the policy")
    parser.add_argument("--out", required=True, type=Path, metavar="S.csv", help="written row by row; continued if it is there")
    scheme = default_quant(has_gpu())
    parser.add_argument("--quant", choices=QUANT_SCHEMES, default=scheme, help="drafter weights (default here: %(default)s)")
    parser.add_argument("--tensor-parallel-size", type=number(int, 1, 64), default=1, metavar="N", help="GPUs of an engine (default: 1)")
    for flag, kind, what in (
        ("--batches", count, "decoding requests (default: up to 64)"),
        ("--seqs", count, "tokens in context (default: up to 512 on a CPU, 4096 on a GPU)"),
        ("--gammas", numbers(int, 1, MAX_GAMMA), "draft tokens per cycle (default: up to 5 on a CPU, 11 on a GPU)"),
    ):
        parser.add_argument(flag, type=kind, metavar="N,N", help=what)
    parser.add_argument(
        "--logprobs", type=number(int, 0, 20), default=0, metavar="N",
        help="per sampled token; a rollout has 1 where OpenRLHF corrects for importance sampling (default: 0)",
    )  # fmt: skip
    parser.add_argument(
        "--quick",
        action="store_true",
        help="24 points that a quick fit needs, instead of the three above; fewer and shorter where that would take over two minutes",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
