"""The scripts of tests/upstream/: each fault that something here was made for is still there, without this package.

Where one is not any more, what was made for it can go.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parent / "upstream"
DOCUMENT = Path(__file__).parents[1] / "docs" / "upstream.md"
CPU_FLAGS = Path("/proc/cpuinfo").read_text().partition("flags")[2].partition("\n")[0].split()

SCRIPTS = sorted(script.stem for script in FOLDER.glob("*.py"))
ON_THEIR_OWN = ("deepspeed_cpu_collectives", "deepspeed_zero3_gather", "ray_children", "vllm_cpu_tied_head")
"""These start processes, or change what others would see. The rest share one process, and its imports."""

RUN_ALL = """
import json, runpy, sys
from importlib.util import find_spec
if find_spec("flash_attn") is None:  # OpenRLHF imports four functions of it, which none of this calls
    from openrlhf_sd.cpu.platform import PATCHES
    from openrlhf_sd.import_patches import patch_on_import
    patch_on_import({name: PATCHES[name] for name in ("openrlhf.models.ring_attn_utils",)})
for script in sys.argv[1:]:
    try:
        runpy.run_path(script, run_name="__main__")
        failure = None
    except BaseException as error:
        failure = repr(error)
    print(json.dumps({"script": script, "failure": failure}), flush=True)
"""


@pytest.fixture(scope="module")
def failures() -> dict[str, str | None]:
    """What each script that shares the process ended with, None where it showed its fault."""
    scripts = [str(FOLDER / f"{name}.py") for name in SCRIPTS if name not in ON_THEIR_OWN]
    ended = subprocess.run([sys.executable, "-c", RUN_ALL, *scripts], capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    rows = [json.loads(line) for line in ended.stdout.splitlines() if line.startswith('{"script"')]
    return {Path(row["script"]).stem: row["failure"] for row in rows}


def skip_where_it_cannot_show(name: str) -> None:
    if ("cpu" in name or name.startswith(("deepspeed", "torch"))) and torch.cuda.is_available():
        pytest.skip("a fault of the CPU stack")
    if name == "torch_bf16_products" and "avx512f" in CPU_FLAGS:
        pytest.skip("this processor has AVX-512")
    if name == "vllm_cpu_int8_packing" and "avx512_vnni" in CPU_FLAGS:
        pytest.skip("this processor has AVX-512 VNNI")


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_fault_is_there(name, request, tmp_path):
    skip_where_it_cannot_show(name)
    if name not in ON_THEIR_OWN:
        assert request.getfixturevalue("failures")[name] is None
        return
    ended = subprocess.run([sys.executable, FOLDER / f"{name}.py"], capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert ended.returncode == 0, ended.stdout + ended.stderr


def test_every_script_is_in_the_document_and_uses_nothing_of_ours():
    document = DOCUMENT.read_text()
    for name in SCRIPTS:
        assert f"tests/upstream/{name}.py" in document
        assert "openrlhf_sd" not in (FOLDER / f"{name}.py").read_text()
