"""A calibration: the cost model of one model on one machine, whom it is for and where it comes from, as a JSON file.

    {"format": 1, "kind": "fitted", "device": "NVIDIA A100-SXM4-80GB", "model": "Qwen2.5-7B", "quant": "w4", "tensor_parallel_size": 1,
     "cost_model": {CostModel.to_dict()},
     "provenance": {"git_sha", "argv", "packages", "machine", "sweep_file", "sweep_sha256", "fitted_points": {"16,2048,7": "1f3a90c2"}}}

The model's fingerprint is `cost_model.constants`: two checkpoints with the same layer shapes have the same step times, whatever their
names. A fitted point is "batch,context,gamma" with a digest of what was measured there (`calib.sweep_csv.point_digests`), so that
validation knows which measurements the fit has seen.
"""

from __future__ import annotations

import dataclasses
import importlib.resources
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from openrlhf_sd.config import SelfSpecError, printable
from openrlhf_sd.policy.cost_model import CostModel
from openrlhf_sd.policy.model_constants import ModelConstants, model_constants

FORMAT = 1

KINDS = ("fitted", "few-shot", "transferred")
"""Best first. fitted: on a whole sweep of this model. few-shot: on about two dozen points, with another model's fit as the prior.
transferred: hardware terms of another model's fit, no measurement of this model."""

MAKE_ONE = (
    "python -m calib.sweep --model DIR --out sweep.csv && "
    "python -m calib.fit --sweep sweep.csv --model-config DIR --out CAL.json; or give --self-spec.calibration auto"
)


@dataclass(frozen=True)
class Provenance:
    """Where the numbers come from. `machine` is where the fit ran; the times were taken on `Calibration.device`."""

    git_sha: str | None
    argv: tuple[str, ...]
    packages: Mapping[str, str]
    machine: Mapping[str, Any]
    sweep_file: str
    """Name without its folder. Of a transferred calibration: the sweep of the model that it comes from."""

    sweep_sha256: str
    fitted_points: Mapping[tuple[int, int, int], str] = field(default_factory=dict)
    """(batch, context, gamma) -> digest, of every point that the fit was offered, those included that it set aside as contaminated."""


