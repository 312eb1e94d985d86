"""The calibration of this machine for a model: shipped, or measured here once and kept.

    python -m calib.automatic --model DIR [--quant w4] [--tensor-parallel-size 1] [--logprobs 0]    # prints the path of the calibration

This is `--self-spec.calibration auto`. Without a shipped calibration for exactly this device, model, drafter and tensor-parallel size it
runs `calib.sweep --quick` in a process of its own (a minute or two) and fits it, with a shipped calibration of another model on the same
device as the prior if there is one. What it made lies in ${XDG_CACHE_HOME:-~/.cache}/openrlhf_sd/calibrations under a digest of the
hardware, the model's shape, drafter, tensor-parallel size, logprobs, versions and whether TORCH_COMPILE_DISABLE=1 is set; a change in any
of them measures anew, a change in the form of the cost model fits the kept sweep anew. An interrupted sweep goes on. Delete the files to
measure again.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from calib import sweep_plan
from calib.command_line import CommandParser, number
from calib.device import device_name, has_gpu, read_model_config
from openrlhf_sd.calibration import FORMAT, Calibration, check_matches, load, shipped, shipped_paths
from openrlhf_sd.config import QUANT_SCHEMES, SelfSpecError
from openrlhf_sd.cpu.engine_kwargs import IN_PROCESS_EXECUTOR, PLAIN_WORKER
from openrlhf_sd.drafter_scheme import default_quant
from openrlhf_sd.engine.compat import installed_version
from openrlhf_sd.policy.cost_model import Terms
from openrlhf_sd.policy.model_constants import model_constants

FLAG = "--self-spec.calibration auto"


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 2 on bad input or a sweep that fails, 130 on Ctrl-C."""
    try:
        args = _parser().parse_args(argv)
        print(calibrate_this_machine(args.model, args.quant, args.tensor_parallel_size, args.logprobs))
    except SelfSpecError as error:
        print(f"calib.automatic: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("calib.automatic: interrupted; the same command continues where it was", file=sys.stderr)
        return 130
    return 0


def calibrate_this_machine(model: str | Path, quant: str, tensor_parallel_size: int = 1, logprobs: int = 0) -> Path:
    """A calibration file that matches this machine and `model`. What it does is said on stderr, one line each.

    Args:
        model: folder or hub name.
        quant: the drafter's resolved scheme.
        logprobs: per sampled token that the run asks for. A shipped calibration is taken whatever it is.

    Raises:
        SelfSpecError: the model cannot be read or calibrated, or measuring failed; the message ends with what the sweep said.
    """
    model = str(model)
    config = read_model_config(model)
    identity = {"device": device_name(), "quant": quant, "tensor_parallel_size": tensor_parallel_size}
    if (path := _shipped_path(identity, config)) is not None:
        _say(f"calibration shipped with this package: {path}")
        return path
    folder = cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    key = sweep_key(identity, config, logprobs)
    path, sweep_path = _kept_path(key), folder / f"{key}-{Path(model).resolve().name}.csv"
    with _locked(folder / f"{key}.lock"):
        if path.exists():
            check_matches(load(path), model_config=config, **identity)
            _say(f"calibration measured here before: {path} (to measure again, delete it and {sweep_path})")
            return path
        _say(f"no calibration for this machine and model yet; measuring, once: a minute or two ({sweep_path})")
        _sweep(model, quant, tensor_parallel_size, logprobs, sweep_path)
        _fit(sweep_path, config, identity).save(path)
        _say(f"calibration measured: {path}")
    return path


def kept_calibration(model_config: dict[str, Any], quant: str, tensor_parallel_size: int, logprobs: int) -> Calibration | None:
    """What `calibrate_this_machine` has measured here before; None where it would have to measure."""
    identity = {"device": device_name(), "quant": quant, "tensor_parallel_size": tensor_parallel_size}
    path = _kept_path(sweep_key(identity, model_config, logprobs))
    return load(path) if path.exists() else None


def _kept_path(key: str) -> Path:
    return cache_folder() / f"{calibration_key(key)}.json"


def cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "openrlhf_sd" / "calibrations"


def sweep_key(identity: dict[str, Any], model_config: dict[str, Any], logprobs: int) -> str:
    """Digest of everything that step times depend on."""
    ingredients = {
        **identity,
        "logprobs": logprobs,
        "torch_compile": os.environ.get("TORCH_COMPILE_DISABLE", "0") != "1",  # vLLM's sampler compiles whatever the engine does
        "model": model_constants(model_config, identity["tensor_parallel_size"]).to_dict(),
        "executor": IN_PROCESS_EXECUTOR,  # on a CPU; before there was one, a step took messages to another process
        # On a CPU, what was another before: without AVX-512, or VNNI, the kernels; the largest batches of the plan.
        **({} if has_gpu() else {"worker": PLAIN_WORKER, "int8": "fbgemm", "batches": sweep_plan.CPU_BATCHES}),
        "versions": {package: installed_version(package) for package in ("vllm", "torch")} | {"openrlhf_sd": _own_version()},
    }
    return _digest(ingredients)


def calibration_key(sweep_key: str) -> str:
    """Digest of a sweep's key and of the form that is fitted to it."""
    return _digest([sweep_key, FORMAT, *(field.name for field in dataclasses.fields(Terms))])


def _digest(ingredients: Any) -> str:
    return hashlib.sha256(json.dumps(ingredients, sort_keys=True).encode()).hexdigest()[:16]


def _shipped_path(identity: dict[str, Any], model_config: dict[str, Any]) -> Path | None:
    found = shipped(model_config=model_config, **identity)
    return None if found is None else next(path for path in shipped_paths() if load(path) == found)


def _sweep(model: str, quant: str, tensor_parallel_size: int, logprobs: int, out: Path) -> None:
    command = [sys.executable, "-m", "calib.sweep", "--model", model, "--out", str(out), "--quick", "--quant", quant]
    command += ["--tensor-parallel-size", str(tensor_parallel_size), "--logprobs", str(logprobs)]
    search_path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    # Its progress bar goes to our stderr; its own stderr holds nothing but what went wrong.
    finished = subprocess.run(command, stdout=2, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": search_path})
    if finished.returncode == 130:
        raise KeyboardInterrupt
    if finished.returncode:
        raise SelfSpecError(
            f"{FLAG}: measuring this machine failed (exit code {finished.returncode}); mend what it says, or give a calibration "
            f"file, or with --self-spec auto --self-spec.calibration none:\n{finished.stderr.strip()[-2000:]}"
        )


def _fit(sweep_path: Path, model_config: dict[str, Any], identity: dict[str, Any]) -> Calibration:
    # Heavy: scipy.
    from calib.fit import calibrate
    from calib.sweep_csv import read_sweep

    arguments = argparse.Namespace(quant=None, tensor_parallel_size=None, exclude_contaminated=False)
    argv = ["--sweep", sweep_path.name]
    priors = [found for found in map(load, shipped_paths()) if _identity_of(found) == identity]
    calibration, _ = calibrate(read_sweep(sweep_path), model_config, arguments, argv, priors[0] if priors else None)
    return calibration


def _identity_of(calibration: Calibration) -> dict[str, Any]:
    return {key: getattr(calibration, key) for key in ("device", "quant", "tensor_parallel_size")}


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One process at a time; the file stays, the lock goes with the process that holds it."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _say("another process is measuring this machine for the same model; waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _own_version() -> str | None:
    try:
        return metadata.version("openrlhf_sd")
    except metadata.PackageNotFoundError:
        return None  # a checkout that is not installed


def _say(text: str) -> None:
    print(f"openrlhf-sd: {text}", file=sys.stderr, flush=True)


def _parser() -> CommandParser:
    parser = CommandParser("calib.automatic", __doc__)
    parser.add_argument("--model", required=True, metavar="DIR", help="folder or hub name of the policy")
    parser.add_argument("--logprobs", type=number(int, 0, 20), default=0, metavar="N", help="as in calib.sweep (default: 0)")
    scheme = default_quant(has_gpu())
    parser.add_argument("--quant", choices=QUANT_SCHEMES, default=scheme, help="drafter weights (default here: %(default)s)")
    parser.add_argument("--tensor-parallel-size", type=number(int, 1, 64), default=1, metavar="N", help="GPUs of an engine (default: 1)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
