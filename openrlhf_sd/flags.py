"""Our flags and OpenRLHF's: splitting a command line, and a parser of OpenRLHF's own flags that costs no import of
torch or vLLM."""

from __future__ import annotations

import argparse
import ast
import contextlib
import copy
import dataclasses
import datetime
import difflib
import importlib.util
import io
import os
import runpy
import types
import typing
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from openrlhf_sd.config import DEFAULT_MODE, MODES, SelfSpecConfig, SelfSpecError
from openrlhf_sd.gpus import GPUS
from openrlhf_sd.path_names import check_names

MODE_FLAG = "--self-spec"
PREFIX = MODE_FLAG + "."
RUN_DIR_FLAG = PREFIX + "run_dir"
"""Where records go, not how to speculate: a vanilla run has it too, so it is no field of SelfSpecConfig."""

EXPLAIN_FLAG = "--explain"
EXPLAIN_FORMATS = ("text", "json")
GPU_FLAG = PREFIX + "gpu"
"""With EXPLAIN_FLAG only: what is explained, not what runs, so it is no field of SelfSpecConfig."""

UPSTREAM_MODULE = "openrlhf.cli.train_ppo_ray"
UPSTREAM_PATHS = (
    *("actor.model_name_or_path", "critic.model_name_or_path", "reward.model_name_or_path"),
    *("data.prompt_dataset", "eval.dataset", "reward.remote_url", "train.agent_func_path"),
    *("ckpt.output_dir", "ckpt.path", "logger.tensorboard_dir"),
)
"""OpenRLHF's flags whose values are files or folders, or lists of them with commas between; some also take names of a hub, or URLs."""

FIELDS = {f.name: f for f in dataclasses.fields(SelfSpecConfig) if f.name != "mode"}
"""Every field of SelfSpecConfig but the mode is a flag `--self-spec.FIELD`; the mode is the value of `--self-spec`
itself."""


def split_flags(argv: Sequence[str]) -> tuple[SelfSpecConfig | None, str | None, list[str]]:
    """Take our flags out of a command line.

    Returns:
        (config, run_dir, rest): config is None without `--self-spec`, run_dir without RUN_DIR_FLAG; rest is left for OpenRLHF.

    Raises:
        SelfSpecError: an unknown or repeated flag of ours, a missing or malformed value, a value out of bounds, or a
            flag that needs a mode and has none.
    """
    values: dict[str, Any] = {}
    rest: list[str] = []
    tokens = list(argv)
    while tokens:
        token = tokens.pop(0)
        flag, has_value, value = token.partition("=")
        if flag == MODE_FLAG:
            if not has_value:
                value = tokens.pop(0) if tokens and not tokens[0].startswith("-") else DEFAULT_MODE
            _set_once(values, "mode", flag, value)
        elif flag == RUN_DIR_FLAG:
            _set_once(values, "run_dir", flag, value if has_value else _next_value(flag, tokens))
        elif flag.startswith(PREFIX):
            name = flag.removeprefix(PREFIX)
            if flag == GPU_FLAG:
                raise SelfSpecError(f"{flag}: names the GPU that {EXPLAIN_FLAG} is about; add {EXPLAIN_FLAG} or drop it")
            if name not in FIELDS:
                raise SelfSpecError(f"{flag}: no such flag{_did_you_mean(flag, our_flags())}")
            _set_once(values, name, flag, _parse_value(flag, value if has_value else _next_value(flag, tokens)))
        else:
            rest.append(token)

    run_dir = values.pop("run_dir", None)
    if run_dir is not None:
        check_names(run_dir, RUN_DIR_FLAG)
    if "mode" in values:
        return SelfSpecConfig(**values), run_dir, rest
    for name in values:
        raise SelfSpecError(f"{PREFIX}{name}: means nothing without {MODE_FLAG}; add {MODE_FLAG} {DEFAULT_MODE} or drop it")
    return None, run_dir, rest


def asks_to_explain(argv: Sequence[str]) -> bool:
    return EXPLAIN_FLAG in (token.partition("=")[0] for token in argv)


