"""The record of a fit: what it was told to do, with which versions, on which measurements."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Sequence
from pathlib import Path

from calib.sweep_csv import Sweep, point_digests
from openrlhf_sd.calibration import Provenance
from openrlhf_sd.provenance import describe_machine, git_sha

PACKAGES = ("openrlhf_sd", "numpy", "scipy")
"""What a fit depends on; the engine's version stands in the sweep."""


def fit_provenance(argv: Sequence[str], sweep: Sweep) -> Provenance:
    """Provenance of a fit of `sweep` with the command line `argv` (without the program's name).

    Every point of `sweep.timings` counts as fitted, also one that the fit sets aside as contaminated: it was looked at. A fit on a
    part of a file passes the sweep with that part of the timings; whole points, because a point's digest is over all its timings.
    """
    return Provenance(
        git_sha=git_sha(),
        argv=tuple(argv),
        packages=_versions(),
        machine=describe_machine(),
        sweep_file=Path(sweep.path).name,
        sweep_sha256=sweep.sha256,
        fitted_points=point_digests(sweep.timings),
    )


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # a checkout that is not installed: git_sha says which
    return found
