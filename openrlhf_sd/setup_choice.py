"""What the setup decides, as pure functions: which stack, which Python, which pip commands, what a failed pip means.

Standard library only, and parsable by Pythons too old to run the rest: it has to tell them so.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from openrlhf_sd.config import SelfSpecError

PYTHONS = ((3, 11), (3, 12))
"""openrlhf 0.11.2 has wheels for 3.10 to 3.12; the pinned numpy and scipy need 3.11.
3.11 is the verified one, hence first."""

REQUIREMENTS = {"cpu": ("requirements-cpu.txt", "requirements-cpu-nodeps.txt"), "cuda": ("requirements.txt",)}

NEEDED_BYTES = {"cpu": 6e9, "cuda": 20e9}
"""Free space to start with. CPU: 3.3 GB measured, and what pip unpacks meanwhile. CUDA: 9.1 GB measured without flash-attn, and pip's
downloads and the compilation of flash-attn meanwhile."""

NO_CPU_BUILD = "No matching distribution found"


@dataclass(frozen=True)
class Machine:
    """What was found on the machine.

    Args:
        nvidia_smi: output of `nvidia-smi -L`, or None where there is no such command.
        driver_gpus: number of GPUs the kernel driver lists.
        device_nodes: number of /dev/nvidia0, /dev/nvidia1, ...; a container has only those it was given.
    """

    nvidia_smi: str | None
    driver_gpus: int
    device_nodes: int


def pick_stack(machine: Machine) -> tuple[str, str]:
    """("cpu" or "cuda", the reason in half a sentence)."""
    listed = re.findall(r"^GPU \d+: (.*?)(?: \(UUID.*)?$", machine.nvidia_smi or "", re.MULTILINE)
    if listed:
        return "cuda", f"nvidia-smi lists {_count(len(listed))}, {listed[0]}"
    usable = min(machine.driver_gpus, machine.device_nodes)
    if usable:
        return "cuda", f"the NVIDIA driver lists {_count(usable)}"
    if machine.nvidia_smi is not None:
        return "cpu", "nvidia-smi is there but lists no GPU"
    if machine.driver_gpus:
        return "cpu", "the NVIDIA driver is there but this machine or container was given no GPU"
    return "cpu", "no NVIDIA GPU and no NVIDIA driver here"


def _count(gpus: int) -> str:
    return f"{gpus} GPU" if gpus == 1 else f"{gpus} GPUs"


def choose_python(candidates: Sequence[str], version_of: Callable[[str], tuple[int, int] | None]) -> str:
    """The first candidate with the verified version, or else with another supported one.

    Args:
        version_of: command -> (major, minor), or None where there is no such command or it does not run.

    Raises:
        SelfSpecError: none has; the message says which version the first one is.
    """
    versions = [version_of(command) for command in candidates]
    for supported in PYTHONS:
        if supported in versions:
            return candidates[versions.index(supported)]
    raise SelfSpecError(unsupported_python(versions[0]))


def unsupported_python(version: tuple[int, int] | None) -> str:
    found = "a broken Python" if version is None else f"Python {version[0]}.{version[1]}"
    return (
        f"{found} is not supported: the pinned stack needs Python 3.11 (verified) or 3.12; "
        "install python3.11 and its venv module, and run this again"
    )


def pins(requirements: str) -> dict[str, str]:
    """Package name, normalized, without extras -> its line `name[extras]==version; marker`."""
    lines = (line.split("#")[0].strip() for line in requirements.splitlines())
    return {re.sub(r"[-_.]+", "-", re.split(r"[\[=<>;!~ ]", line)[0]).lower(): line for line in lines if line}


@dataclass(frozen=True)
class Stage:
    """One step of the installation. `otherwise` is run after `commands` failed because no such build was found."""

    title: str
    commands: tuple[tuple[str, ...], ...]
    otherwise: tuple[tuple[str, ...], ...] = ()


def plan(stack: str, python: str, requirements: dict[str, str], root: str) -> list[Stage]:
    """The commands that fill the environment of `python`.

    Args:
        requirements: file name -> text, for the files of `REQUIREMENTS[stack]`.
    """
    # Byte code is left to the first import: most of what is installed never has one, and compiling all of it took a minute and a half.
    pip = (python, "-m", "pip", "install", "--disable-pip-version-check", "--no-input", "--progress-bar=off", "--no-compile")
    # Build isolation would fetch setuptools once more; the stacks bring one that is new enough.
    ours = Stage("openrlhf_sd itself", ((*pip, "--no-deps", "--no-build-isolation", "--editable", root),))
    if stack == "cpu":
        listed, without_deps = REQUIREMENTS["cpu"]
        torch = pins(requirements[listed])["torch"]
        uv = (python, "-m", "uv", "pip", "install", "--python", python, "--torch-backend=cpu", torch)
        return [
            # Where pip is not configured for it, it finds only the CUDA build; uv knows where PyTorch keeps the others.
            Stage(f"{torch}, CPU build", ((*pip, f"{torch}+cpu"),), otherwise=((*pip, "uv"), uv)),
            Stage(listed, ((*pip, "-r", f"{root}/{listed}"),)),
            Stage(without_deps, ((*pip, "--no-deps", "-r", f"{root}/{without_deps}"),)),
            ours,
        ]
    (listed,) = REQUIREMENTS["cuda"]
    torch, flash_attn = (pins(requirements[listed])[name] for name in ("torch", "flash-attn"))
    return [
        Stage(
            f"{torch} and build tools",
            ((*pip, torch, "setuptools>=77,<81", "wheel", "packaging", "ninja", "psutil"),),
        ),
        Stage(
            f"{flash_attn}, compiled where no wheel fits, for up to an hour",
            ((*pip, "--no-build-isolation", flash_attn),),
        ),
        Stage(listed, ((*pip, "-r", f"{root}/{listed}"),)),
        ours,
    ]


def progress(output: str) -> str:
    """What pip or uv is busy with, in a few words, from what it printed so far."""
    for line in reversed(output.splitlines()):
        words = line.split()
        if line.startswith("Installing collected packages: "):
            return f"unpacking {len(words) - 3} packages"
        if words[:3] == ["Building", "wheel", "for"]:
            return f"building {words[3]}"
        if words[:1] in (["Downloading"], ["Collecting"]):
            return " ".join([words[0].lower(), *words[1:]])[:90]
    return "working"


def explain_failure(output: str) -> str:
    """One line on why pip, uv or venv failed, from what it printed."""
    if "No space left on device" in output or "Disk quota exceeded" in output:
        return "the disk is full; free some space, or point TMPDIR and --venv to a larger disk, and run this again"
    if re.search(
        r"NewConnectionError|NameResolutionError|Name or service not known|Temporary failure in name resolution"
        r"|Network is unreachable|Max retries exceeded|ConnectTimeout|ReadTimeout|error sending request|dns error",
        output,
    ):
        return "no network: pip cannot reach its package index; connect, or configure pip for another"
    if "CUDA_HOME" in output or "nvcc was not found" in output:
        return "flash-attn must be compiled and there is no nvcc; install torch's CUDA toolkit, set CUDA_HOME"
    if "ensurepip is not available" in output or "No module named venv" in output:
        return "this Python lacks its venv module; install it (Debian, Ubuntu: apt-get install python3-venv)"
    lines = [line.strip() for line in output.splitlines() if line.strip() and " is ignored: " not in line]
    errors = [line for line in lines if line.lower().startswith(("error", "fatal")) or "Error: " in line]
    return (errors or lines or ["it printed nothing"])[-1]
