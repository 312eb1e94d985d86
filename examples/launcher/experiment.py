"""Experiments: what the files in examples/settings say about each model. They are the only home of these settings.

A file may name a `shared` one whose tables it extends; everything else is a field of `Experiment`. In the table
`openrlhf`, nested keys are OpenRLHF's dotted flags: `actor.adam.lr = 5e-7` is `--actor.adam.lr 5e-7`, true is a bare
flag, a list gives several values.
"""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from openrlhf_sd.config import MODES, SelfSpecError

EXAMPLES = Path(__file__).resolve().parent.parent
SETTINGS = EXAMPLES / "settings"
MODELS = ("qwen2.5-7b", "qwen2.5-14b", "llama3.1-8b-instruct", "quickstart")
ARMS = ("vanilla", *MODES)


@dataclass(frozen=True)
class Experiment:
    """One settings file.

    Attributes:
        gpus: NVIDIA GPUs that its settings are for; 0 also runs without.
        model, data: default folders; relative ones belong to the current folder. `{out}` is the folder that holds the
            run folders.
        openrlhf: dotted flag name -> value, with placeholders {model}, {data}, {examples}, {run}.
        self_spec: arm -> name of a `--self-spec.` flag -> value; an arm that is not there has no flags but its mode.
        make_data: the command, without `--out`, that makes `data`; None where the launcher makes it.
        steps: GRPO steps unless asked for otherwise; None: as many as data and epochs give.
        environment: variables to set for the run.
    """

    name: str
    gpus: int
    model: str
    data: str
    openrlhf: Mapping[str, Any]
    self_spec: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    make_data: str | None = None
    steps: int | None = None
    environment: Mapping[str, str] = field(default_factory=dict)


def load(name: str) -> Experiment:
    """Raises SelfSpecError: no such model, or a settings file with a key nobody reads."""
    check_choice("MODEL", name, MODELS)
    tables = _read(SETTINGS / f"{name}.toml")
    known = {f.name for f in dataclasses.fields(Experiment)} - {"name"}
    if unknown := sorted(set(tables) - known) + sorted(set(tables.get("self_spec", {})) - set(MODES)):
        raise SelfSpecError(f"{SETTINGS / name}.toml: unknown key {unknown[0]}; known are {', '.join(sorted(known))}")
    return Experiment(name=name, **{**tables, "openrlhf": _flatten(tables["openrlhf"])})


def check_choice(what: str, name: str, choices: tuple[str, ...]) -> None:
    """Raises SelfSpecError, one line that lists the choices."""
    if name not in choices:
        raise SelfSpecError(f"{what}: unknown {name!r}; choose one of {', '.join(choices)}")


def _read(path: Path) -> dict[str, Any]:
    tables = tomllib.loads(path.read_text(encoding="utf-8"))
    shared = tables.pop("shared", None)
    return tables if shared is None else _extend(_read(path.parent / shared), tables)


def _extend(shared: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(shared)
    for key, value in own.items():
        merged[key] = _extend(shared[key], value) if isinstance(value, dict) and key in shared else value
    return merged


def _flatten(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in table.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat
