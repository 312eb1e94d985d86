"""Installs everything into a virtual environment: `examples/setup.sh [--venv DIR] [--need-gpu] [--dry-run]`.

Looks at the machine, picks the CPU or the CUDA stack, says which and why, installs it and imports it once. Run again it
finds its own stamp and is done. Progress goes to stderr; stdout carries one line, the path of the environment's Python:

    python=$(bash examples/setup.sh)

Exit codes: 0 installed, 2 not installed and one line says why, 130 interrupted.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from openrlhf_sd import setup_choice
from openrlhf_sd.config import SelfSpecError
from openrlhf_sd.setup_choice import Machine, Stage

ROOT = Path(__file__).resolve().parent.parent
STAMP = "openrlhf_sd-stack.txt"
LOG = "openrlhf_sd-setup.log"
HEARTBEAT_S = 15.0


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="examples/setup.sh", description=__doc__.split("\n\n")[1])
    parser.add_argument("--venv", help="environment to fill or make; default: the active one, else .venv in the repo")
    parser.add_argument("--need-gpu", action="store_true", help="stop where the machine has no NVIDIA GPU")
    parser.add_argument("--dry-run", action="store_true", help="print what would be done")
    parser.add_argument("--called-from", default=".", help=argparse.SUPPRESS)  # --venv is relative to this
    args = parser.parse_args(argv)
    try:
        # Resolved without following links: an environment's python is a link to the one it was made from.
        venv = Path(args.called_from, args.venv).absolute() if args.venv else default_venv()
        python = setup(venv, args.need_gpu, args.dry_run)
    except SelfSpecError as error:
        print(f"setup: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("setup: interrupted; run it again to go on", file=sys.stderr)
        return 130
    if not args.dry_run:
        print(python)
    return 0


def setup(venv: Path, need_gpu: bool, dry_run: bool) -> Path:
    """Install, unless installed. Returns the environment's Python. Raises SelfSpecError, one line on what is wrong."""
    start = time.monotonic()
    if platform.system() != "Linux":
        raise SelfSpecError(f"{platform.system()} is not supported: vLLM, DeepSpeed and the pinned wheels need Linux")
    stack, reason = setup_choice.pick_stack(look_at_machine())
    if need_gpu and stack != "cuda":
        raise SelfSpecError(f"this needs an NVIDIA GPU: {reason}")
    say(f"{stack.upper()} stack, because {reason}")

    python = venv / "bin" / "python"
    exists = python.exists() and (venv / "bin" / "pip").exists()
    if exists:
        base = str(python)
        if python_version(base) not in setup_choice.PYTHONS:
            raise SelfSpecError(f"{venv}: {setup_choice.unsupported_python(python_version(base))} (or name another --venv)")
    else:
        names = (f"python{major}.{minor}" for major, minor in setup_choice.PYTHONS)
        # Every place on the path: the first one may be a version manager's shim that does not run.
        found = [path for name in names for folder in os.get_exec_path() if (path := shutil.which(name, path=folder))]
        base = setup_choice.choose_python([sys.executable, *found], python_version)
    requirements = {name: (ROOT / name).read_text() for name in setup_choice.REQUIREMENTS[stack]}
    stages = setup_choice.plan(stack, str(python), requirements, str(ROOT))
    stamp = make_stamp(stack, venv, requirements)
    installed = (venv / STAMP).is_file() and (venv / STAMP).read_text() == stamp

    if dry_run:
        state = "up to date" if installed else "to be filled" if exists else f"to be made with {base}"
        say(f"environment {venv}: {state}")
        for stage in stages:
            for command in stage.commands:
                say("would run " + shlex.join(command))
            for command in stage.otherwise:
                say("  or, where that finds no such build: " + shlex.join(command))
        return python
    if installed:
        say(f"{venv} is up to date")
        return python

    check_machine(stack, venv)
    if not exists:
        say(f"making {venv} with {base}")
        make_venv(base, venv)
    (venv / STAMP).unlink(missing_ok=True)
    log = venv / LOG
    log.unlink(missing_ok=True)
    for number, stage in enumerate(stages, 1):
        run_stage(f"[{number}/{len(stages) + 1}]", stage, log)
    check_imports(f"[{len(stages) + 1}/{len(stages) + 1}]", stack, python, log)
    (venv / STAMP).write_text(stamp)
    activate = shlex.quote(str(venv / "bin" / "activate"))
    say(f"installed in {time.monotonic() - start:.0f} s; activate it with: . {activate}")
    return python


def default_venv() -> Path:
    """The environment this runs in, or else .venv of the repository."""
    return Path(sys.prefix) if sys.prefix != sys.base_prefix else ROOT / ".venv"


def look_at_machine() -> Machine:
    try:
        nvidia_smi = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60).stdout
    except FileNotFoundError:
        nvidia_smi = None
    except subprocess.TimeoutExpired:
        raise SelfSpecError("nvidia-smi -L does not answer; mend the NVIDIA driver and run this again") from None
    driver = Path("/proc/driver/nvidia/gpus")
    return Machine(
        nvidia_smi=nvidia_smi,
        driver_gpus=len(list(driver.iterdir())) if driver.is_dir() else 0,
        device_nodes=len(list(Path("/dev").glob("nvidia[0-9]*"))),
    )


