"""`python -m openrlhf_sd.bench` on real engines, with as little to measure as it takes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import pytest

from openrlhf_sd import bench

pytestmark = pytest.mark.whole_machine


def test_a_model_that_is_nowhere_is_one_line(capsys):
    assert bench.main(["--models", "nowhere", "--quant", "w8a8"]) == 2
    assert capsys.readouterr().err.startswith("bench: error: model: 'nowhere' holds no readable config.json")


def test_sigterm_ends_it_the_way_that_vllm_ends_its_engines_in(monkeypatch):
    monkeypatch.setattr(bench, "bench", lambda args: os.kill(os.getpid(), signal.SIGTERM))
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as ended:
        bench.main([])
    assert ended.value.code == 128 + signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is before


def test_bench_compares_with_plain_vllm(untied_policy, tmp_path):
    sizes = ["--quant", "w8a8", "--batches", "2", "--gammas", "0,1", "--rounds", "1", "--tokens", "8"]
    command = [sys.executable, "-m", "openrlhf_sd.bench", "--models", str(untied_policy), *sizes, "--out", str(tmp_path)]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert finished.returncode == 0, finished.stdout[-3000:] + finished.stderr[-3000:]
    [model] = json.loads((tmp_path / "bench.json").read_text())["models"]
    assert [cell["draft"] for cell in model["cells"]] == [0, 1]
    assert all(cell["ratio_median"] > 0 for cell in model["cells"])
    assert model["cells"][1]["mean_acceptance_length"] >= 1
