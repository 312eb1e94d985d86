"""`openrlhf-sd watch RUN_DIR [--once] [--interval S]`: a run in the terminal, while it goes or after it.

Reads the run folder again whenever a file of it has changed, until the run has ended or Ctrl-C. Where the output is no terminal it
prints once, without escape codes, as with --once. Exit codes: 0, 2 for a folder that is none of ours, 130 for Ctrl-C.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from openrlhf_sd.config import SelfSpecError
from openrlhf_sd.path_names import check_names
from openrlhf_sd.run_records import events_folder, load_run, read_config
from openrlhf_sd.watch_view import Watched, view

DEFAULT_INTERVAL_S = 2.0
MIN_INTERVAL_S = 0.1


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    try:
        if not args.interval >= MIN_INTERVAL_S:
            raise SelfSpecError(f"--interval: {args.interval} must be at least {MIN_INTERVAL_S} seconds")
        check_names(args.run_dir, "RUN_DIR")
        watch(Path(args.run_dir), args.once, args.interval)
    except SelfSpecError as error:
        print(f"openrlhf-sd watch: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="openrlhf-sd watch", description="Watch a run folder in the terminal.")
    parser.add_argument("run_dir", metavar="RUN_DIR", help="folder given as --self-spec.run_dir; it may not be there yet")
    parser.add_argument("--once", action="store_true", help="print once and end")
    parser.add_argument(
        "--interval",
        type=float,
        default=DEFAULT_INTERVAL_S,
        metavar="S",
        help="seconds between looks (default: %(default)s)",
    )
    return parser


def watch(run_dir: Path, once: bool, interval_s: float) -> None:
    """Raises SelfSpecError for a folder that holds something else."""
    from rich.console import Console
    from rich.live import Live

    console = Console()
    if once or not console.is_terminal:
        console.print(view(look(run_dir), time.time()))
        return
    seen, watched = signature(run_dir), look(run_dir)
    with Live(view(watched, time.time()), console=console, auto_refresh=False) as live:
        while not watched.is_over:
            time.sleep(interval_s)
            if (now := signature(run_dir)) != seen:
                seen, watched = now, look(run_dir)
            live.update(view(watched, time.time()), refresh=True)


def look(run_dir: Path) -> Watched:
    """What the folder holds now. A cut last line, a missing file and a run not yet begun are no errors.

    Raises:
        SelfSpecError: `run_dir` is a file, or a record in it is none that a run of ours writes.
    """
    if run_dir.exists() and not run_dir.is_dir():
        raise SelfSpecError(f"{run_dir} is a file; give the folder of a run")
    if not run_dir.exists():
        return Watched(str(run_dir), None, f"waiting for the folder {run_dir}: a run makes it when it starts")
    if not (run_dir / "config.json").is_file():
        return Watched(str(run_dir), None, f"waiting for {run_dir / 'config.json'}: a run writes it when it starts")
    run = load_run(run_dir, may_be_empty=True)
    watched = Watched(str(run_dir), run, None)
    if run.rollouts:
        return watched
    if watched.is_over:
        return replace(watched, message="the run ended before its first rollout was recorded")
    return replace(watched, message="waiting for the first rollout: it is recorded after the weight broadcast that ends it")


def signature(run_dir: Path) -> list[tuple[str, int, int]]:
    """Changes with any file that `look` reads."""
    files = [run_dir / name for name in ("config.json", "provenance.json", "metrics.jsonl")]
    if files[0].is_file():
        files += events_folder(run_dir, read_config(files[0])).rglob("events.out.tfevents.*")
    found = []
    for file in sorted(files):
        if file.exists():
            stat = file.stat()
            found.append((str(file), stat.st_size, stat.st_mtime_ns))
    return found


if __name__ == "__main__":
    sys.exit(main())