@dataclass(frozen=True)
class Calibration:
    """Raises SelfSpecError when a field is not one of its allowed values, or the cost model is of another drafter."""

    kind: str
    device: str
    model: str
    quant: str
    tensor_parallel_size: int
    cost_model: CostModel
    provenance: Provenance

    def __post_init__(self) -> None:
        _require(self.kind in KINDS, "kind", f"is {self.kind!r}; it is one of {', '.join(KINDS)}")
        _require(
            self.quant == self.cost_model.quant,
            "quant",
            f"is {self.quant!r}, in cost_model {self.cost_model.quant!r}; make the file anew",
        )
        size, its_size = self.tensor_parallel_size, self.constants.tensor_parallel_size
        _require(size == its_size, "tensor_parallel_size", f"is {size}, in cost_model.constants {its_size}; make the file anew")

    @property
    def constants(self) -> ModelConstants:
        """The model's fingerprint."""
        return self.cost_model.constants

    def describe(self) -> str:
        """One line for people. Names are somebody else's text: a calibration may come from anywhere."""
        return printable(f"{self.kind} for {self.model}, drafter {self.quant}, TP {self.tensor_parallel_size}, on {self.device}")

    def save(self, path: str | Path) -> None:
        """Write in one step: a reader sees the old file or the new one."""
        partial = Path(f"{path}.partial")
        partial.write_text(json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n", encoding="utf-8")
        os.replace(partial, path)

    def to_dict(self) -> dict[str, Any]:
        provenance = dataclasses.asdict(self.provenance)
        provenance["argv"] = list(self.provenance.argv)
        provenance["fitted_points"] = {",".join(map(str, point)): digest for point, digest in sorted(self.provenance.fitted_points.items())}
        return {
            "format": FORMAT,
            "kind": self.kind,
            "device": self.device,
            "model": self.model,
            "quant": self.quant,
            "tensor_parallel_size": self.tensor_parallel_size,
            "cost_model": self.cost_model.to_dict(),
            "provenance": provenance,
        }

    @classmethod
    def from_dict(cls, values: Any) -> Calibration:
        """Inverse of `to_dict`, also after a trip through JSON. Raises SelfSpecError naming the key at fault."""
        keys = {"format": int, "kind": str, "device": str, "model": str, "quant": str, "tensor_parallel_size": int}
        _check_keys(values, {**keys, "cost_model": dict, "provenance": dict}, "")
        _require(values["format"] == FORMAT, "format", f"is {values['format']}; this version reads {FORMAT}; make the file anew")
        return cls(
            **{key: values[key] for key in keys if key != "format"},
            cost_model=_cost_model(values["cost_model"]),
            provenance=_provenance(values["provenance"]),
        )


def load(path: str | Path) -> Calibration:
    """Raises SelfSpecError, one line with the file's name, when it is missing, no JSON, or anything in it is not as `save` wrote it."""
    try:
        return Calibration.from_dict(json.loads(Path(path).read_text(encoding="utf-8"), parse_constant=_refuse_constant))
    except OSError as error:
        raise SelfSpecError(f"{path}: cannot be read ({error.strerror}); make a calibration: {MAKE_ONE}") from error
    except json.JSONDecodeError as error:
        raise SelfSpecError(f"{path}: no calibration: line {error.lineno} is not JSON ({error.msg}); make one: {MAKE_ONE}") from error
    except UnicodeDecodeError as error:
        raise SelfSpecError(f"{path}: no calibration: not a text file; make one: {MAKE_ONE}") from error
    except SelfSpecError as error:
        raise SelfSpecError(f"{path}: {error}") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, lists in lists without end
        raise SelfSpecError(f"{path}: no calibration: {error}; make one: {MAKE_ONE}") from error


def check_matches(calibration: Calibration, *, device: str, model_config: Mapping[str, Any], quant: str, tensor_parallel_size: int) -> None:
    """Is it for this machine, model and drafter?

    Args:
        device: name of the GPU, or of the CPU model, as in `calib.sweep`'s column.
        model_config: the policy's config.json.

    Raises:
        SelfSpecError: it is not; the message says in what, and how to make the right one.
    """
    flag = "--self-spec.calibration"
    _require(calibration.device == device, flag, f"was measured on {calibration.device}, this is {device}; measure here: {MAKE_ONE}")
    _require(
        calibration.quant == quant,
        flag,
        f"is for a {calibration.quant} drafter, the run has --self-spec.quant {quant}; change one of them, or measure: {MAKE_ONE}",
    )
    _require(
        calibration.tensor_parallel_size == tensor_parallel_size,
        flag,
        f"is for tensor parallel size {calibration.tensor_parallel_size}, the run has {tensor_parallel_size}; measure: {MAKE_ONE}",
    )
    here = model_constants(dict(model_config), tensor_parallel_size)
    differences = [
        f"{item.name} {getattr(calibration.constants, item.name)} there, {getattr(here, item.name)} here"
        for item in dataclasses.fields(here)
        if getattr(calibration.constants, item.name) != getattr(here, item.name)
    ]
    _require(
        not differences,
        flag,
        f"is for {calibration.model}, another model than the policy ({(differences or ['the same'])[0]}); without measuring: "
        f"python -m calib.transfer --calibration THIS.json --model-config DIR --out CAL.json; or measure: {MAKE_ONE}",
    )


def shipped(*, device: str, model_config: Mapping[str, Any], quant: str, tensor_parallel_size: int) -> Calibration | None:
    """The calibration installed with the package for exactly this, the best kind if there are several; None if there is none."""
    found = [
        calibration
        for calibration in map(load, shipped_paths())
        if (calibration.device, calibration.quant, calibration.tensor_parallel_size) == (device, quant, tensor_parallel_size)
        and calibration.constants == model_constants(dict(model_config), tensor_parallel_size)
    ]
    return min(found, key=lambda calibration: KINDS.index(calibration.kind), default=None)


def shipped_paths() -> list[Path]:
    """Files of calib/shipped, in a checkout and in an installed wheel."""
    return sorted(Path(str(importlib.resources.files("calib"))).joinpath("shipped").glob("*.json"))


def _cost_model(values: dict[str, Any]) -> CostModel:
    _check_leaves(values, "cost_model")
    try:
        cost_model = CostModel.from_dict(values)
    except KeyError as error:
        raise SelfSpecError(f"cost_model: no key {error}; make the file anew") from error
    except SelfSpecError:
        raise
    except (TypeError, ValueError, AttributeError) as error:
        raise SelfSpecError(f"cost_model: {error}; make the file anew") from error
    # An unknown key that from_dict passed over, or a value that it bent, shows here.
    _require(json.loads(json.dumps(cost_model.to_dict())) == values, "cost_model", "has unknown or altered keys; make the file anew")
    return cost_model


def _provenance(values: dict[str, Any]) -> Provenance:
    types = {"git_sha": (str, type(None)), "argv": list, "packages": dict, "machine": dict}
    _check_keys(values, {**types, "sweep_file": str, "sweep_sha256": str, "fitted_points": dict}, "provenance.")
    return Provenance(
        **{**values, "argv": tuple(values["argv"]), "fitted_points": dict(map(_fitted_point, values["fitted_points"].items()))}
    )


def _fitted_point(item: tuple[str, Any]) -> tuple[tuple[int, int, int], str]:
    key, digest = item
    parts = key.split(",")
    good = len(parts) == 3 and all(part.isdecimal() for part in parts) and isinstance(digest, str)
    _require(good, "provenance.fitted_points", f'{key!r}: {digest!r} is not "batch,context,gamma": "digest"')
    return tuple(map(int, parts)), digest


def _check_keys(values: Any, types: Mapping[str, Any], prefix: str) -> None:
    _require(isinstance(values, dict), prefix or "the file", f"holds {type(values).__name__} where a calibration has an object")
    unknown = sorted(set(values) - set(types))
    missing = sorted(set(types) - set(values))
    _require(not unknown, prefix + ", ".join(unknown), "unknown key; delete it")
    _require(not missing, prefix + ", ".join(missing), "missing; make the file anew")
    for key, expected in types.items():
        good = isinstance(values[key], expected) and not isinstance(values[key], bool)
        _require(good, prefix + key, f"is {values[key]!r}, of the wrong type; make the file anew")


def _check_leaves(values: Any, where: str) -> None:
    """Every number of a cost model is finite and not negative: bytes, seconds, FLOPs and ratios."""
    if isinstance(values, dict):
        for key, value in values.items():
            _check_leaves(value, f"{where}.{key}")
    elif isinstance(values, list):
        for index, value in enumerate(values):
            _check_leaves(value, f"{where}[{index}]")
    elif isinstance(values, int | float) and not isinstance(values, bool):
        _require(math.isfinite(values) and values >= 0, where, f"is {values}; it is a finite number, 0 or more")


def _refuse_constant(text: str) -> None:
    raise SelfSpecError(f"holds {text}; every number is finite; make the file anew")


def _require(condition: bool, what: str, message: str) -> None:
    if not condition:
        raise SelfSpecError(f"{what}: {message}")
