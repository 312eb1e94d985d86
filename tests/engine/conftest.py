from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import lanes
import pytest
from filelock import FileLock

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


@pytest.fixture(scope="session")
def warm_policy(tmp_path_factory) -> Path:
    """The quickstart's policy after its real warm start, made once for all lanes."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if lanes.in_lane() else base) / "quickstart"
    with FileLock(f"{folder}.lock"):
        if not (folder / "warm").exists():
            quickstart = Path(__file__).parents[2] / "examples" / "quickstart"
            for step in (
                [quickstart / "build_model.py", "--out", folder / "random"],
                [quickstart / "warm_start.py", "--model", folder / "random", "--out", folder / "unfinished"],
            ):
                done = subprocess.run([sys.executable, *step], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
                assert done.returncode == 0, done.stdout[-3000:]
            (folder / "unfinished").rename(folder / "warm")
    return folder / "warm"


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
