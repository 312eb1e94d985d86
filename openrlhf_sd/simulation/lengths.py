"""Output lengths of the simulated requests."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from openrlhf_sd.config import SelfSpecError
from openrlhf_sd.metrics import read_rows

LENGTHS_KEY = "response_lengths"
"""Key of a metrics.jsonl row: output tokens of each response of that engine in that rollout."""

DrawLengths = Callable[[np.random.Generator, int], np.ndarray]
"""Random generator and number of requests -> output tokens of each, int64, at least 1."""


def length_source(spec: str) -> DrawLengths:
    """`lognormal:MEAN,SIGMA,MAX` or a file to draw from with replacement.

    MEAN is the mean of the log-normal before it is cut at MAX, SIGMA the standard deviation of the logarithm. A file holds one integer per
    line, a JSON list of integers, or the rows of a metrics.jsonl.

    Raises:
        SelfSpecError: not of this form, or a file that cannot be read or holds anything but positive integers.
    """
    if spec.startswith("lognormal:"):
        return _lognormal(spec)
    return _Recorded(tuple(read_lengths(Path(spec))))


@dataclass(frozen=True)
class _Recorded:
    lengths: tuple[int, ...]

    def __call__(self, rng: np.random.Generator, size: int) -> np.ndarray:
        return rng.choice(np.array(self.lengths, dtype=np.int64), size)


@dataclass(frozen=True)
class _LogNormal:
    mean: float
    sigma: float
    longest: float

    def __call__(self, rng: np.random.Generator, size: int) -> np.ndarray:
        drawn = rng.lognormal(math.log(self.mean) - self.sigma**2 / 2, self.sigma, size)
        return np.clip(np.rint(drawn), 1, self.longest).astype(np.int64)


def _lognormal(spec: str) -> _LogNormal:
    try:
        mean, sigma, longest = (float(part) for part in spec.removeprefix("lognormal:").split(","))
    except ValueError:
        raise SelfSpecError(f"--lengths: {spec!r} is not lognormal:MEAN,SIGMA,MAX, for example lognormal:700,1.0,8192") from None
    if not (math.isfinite(mean) and mean >= 1 and 0 <= sigma <= 10 and longest >= 1 and longest == int(longest)):
        raise SelfSpecError(f"--lengths: {spec}: needs MEAN >= 1, SIGMA in 0..10 and a whole MAX >= 1")
    return _LogNormal(mean, sigma, longest)


def read_lengths(path: Path) -> list[int]:
    """All lengths of a file. Raises SelfSpecError."""
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not text"
        raise SelfSpecError(f"--lengths: cannot read {path} ({reason}); give a file or lognormal:MEAN,SIGMA,MAX") from None
    try:
        if text.lstrip().startswith("["):
            values = json.loads(text)
        elif text.lstrip().startswith("{"):
            values = [length for row in read_rows(path)[0] for length in row.get(LENGTHS_KEY) or ()]
        else:
            values = [int(line) for line in text.split()]
    except (ValueError, TypeError):
        raise SelfSpecError(f"--lengths: {path}: not integers, one per line, nor a JSON list, nor a metrics.jsonl") from None
    if not values:
        raise SelfSpecError(f"--lengths: {path}: holds no lengths; in a metrics.jsonl they are the rows' {LENGTHS_KEY}")
    if not all(type(value) is int and value >= 1 for value in values):
        raise SelfSpecError(f"--lengths: {path}: every length must be a whole number, at least 1")
    return values
