"""Imports the installed stack, in the environment it was installed into, and says what only some uses of it would miss.

    python -m openrlhf_sd.setup_imports cpu|cuda

Exit code 1 with one line on stderr where an import fails; notes go to stdout.
"""

from __future__ import annotations

import importlib
import os
import shutil
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path

MODULES = (
    "torch",
    "transformers",
    "datasets",
    "deepspeed",
    "ray",
    "tensorboard",
    "torch.utils.tensorboard",
    "matplotlib.pyplot",
    "rich",
    "scipy",
    "hypothesis",
    "pytest",
    "xdist",
    "math_verify",
    "vllm",
    "vllm.v1.engine.async_llm",
    "vllm.entrypoints.llm",
    "vllm.v1.worker.gpu_worker",
    "openrlhf_sd.cpu.in_process_executor",
    "vllm.model_executor.model_loader",
    "vllm.model_executor.models.qwen2",
    "openrlhf.cli.train_ppo_ray",
    "openrlhf.trainer.ray.launcher",
    "openrlhf.trainer.ray.ppo_actor",
    "openrlhf.trainer.ppo_trainer_async",
    "openrlhf_sd.launch",
    "openrlhf_sd.engine.args",
)

KERNEL = "cpu_attention_with_kv_cache"
"""An operator that each of vLLM's CPU builds has."""


def main(argv: Sequence[str] | None = None) -> int:
    (stack,) = sys.argv[1:] if argv is None else argv
    from openrlhf_sd.cpu import platform
    from openrlhf_sd.engine import compat

    try:
        compat.check_versions()
        platform.is_needed()  # raises where the driver is too old for this build of torch
        if stack == "cpu":
            check_cpu_kernels()
            platform.install()
        for name in MODULES:
            importlib.import_module(name)
    except Exception as error:
        print(f"{type(error).__name__}: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    missing = missing_for_compilation()
    if missing:
        print(f"note: {missing} not found: vLLM can run, but only with enforce_eager (Debian, Ubuntu: apt-get install g++ python3-dev)")
    return 0


def check_cpu_kernels() -> None:
    """vLLM carries on without its kernels where they do not load, and fails much later.

    It chooses among its builds (AVX-512 with bf16, AVX-512, AVX2) by the processor; the wrong one would end this process.

    Raises:
        ImportError: none of them has loaded.
    """
    import torch
    from vllm.platforms import current_platform

    current_platform.import_kernels()
    if not hasattr(torch.ops._C, KERNEL):
        capability = torch.backends.cpu.get_cpu_capability()
        raise ImportError(f"vLLM's CPU kernels do not load on this processor ({capability}): no operator {KERNEL}")


def missing_for_compilation() -> str:
    """What torch.compile needs to build its kernels and this machine lacks, as half a sentence; empty if nothing."""
    compiler = os.environ.get("CXX", "g++")  # The one torch itself reads.
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    lacking = [] if shutil.which(compiler) else [f"a C++ compiler ({compiler})"]
    lacking += [] if header.is_file() else ["Python's C headers (Python.h)"]
    return " and ".join(lacking)


if __name__ == "__main__":
    sys.exit(main())