def python_version(command: str) -> tuple[int, int] | None:
    """(major, minor) of a Python, or None where it does not run, as a version manager's shim may not."""
    program = "import sys; print(*sys.version_info[:2])"
    found = subprocess.run([command, "-c", program], capture_output=True, text=True, stdin=subprocess.DEVNULL)
    return None if found.returncode else tuple(map(int, found.stdout.split()))  # type: ignore[return-value]


def check_machine(stack: str, venv: Path) -> None:
    """Raises SelfSpecError for what would end the installation minutes later, or vLLM at its first start."""
    folder = next(path for path in (venv, *venv.parents) if path.exists())
    free, needed = shutil.disk_usage(folder).free, setup_choice.NEEDED_BYTES[stack]
    if free < needed:
        raise SelfSpecError(
            f"{folder} has {free / 1e9:.1f} GB free and the {stack.upper()} stack takes about {needed / 1e9:.0f} GB; "
            "free some space, or give --venv DIR on a larger disk"
        )
    if venv.exists() and any(venv.iterdir()) and not (venv / "pyvenv.cfg").exists():
        raise SelfSpecError(f"--venv: {venv} holds something else than an environment; give another folder")
    if stack == "cpu":
        try:
            ctypes.CDLL("libnuma.so.1")
        except OSError:
            raise SelfSpecError(
                "vLLM for the CPU needs the system library libnuma.so.1; install it (Debian, Ubuntu: apt-get install libnuma1)"
            ) from None


def make_venv(base: str, venv: Path) -> None:
    made = subprocess.run([base, "-m", "venv", str(venv)], capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if made.returncode:
        raise SelfSpecError(f"making {venv}: {setup_choice.explain_failure(made.stdout + made.stderr)}")


def make_stamp(stack: str, venv: Path, requirements: dict[str, str]) -> str:
    """What a finished environment carries. It differs where a pin, the packaging, the checkout or the place does."""
    parts = [stack, str(venv), str(ROOT), (ROOT / "pyproject.toml").read_text(), *requirements.values()]
    return f"{stack} {hashlib.sha256(chr(0).join(parts).encode()).hexdigest()}\n"


def run_stage(number: str, stage: Stage, log: Path) -> None:
    say(f"{number} {stage.title}")
    start = time.monotonic()
    for command in stage.commands:
        output = run_logged(command, log)
        if output is None:
            continue
        if not stage.otherwise or setup_choice.NO_CPU_BUILD not in output:
            fail(stage.title, output, log)
        say(f"{number} pip finds no such build; trying with uv")
        for other in stage.otherwise:
            output = run_logged(other, log)
            if output is not None:
                fail(stage.title, output, log)
        break
    say(f"{number} done in {time.monotonic() - start:.0f} s")


def check_imports(number: str, stack: str, python: Path, log: Path) -> None:
    say(f"{number} importing everything once")
    start = time.monotonic()
    # Not from the repository's folder: there the package would be found even if it were not installed.
    command = [str(python), "-m", "openrlhf_sd.setup_imports", stack]
    keeping_byte_code = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    checked = subprocess.run(command, capture_output=True, text=True, cwd=log.parent, stdin=subprocess.DEVNULL, env=keeping_byte_code)
    with log.open("a") as file:
        file.write(f"$ {shlex.join(command)}\n{checked.stdout}{checked.stderr}")
    if checked.returncode < 0:  # where a library crashes, its last words are about something else
        fail("importing the stack", f"ended by {signal.Signals(-checked.returncode).name}", log)
    if checked.returncode:
        fail("importing the stack", checked.stderr, log)
    for line in checked.stdout.splitlines():
        if line.startswith("note: "):
            say(line)
    say(f"{number} done in {time.monotonic() - start:.0f} s")


def run_logged(command: Sequence[str], log: Path) -> str | None:
    """Run, output into the log, a sign of life every `HEARTBEAT_S`. Returns None, or what a failed command printed."""
    start = time.monotonic()
    with log.open("a") as file:
        file.write(f"$ {shlex.join(command)}\n")
        file.flush()
        begin = file.tell()
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, cwd=ROOT)
        try:
            while process.poll() is None:
                try:
                    process.wait(HEARTBEAT_S)
                except subprocess.TimeoutExpired:
                    say(f"      {time.monotonic() - start:3.0f} s  {setup_choice.progress(log.read_text())}")
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
    if process.returncode == 0:
        return None
    with log.open() as file:
        file.seek(begin)
        return file.read()


def fail(title: str, output: str, log: Path) -> None:
    raise SelfSpecError(f"{title}: {setup_choice.explain_failure(output)} (log: {log})")


def say(line: str) -> None:
    print(f"setup: {line}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