def take_explain_flags(argv: Sequence[str]) -> tuple[str, str | None, list[str]]:
    """Take `--explain [text|json]` and `--self-spec.gpu NAME` out of a command line.

    Returns:
        (format, name of the GPU or None, rest): rest is the command line of the run that is explained.

    Raises:
        SelfSpecError: an unknown format, a missing value or a repeated flag.
    """
    values: dict[str, str] = {}
    rest: list[str] = []
    tokens = list(argv)
    while tokens:
        token = tokens.pop(0)
        flag, has_value, value = token.partition("=")
        if flag == EXPLAIN_FLAG:
            if not has_value:
                value = tokens.pop(0) if tokens and tokens[0] in EXPLAIN_FORMATS else EXPLAIN_FORMATS[0]
            if value not in EXPLAIN_FORMATS:
                raise SelfSpecError(f"{flag}: unknown format {value!r}; choose one of {', '.join(EXPLAIN_FORMATS)}")
            _set_once(values, "format", flag, value)
        elif flag == GPU_FLAG:
            _set_once(values, "gpu", flag, value if has_value else _next_value(flag, tokens))
        else:
            rest.append(token)
    return values["format"], values.get("gpu"), rest


def our_flags() -> list[str]:
    return [MODE_FLAG, *(PREFIX + name for name in FIELDS), RUN_DIR_FLAG, EXPLAIN_FLAG, GPU_FLAG]


def our_help() -> str:
    """Our part of `--help`, in the style of OpenRLHF's argparse."""
    parser = argparse.ArgumentParser(prog="openrlhf-sd", add_help=False, allow_abbrev=False, usage=argparse.SUPPRESS)
    group = parser.add_argument_group("self-speculation (openrlhf_sd)")
    defaults = SelfSpecConfig()
    group.add_argument(
        MODE_FLAG,
        nargs="?",
        metavar="{" + ",".join(MODES) + "}",
        help=f"Speculate with a quantized copy of the policy. Without a value it means {DEFAULT_MODE}; absent, this is vanilla OpenRLHF.",
    )
    for name, f in FIELDS.items():
        default = getattr(defaults, name)
        shown = ",".join(map(str, default)) if isinstance(default, tuple) else default
        suffix = "" if default is None else f" (default: {shown})"
        group.add_argument(PREFIX + name, metavar=name.upper(), help=(f.metadata["help"] + suffix).replace("%", "%%"))
    records = "Folder for config.json, provenance.json, metrics.jsonl. Alone (no mode) it records a vanilla run."
    group.add_argument(RUN_DIR_FLAG, metavar="RUN_DIR", help=records)
    explain = parser.add_argument_group("what would run, without running it (openrlhf_sd)")
    explain.add_argument(
        EXPLAIN_FLAG,
        nargs="?",
        metavar="{" + ",".join(EXPLAIN_FORMATS) + "}",
        help="With all flags of a run: print its memory plan, where speculation is predicted to pay and what is wrong, and exit.",
    )
    explain.add_argument(GPU_FLAG, metavar="NAME", help=f"Explain for this GPU: {', '.join(GPUS)}. Default: this machine's.")
    return parser.format_help()


def upstream_parser() -> argparse.ArgumentParser:
    """OpenRLHF's own parser, with its own flags, help and defaults.

    Raises:
        SelfSpecError: OpenRLHF is not installed.
    """
    build_parser, _ = _upstream_main()
    namespace = {"argparse": types.SimpleNamespace(ArgumentParser=_UpstreamParser), "datetime": datetime.datetime}
    exec(build_parser, namespace)
    return namespace["parser"]


def check_upstream(parsed: argparse.Namespace) -> None:
    """Run OpenRLHF's own checks of its flags, silently; it repeats them, with its warnings, when it trains.

    Raises:
        SelfSpecError: with OpenRLHF's message.
    """
    _, check_args = _upstream_main()
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            exec(check_args, {"args": copy.deepcopy(parsed), "os": os, "hierarchize": _hierarchize()})
    except (AssertionError, TypeError, ValueError, ArithmeticError, ImportError) as error:
        reason = str(error) if isinstance(error, AssertionError) else f"{type(error).__name__}: {error}"
        raise SelfSpecError(f"OpenRLHF refuses these flags: {reason}") from error


