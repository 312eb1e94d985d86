"""The command line of one arm: settings, then overrides, of which the later wins.

Between reading and running, flags are a dict from a flag to its values, in the order in which they are printed.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiment import ARMS, EXAMPLES, Experiment, check_choice

from openrlhf_sd.config import SelfSpecError
from openrlhf_sd.flags import MODE_FLAG, PREFIX, RUN_DIR_FLAG
from openrlhf_sd.path_names import check_names

Flags = dict[str, list[str]]


def parse_flags(tokens: Sequence[str]) -> Flags:
    """`--a 1 2 --b --a=3` -> {"--a": ["3"], "--b": []}. A flag's place is that of its first use, its values the last.

    Raises:
        SelfSpecError: a value that belongs to no flag.
    """
    flags: Flags = {}
    name = None
    for token in tokens:
        if token.startswith("--"):
            name, has_value, value = token.partition("=")
            flags[name] = [value] if has_value else []
        elif name is None:
            raise SelfSpecError(f"{token}: belongs to no flag; overrides look like --rollout.batch_size 64")
        else:
            flags[name].append(token)
    return flags


def to_argv(flags: Flags) -> list[str]:
    return [token for name, values in flags.items() for token in (name, *values)]


def arm_flags(
    experiment: Experiment,
    arm: str,
    run_dir: Path,
    model: str | None = None,
    data: str | None = None,
    steps: int | None = None,
    overrides: Flags | None = None,
) -> Flags:
    """All flags of `openrlhf-sd` for one arm. Arms differ in `--self-spec*` and in what lies in the run folder.

    Args:
        run_dir: unless `overrides` name another.
        model: folder or hub name; data: folder; None: the experiment's own.
        steps: GRPO steps in one pass over as many prompts; None: the experiment's own number.

    Raises:
        SelfSpecError: an unknown arm, overrides that make it another one, or a folder that cannot have its name.
    """
    check_choice("ARM", arm, ARMS)
    overrides = dict(overrides or {})
    if MODE_FLAG in overrides:
        raise SelfSpecError(f"{MODE_FLAG}: the arm says this already; name another ARM instead")
    check_names(model or "", "--model-dir")
    check_names(data or "", "--data-dir")
    run_dir = Path(_only_value(overrides, RUN_DIR_FLAG) if RUN_DIR_FLAG in overrides else run_dir).absolute()
    places = {"examples": EXAMPLES, "run": run_dir, "out": run_dir.parent}
    places["model"] = Path(experiment.model.format_map(places)).absolute() if model is None else _model(model)
    places["data"] = Path(experiment.data.format_map(places) if data is None else data).absolute()

    flags: Flags = {} if arm == "vanilla" else {MODE_FLAG: [arm]}
    for name, value in experiment.self_spec.get(arm, {}).items():
        flags[PREFIX + name] = [",".join(map(str, value))] if isinstance(value, list) else [str(value)]
    flags[RUN_DIR_FLAG] = [str(run_dir)]
    for name, value in experiment.openrlhf.items():
        if value is not False:
            flags[f"--{name}"] = _values(value, places)
    steps = experiment.steps if steps is None else steps
    if steps is not None:
        flags |= {"--data.max_samples": [str(steps * _batch_size(flags | overrides))], "--train.num_episodes": ["1"]}
    return flags | overrides | {RUN_DIR_FLAG: [str(run_dir)]}


def shown(flags: Flags, environment: Mapping[str, str]) -> str:
    """The command to paste into a shell, one flag a line."""
    variables = "".join(f"{name}={shlex.quote(value)} " for name, value in environment.items())
    lines = [shlex.join([name, *values]) for name, values in flags.items()]
    return variables + " \\\n    ".join(["openrlhf-sd", *lines])


def _values(value: Any, places: Mapping[str, Any]) -> list[str]:
    if value is True:
        return []
    values = value if isinstance(value, list) else [value]
    return [v.format_map(places) if isinstance(v, str) else str(v) for v in values]


def _model(model: str) -> str:
    """An absolute folder; a hub name, which has one slash and is no folder here, stays as it is."""
    is_hub_name = model.count("/") == 1 and not model.startswith(("/", ".", "~")) and not Path(model).is_dir()
    return model if is_hub_name else str(Path(model).expanduser().absolute())


def _batch_size(flags: Flags) -> int:
    text = _only_value(flags, "--rollout.batch_size")
    try:
        return int(text)
    except ValueError:
        raise SelfSpecError(f"--rollout.batch_size: {text!r} is not a whole number") from None


def _only_value(flags: Flags, name: str) -> str:
    if len(flags[name]) != 1:
        raise SelfSpecError(f"{name}: needs one value")
    return flags[name][0]
