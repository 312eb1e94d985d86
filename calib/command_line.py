"""What the commands of this package share: a bad flag is an error like any other, and number lists look the same everywhere."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import NoReturn

from openrlhf_sd.config import SelfSpecError


class CommandParser(argparse.ArgumentParser):
    """Raises SelfSpecError where argparse would print the usage and exit, so that `main` decides on message and exit code."""

    def __init__(self, module: str, description: str) -> None:
        super().__init__(
            prog=f"python -m {module}",
            description=description,
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    def error(self, message: str) -> NoReturn:
        raise SelfSpecError(f"{message.removeprefix('argument ')}; see {self.prog} --help")


def number(kind: type[int] | type[float], least: float, most: float) -> Callable[[str], float]:
    """An argparse type: a number within least..most, both included; NaN is outside."""

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not least <= value <= most:
            bounds = f"{least} or more" if most == float("inf") else f"{least} to {most}"
            noun = "whole number" if kind is int else "number"
            raise argparse.ArgumentTypeError(f"{text!r} is no {noun} of {bounds}")
        return value

    return parse


def numbers(kind: type[int] | type[float], least: float, most: float) -> Callable[[str], Sequence[float]]:
    """An argparse type: comma-separated numbers within bounds."""
    parse_one = number(kind, least, most)
    return lambda text: tuple(parse_one(part) for part in text.split(","))