def _upstream_main() -> tuple[types.CodeType, types.CodeType]:
    """OpenRLHF's main program in two parts: the statements that build its parser, and those between parsing and
    `train(args)`.

    Both live inside `if __name__ == "__main__":`, next to imports that take ten seconds, so neither can be imported.
    The first part uses argparse and one date only.
    """
    spec = importlib.util.find_spec("openrlhf") and importlib.util.find_spec(UPSTREAM_MODULE)
    if spec is None or spec.loader is None:
        raise SelfSpecError("openrlhf: not installed in this Python; run examples/setup.sh first")
    source = spec.loader.get_source(UPSTREAM_MODULE)
    [main_block] = [node for node in ast.parse(source).body if isinstance(node, ast.If)]
    texts = [ast.unparse(statement) for statement in main_block.body if ast.unparse(statement) != _HEAVY_IMPORT]
    parse, train = texts.index("args = parser.parse_args()"), texts.index("train(args)")
    return (
        compile("\n".join(texts[:parse]), UPSTREAM_MODULE, "exec"),
        compile("\n".join(texts[parse + 1 : train]), UPSTREAM_MODULE, "exec"),
    )


_HEAVY_IMPORT = "from openrlhf.utils.config import hierarchize"


def _hierarchize() -> Callable[[argparse.Namespace], types.SimpleNamespace]:
    """What `_HEAVY_IMPORT` names, from its file, which needs nothing: its package takes five seconds, torch and transformers."""
    [package] = importlib.util.find_spec("openrlhf").submodule_search_locations
    return runpy.run_path(os.path.join(package, "utils", "config.py"))["hierarchize"]


def parse_upstream(argv: Sequence[str]) -> argparse.Namespace:
    """OpenRLHF's flags as a flat namespace with dotted names, every default filled in.

    Raises:
        SelfSpecError: an unknown flag, a malformed value, or a path with a name that no file can have.
    """
    parser = upstream_parser()
    parsed, unknown = parser.parse_known_args(list(argv))
    if unknown:
        flag = next((token for token in unknown if token.startswith("-")), unknown[0])
        known = [*parser._option_string_actions, *our_flags()]
        raise SelfSpecError(f"{flag}: no such flag{_did_you_mean(flag.partition('=')[0], known)}")
    for name in UPSTREAM_PATHS:
        for path in (vars(parsed)[name] or "").split(","):
            if "://" not in path:
                check_names(path, f"--{name}")
    return parsed


class _UpstreamParser(argparse.ArgumentParser):
    """Reports by exception, in one line, and takes no abbreviations: a mistyped flag must not become another one."""

    def __init__(self) -> None:
        super().__init__(prog="openrlhf-sd", usage=argparse.SUPPRESS, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        raise SelfSpecError(message.removeprefix("argument "))


def _set_once(values: dict[str, Any], name: str, flag: str, value: Any) -> None:
    if name in values:
        raise SelfSpecError(f"{flag}: given twice")
    values[name] = value


def _next_value(flag: str, tokens: list[str]) -> str:
    """Takes the value off `tokens`."""
    if not tokens or tokens[0].startswith("--"):
        raise SelfSpecError(f"{flag}: needs a value")
    return tokens.pop(0)


def _parse_value(flag: str, text: str) -> Any:
    """Text -> the type of the field, read from SelfSpecConfig's annotations."""
    kind = typing.get_type_hints(SelfSpecConfig)[flag.removeprefix(PREFIX)]
    if typing.get_origin(kind) is types.UnionType:
        kind = next(choice for choice in typing.get_args(kind) if choice is not type(None))
    try:
        if typing.get_origin(kind) is tuple:
            return tuple(int(part) for part in text.split(","))
        return kind(text)
    except ValueError:
        wanted = {int: "a whole number", float: "a number"}.get(kind, "whole numbers separated by commas")
        raise SelfSpecError(f"{flag}: {text!r} is not {wanted}") from None


def _did_you_mean(flag: str, known: Sequence[str]) -> str:
    matches = difflib.get_close_matches(flag, known, n=1, cutoff=0.6)
    return f"; did you mean {matches[0]}?" if matches else "; see openrlhf-sd --help"
