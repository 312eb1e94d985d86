"""What the two command lines of the launcher share: a parser that reports in one line, and some flags."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

from command import Flags
from experiment import Experiment
from inputs import made_here, missing_inputs

from openrlhf_sd.config import SelfSpecError


class Parser(argparse.ArgumentParser):
    """Its help is a module's docstring; an error is one line; a mistyped flag is not taken for another one."""

    def __init__(self, docstring: str) -> None:
        super().__init__(
            description=docstring,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            usage=argparse.SUPPRESS,
            allow_abbrev=False,
        )

    def error(self, message: str) -> None:
        raise SelfSpecError(message.removeprefix("argument "))

    def add_shared_flags(self) -> None:
        where = "default: see the file in examples/settings"
        self.add_argument("--dry-run", action="store_true", help="check everything, print it, start nothing; needs no GPU")
        self.add_argument("--model-dir", metavar="DIR", help=f"folder or hub name of the policy to train; {where}")
        self.add_argument("--data-dir", metavar="DIR", help=f"folder with train.jsonl and test.jsonl; {where}")
        self.add_argument("--steps", type=positive_int, metavar="N", help="N steps, in one pass over as many prompts as they need")


def exit_code(prog: str, run: Callable[[], int]) -> int:
    """Bad input ends in one line and exit code 2, Ctrl-C in 130, as in `openrlhf-sd`."""
    try:
        return run()
    except SelfSpecError as error:
        print(f"{prog}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{prog}: interrupted", file=sys.stderr)
        return 130


def positive_int(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def report_checked(prog: str, experiment: Experiment, flags: Flags, named: set[str]) -> None:
    """What a dry run has found, on stderr: its stdout is the commands and nothing else."""
    print(f"{prog}: OpenRLHF's own parser and checks accept this", file=sys.stderr)
    for name, sentence in missing_inputs(experiment, flags).items():
        mend = "not here yet, made before the run" if name in made_here(experiment, named) else sentence
        print(f"{prog}: {name}: {mend}", file=sys.stderr)
