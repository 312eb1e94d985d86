from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

# vLLM's engine processes are spawned, so what they need has to be in the environment before the first engine starts.
os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    # Tests send functions to the worker by collective_rpc.
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",
    # The engine process imports this folder's helpers (schedulers and workers made faulty on purpose) by name.
    "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]),
}
sys.path.insert(0, str(Path(__file__).parent))

from models import build_random_policy  # noqa: E402


@pytest.fixture(scope="session")
def tied_policy(tmp_path_factory) -> Path:
    return build_random_policy(tmp_path_factory.mktemp("tied"), tied=True)


@pytest.fixture(scope="session")
def untied_policy(tmp_path_factory) -> Path:
    return build_random_policy(tmp_path_factory.mktemp("untied"), tied=False)


@pytest.fixture(scope="session")
def small_vocab_policy(tmp_path_factory) -> Path:
    """64 tokens and a spread next-token distribution, so that 1,500 samples fill every cell of a chi-square table."""
    return build_random_policy(tmp_path_factory.mktemp("small"), tied=False, vocab_size=64, spread=0.13, seed=1)


class WarmStart:
    """The quickstart's real warm start, in a process beside the tests that do not need it."""

    def __init__(self) -> None:
        quickstart = Path(__file__).parents[2] / "examples" / "quickstart"
        self.folder = Path(tempfile.mkdtemp(prefix="openrlhf_sd-warm-"))
        commands = [
            [sys.executable, quickstart / "build_model.py", "--out", self.folder / "random"],
            [sys.executable, quickstart / "warm_start.py", "--model", self.folder / "random", "--out", self.folder / "warm"],
        ]
        line = " && exec ".join(shlex.join(map(str, command)) for command in commands)
        with open(self.folder / "log", "w") as log:
            self.process = subprocess.Popen(["bash", "-c", line], stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT)

    def policy(self) -> Path:
        assert self.process.wait() == 0, (self.folder / "log").read_text()[-3000:]
        return self.folder / "warm"

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)


WARM_START = pytest.StashKey[WarmStart]()


def pytest_collection_modifyitems(items) -> None:
    """Tests without an engine come first: they say most for their time, and the warm start is under way meanwhile."""
    items.sort(key=lambda item: "engine" in item.path.parts)


def pytest_collection_finish(session) -> None:
    if not session.config.option.collectonly and any("warm_policy" in item.fixturenames for item in session.items):
        session.config.stash[WARM_START] = WarmStart()


def pytest_unconfigure(config) -> None:
    warm_start = config.stash.get(WARM_START, None)
    if warm_start is not None:
        warm_start.end()


@pytest.fixture(scope="session")
def warm_policy(request) -> Path:
    """The quickstart's policy after its warm start."""
    return request.config.stash[WARM_START].policy()


@pytest.fixture(scope="session")
def plain_warm(warm_policy):
    """A plain engine of that policy."""
    from engines import plain_engine

    with plain_engine(warm_policy, logprobs_mode="processed_logprobs") as llm:
        yield llm


@pytest.fixture(scope="session", params=["w4", "w8a8"])
def speculating_warm(request, warm_policy, plain_warm):
    """(scheme, engine): up to 7 drafts, as each request says (`drafts_by_request.drafting`).

    After the plain one: an engine that starts takes the counts of all others in its process off vLLM's metrics.
    """
    from drafts_by_request import QUALNAME
    from engines import self_spec_engine

    from openrlhf_sd import SelfSpecConfig

    config = SelfSpecConfig(mode="auto", gamma_max=7, calibration="none", quant=request.param)
    with self_spec_engine(warm_policy, config, scheduler_cls=QUALNAME, logprobs_mode="processed_logprobs") as llm:
        yield request.param, llm


@pytest.fixture(scope="session")
def warm_calibration(warm_policy, tmp_path_factory) -> Path:
    """This machine's own quick calibration for that policy, as `--self-spec.calibration auto` makes it."""
    command = [sys.executable, "-m", "calib.automatic", "--model", str(warm_policy)]
    cache = str(tmp_path_factory.mktemp("calibration"))
    finished = subprocess.run(command, capture_output=True, text=True, timeout=400, env={**os.environ, "XDG_CACHE_HOME": cache})
    assert finished.returncode == 0, finished.stderr
    return Path(finished.stdout.strip())
