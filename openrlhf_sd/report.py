"""`openrlhf-sd compare RUN_DIR [RUN_DIR...] --out DIR`: put runs side by side, in the terminal and as a page.

Writes DIR/report.html (self-contained), DIR/report.md and DIR/report.json. Runs with the same settings but for seed and folders
are replicates of one arm. The baseline is the first vanilla run's arm unless --baseline names a run of another. Exit code 2 with one
line on stderr when a folder cannot be read; a run that recorded nothing beside others is an arm of missing values.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from openrlhf_sd.config import SelfSpecError
from openrlhf_sd.path_names import check_names
from openrlhf_sd.report_arms import Arm, group_arms
from openrlhf_sd.report_cells import text
from openrlhf_sd.report_page import markdown, page
from openrlhf_sd.report_plots import draw_plots
from openrlhf_sd.report_stats import Comparison, compare
from openrlhf_sd.report_tables import all_warnings, reading_notes, summary_sections
from openrlhf_sd.run_records import load_run

DEFAULT_WARMUP_STEPS = 1  # the first rollout pays for compilation, cold caches and Ray's lazy start-up


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    try:
        if args.warmup_steps < 0:
            raise SelfSpecError(f"--warmup-steps: {args.warmup_steps} must be 0 or more")
        for run_dir in args.run_dirs:
            check_names(run_dir, "RUN_DIR")
        check_names(args.baseline or "", "--baseline")
        check_names(args.out, "--out")
        write_report(args.run_dirs, Path(args.out), args.baseline, args.warmup_steps)
    except SelfSpecError as error:
        print(f"openrlhf-sd compare: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="openrlhf-sd compare", description="Compare run folders; write report.html, report.md and report.json."
    )
    parser.add_argument("run_dirs", nargs="+", metavar="RUN_DIR", help="folder written with --self-spec.run_dir")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder for the report; made if missing")
    parser.add_argument("--baseline", metavar="RUN_DIR", help="run to compare with (default: the first vanilla run)")
    parser.add_argument(
        "--warmup-steps",
        type=int,
        default=DEFAULT_WARMUP_STEPS,
        metavar="N",
        help="first steps of each run left out of all times (default: %(default)s)",
    )
    return parser


def write_report(run_dirs: Sequence[str], out: Path, baseline: str | None, num_warmup_steps: int) -> Comparison:
    """Load, compare, print and write. Raises SelfSpecError when a run cannot be read or has too few steps."""
    if baseline is not None and not any(_same_folder(baseline, run_dir) for run_dir in run_dirs):
        run_dirs = [baseline, *run_dirs]
    for index, run_dir in enumerate(run_dirs):
        if any(_same_folder(run_dir, earlier) for earlier in run_dirs[:index]):
            raise SelfSpecError(f"{run_dir}: given twice; name each run folder once")
    arms = group_arms([load_run(run_dir, may_be_empty=True) for run_dir in run_dirs])
    base = _baseline_index(arms, baseline)
    if base is not None:
        arms.insert(0, arms.pop(base))  # first column, first colour
    comparison = compare(arms, None if base is None else 0, num_warmup_steps)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SelfSpecError(f"--out: cannot make {out} ({error.strerror}); name another folder") from error
    documents = {
        "report.json": report_json(comparison, arms),
        "report.md": markdown(comparison, arms),
        "report.html": page(comparison, arms, draw_plots(arms, comparison)),
    }
    for name, document in documents.items():
        (out / name).write_text(document, encoding="utf-8")
    print_report(comparison)
    print(f"report: {text(out / 'report.html')}")
    return comparison


def _same_folder(one: str | Path, other: str | Path) -> bool:
    return Path(one).resolve() == Path(other).resolve()


def _baseline_index(arms: list[Arm], baseline: str | None) -> int | None:
    if baseline is not None:
        return next(i for i, arm in enumerate(arms) if any(_same_folder(baseline, run.run_dir) for run in arm.runs))
    return next((index for index, arm in enumerate(arms) if arm.mode == "vanilla"), None)


def report_json(comparison: Comparison, arms: list[Arm]) -> str:
    """All numbers of the page, null where missing, with each arm's settings and each run's machine and versions."""
    document = dataclasses.asdict(comparison)
    document["reading_notes"] = reading_notes(comparison)
    for entry, arm in zip(document["arms"], arms):
        entry["self_spec"] = arm.config["self_spec"]
        # Without argv: it may hold a logging key.
        entry["provenance_by_run"] = [
            run.provenance and {key: value for key, value in run.provenance.items() if key != "argv"} for run in arm.runs
        ]
    return json.dumps(document, indent=1, allow_nan=False) + "\n"


def print_report(comparison: Comparison) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text  # Text, not markup: a run's name may hold [brackets]

    console = Console()
    table = Table(title="Rollout comparison", title_justify="left")
    table.add_column("")
    for arm in comparison.arms:
        table.add_column(Text(text(arm.label)), overflow="fold")
    for title, rows in summary_sections(comparison):
        table.add_section()
        table.add_row(Text(text(title), style="bold"))
        for name, cells in rows:
            table.add_row(Text(name), *(Text(text(cell)) for cell in cells))
    console.print(table)
    console.print(Text(reading_notes(comparison)[0], style="dim"))
    for warning in all_warnings(comparison):
        console.print(Text(f"Warning: {text(warning)}", style="yellow"))


if __name__ == "__main__":
    sys.exit(main())
