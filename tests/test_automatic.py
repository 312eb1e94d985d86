"""`--self-spec.calibration auto` without an engine: what it keeps, when it measures, what it says when that fails."""

import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from calibrations import CONFIG, make_calibration, make_rows

from calib import automatic
from calib.sweep_csv import write
from openrlhf_sd.calibration import load
from openrlhf_sd.config import SelfSpecError

CPU = "Some CPU, 2 cores"


@pytest.fixture
def model(tmp_path, monkeypatch):
    """A model folder, an empty cache, and a machine of a fixed name."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(automatic, "device_name", lambda: CPU)
    folder = tmp_path / "Some-7B"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


@pytest.fixture
def sweeps(monkeypatch):
    """In place of measuring: a file of made-up times; the list of sweeps asked for."""
    asked = []

    def sweep(model, quant, tensor_parallel_size, logprobs, out):
        asked.append((Path(model).name, quant, tensor_parallel_size))
        time.sleep(0.05)
        write(out, make_rows(make_calibration(), device=CPU))

    monkeypatch.setattr(automatic, "_sweep", sweep)
    return asked


def test_measures_once_and_reuses_what_it_kept(model, sweeps, capsys):
    path = automatic.calibrate_this_machine(model, "w4")
    assert path.parent == automatic.cache_folder()
    assert (load(path).device, load(path).quant, load(path).model) == (CPU, "w4", "Some-7B")
    capsys.readouterr()
    assert automatic.calibrate_this_machine(str(model), "w4", 1) == path
    assert sweeps == [("Some-7B", "w4", 1)]
    assert capsys.readouterr().err.count("\n") == 1


def test_two_callers_at_once_measure_once(model, sweeps):
    found = []

    def call():
        found.append(automatic.calibrate_this_machine(model, "w4"))

    callers = [threading.Thread(target=call) for _ in range(2)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert len(sweeps) == 1 and found[0] == found[1]


def test_another_machine_drafter_rank_count_or_shape_is_another_calibration(model):
    identity = {"device": CPU, "quant": "w4", "tensor_parallel_size": 1}
    keys = {
        automatic.sweep_key(identity, CONFIG, 0),
        automatic.sweep_key({**identity, "device": "Some CPU, 4 cores"}, CONFIG, 0),
        automatic.sweep_key({**identity, "quant": "w8a8"}, CONFIG, 0),
        automatic.sweep_key({**identity, "tensor_parallel_size": 2}, CONFIG, 0),
        automatic.sweep_key(identity, CONFIG, 1),
        automatic.sweep_key(identity, {**CONFIG, "num_hidden_layers": 29}, 0),
    }
    assert len(keys) == 6
    assert automatic.sweep_key(identity, {**CONFIG, "_name_or_path": "elsewhere"}, 0) in keys


def test_other_versions_measure_anew(model, monkeypatch):
    identity = {"device": CPU, "quant": "w4", "tensor_parallel_size": 1}
    before = automatic.sweep_key(identity, CONFIG, 0)
    monkeypatch.setattr(automatic, "installed_version", lambda package: "9.9.9")
    assert automatic.sweep_key(identity, CONFIG, 0) != before


def test_steps_without_torch_compile_are_other_steps(model, monkeypatch):
    identity = {"device": CPU, "quant": "w4", "tensor_parallel_size": 1}
    monkeypatch.delenv("TORCH_COMPILE_DISABLE", raising=False)
    before = automatic.sweep_key(identity, CONFIG, 0)
    monkeypatch.setenv("TORCH_COMPILE_DISABLE", "0")
    assert automatic.sweep_key(identity, CONFIG, 0) == before
    monkeypatch.setenv("TORCH_COMPILE_DISABLE", "1")
    assert automatic.sweep_key(identity, CONFIG, 0) != before


def test_a_kept_file_that_was_spoilt_is_an_error_that_names_it(model, sweeps):
    path = automatic.calibrate_this_machine(model, "w4")
    path.write_text(path.read_text()[:-20])
    with pytest.raises(SelfSpecError, match=path.name):
        automatic.calibrate_this_machine(model, "w4")
    assert len(sweeps) == 1


def test_a_shipped_calibration_is_taken_without_measuring(model, sweeps, monkeypatch, tmp_path):
    shipped = tmp_path / "shipped.json"
    make_calibration(device=CPU).save(shipped)
    monkeypatch.setattr("openrlhf_sd.calibration.shipped_paths", lambda: [shipped])
    monkeypatch.setattr(automatic, "shipped_paths", lambda: [shipped])
    assert automatic.calibrate_this_machine(model, "w4") == shipped
    assert sweeps == []


def test_a_failed_sweep_is_one_error_with_what_it_said_and_keeps_nothing(model, monkeypatch):
    def run(command, **kwargs):
        assert command[1:3] == ["-m", "calib.sweep"] and "--quick" in command
        return subprocess.CompletedProcess(command, 2, stderr="calib.sweep: the engine could not start: no memory\n")

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(SelfSpecError, match=r"(?s)--self-spec.calibration auto: .*engine could not start: no memory"):
        automatic.calibrate_this_machine(model, "w4")
    assert not list(automatic.cache_folder().glob("*.json"))


def test_the_command_prints_the_path_and_nothing_else_on_stdout(model, sweeps, capsys):
    assert automatic.main(["--model", str(model), "--quant", "w4"]) == 0
    path = automatic.calibrate_this_machine(model, "w4")
    assert capsys.readouterr().out == f"{path}\n"


def test_a_folder_without_a_model_is_exit_code_2(tmp_path):
    command = [sys.executable, "-m", "calib.automatic", "--model", str(tmp_path), "--quant", "w4"]
    finished = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert finished.returncode == 2
    assert finished.stderr.startswith("calib.automatic: --model: no ") and finished.stderr.count("\n") == 1
