"""What a GPU's data sheet says, for `--explain` on a machine without that GPU.

Figures are NVIDIA's, per GPU: "A100 Tensor Core GPU" data sheet (SXM columns), "H100 Tensor Core GPU" (SXM), "H200 Tensor Core GPU"
(SXM), "HGX B200" (an eighth of the system). Peaks are dense: data sheets from Hopper on print twice as much, with sparsity. A gigabyte of
a data sheet is 1e9 bytes here; drivers show a few per cent more (42.4e9 for the A100 of 40 GB), so what is planned with these numbers is
planned with a little less than there is.
"""

from __future__ import annotations

import dataclasses
import subprocess
from dataclasses import dataclass

from openrlhf_sd.config import SelfSpecError


@dataclass(frozen=True)
class Gpu:
    """None is not known."""

    device: str
    """The driver's name, which calibrations go by."""

    chip: str | None
    """GPUs of one chip differ in their memory only."""

    memory_bytes: int
    bandwidth_bytes_per_s: float | None = None
    bf16_flops_per_s: float | None = None


GPUS = {
    "a100-80gb": Gpu("NVIDIA A100-SXM4-80GB", "GA100", 80_000_000_000, 2.039e12, 3.12e14),
    "a100-40gb": Gpu("NVIDIA A100-SXM4-40GB", "GA100", 40_000_000_000, 1.555e12, 3.12e14),
    "h100": Gpu("NVIDIA H100 80GB HBM3", "GH100", 80_000_000_000, 3.35e12, 9.895e14),
    "h200": Gpu("NVIDIA H200", "GH100", 141_000_000_000, 4.8e12, 9.895e14),
    "b200": Gpu("NVIDIA B200", "GB100", 180_000_000_000, 8.0e12, 2.25e15),
}


def named_gpu(name: str, flag: str) -> Gpu:
    """Raises SelfSpecError for a name that the table does not have."""
    if name.lower() not in GPUS:
        raise SelfSpecError(f"{flag}: {name!r} is not in the table of GPUs; choose one of {', '.join(GPUS)}")
    return GPUS[name.lower()]


def same_chip(device: str) -> list[Gpu]:
    """The other GPUs of the table made of `device`'s chip."""
    chips = {gpu.chip for gpu in GPUS.values() if gpu.device == device}
    return [gpu for gpu in GPUS.values() if gpu.chip in chips and gpu.device != device]


def gpu_here() -> Gpu | None:
    """The first GPU of this machine, with the memory its driver shows; None where vLLM runs on the CPU."""
    # Heavy on a machine with a GPU only: a call of nvidia-smi each.
    from calib.device import device_name, has_gpu

    if not has_gpu():
        return None
    command = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    mebibytes = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[0])
    device = device_name()
    known = next((gpu for gpu in GPUS.values() if gpu.device == device), Gpu(device, chip=None, memory_bytes=0))
    return dataclasses.replace(known, memory_bytes=mebibytes << 20)
