"""A calibration survives its file; a bad or foreign one is one error with its mend; the shipped ones are in the wheel."""

import copy
import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from calibrations import CONFIG, DEVICE, make_calibration

from calib.fit_provenance import fit_provenance
from calib.sweep_csv import Timing, point_digests, read_sweep
from openrlhf_sd import calibration as calibration_file
from openrlhf_sd.calibration import Calibration, check_matches, load, shipped, shipped_paths
from openrlhf_sd.config import SelfSpecError

ROOT = Path(__file__).parents[1]
TIMINGS = [Timing("target", 1, 256, 0, 0.01), Timing("verify", 1, 256, 7, 0.012)]


def load_error(path):
    with pytest.raises(SelfSpecError) as caught:
        load(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and "\n" not in message
    return message


def test_a_saved_calibration_loads_equal_and_predicts_the_same(tmp_path):
    calibration = make_calibration(fitted_on=TIMINGS)
    calibration.save(tmp_path / "cal.json")
    loaded = load(tmp_path / "cal.json")
    assert loaded == calibration
    assert loaded.provenance.fitted_points == point_digests(TIMINGS)
    assert loaded.cost_model.verify_step_s(16, 2048, 7) == calibration.cost_model.verify_step_s(16, 2048, 7)


def test_saving_leaves_no_half_written_file(tmp_path):
    make_calibration().save(tmp_path / "cal.json")
    assert [path.name for path in tmp_path.iterdir()] == ["cal.json"]


SPOILED = {
    "missing key": (["device"], None, "device: missing"),
    "unknown key": (["colour"], "red", "colour: unknown key"),
    "wrong type": (["model"], 7, "model: is 7"),
    "a truth value for a number": (["tensor_parallel_size"], True, "tensor_parallel_size: is True"),
    "another tensor parallel size than the model constants": (
        ["tensor_parallel_size"],
        2,
        "tensor_parallel_size: is 2",
    ),
    "unknown kind": (["kind"], "guessed", "kind: is 'guessed'"),
    "another drafter than the cost model": (["quant"], "w8a8", "quant: is 'w8a8'"),
    "later format": (["format"], 2, "format: is 2"),
    "negative shape": (["cost_model", "constants", "num_layers"], -28, "-28"),
    "missing part of the cost model": (["cost_model", "terms"], None, "terms"),
    "unknown part of the cost model": (["cost_model", "fudge"], 1.0, "fudge"),
    "missing model constant": (["cost_model", "constants", "hidden_size"], None, "hidden_size"),
    "a table that is a list": (["cost_model"], [], "cost_model: is []"),
    "missing provenance": (["provenance", "sweep_sha256"], None, "provenance.sweep_sha256: missing"),
    "a fitted point that is none": (["provenance", "fitted_points"], {"1,256": "00"}, "'1,256'"),
}


@pytest.mark.parametrize("name", SPOILED)
def test_a_hand_edited_file_is_one_error_naming_the_key(tmp_path, name):
    keys, value, expected = SPOILED[name]
    document = make_calibration(fitted_on=TIMINGS).to_dict()
    table = document
    for key in keys[:-1]:
        table = table[key]
    if value is None:
        del table[keys[-1]]
    else:
        table[keys[-1]] = value
    path = tmp_path / "cal.json"
    path.write_text(json.dumps(document))
    assert expected in load_error(path)


def fitted_numbers(document):
    """(table, key) of every number in the cost model's terms."""
    tables = [document["cost_model"]["terms"]]
    for table in tables:
        for key, value in table.items():
            if isinstance(value, dict):
                tables.append(value)
            elif isinstance(value, float):
                yield table, key


@pytest.mark.parametrize("value", [-1e-6, float("nan"), float("inf"), "fast", None])
def test_every_fitted_term_must_be_a_finite_number_of_zero_or_more(tmp_path, value):
    document = make_calibration().to_dict()
    names = [key for _, key in fitted_numbers(document)]
    assert names
    for index, name in enumerate(names):
        spoiled = copy.deepcopy(document)
        table, key = list(fitted_numbers(spoiled))[index]
        table[key] = value
        path = tmp_path / "cal.json"
        path.write_text(json.dumps(spoiled))
        message = load_error(path)
        assert name in message or "NaN" in message or "Infinity" in message


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "line 1 is not JSON"),
        (b"{", "is not JSON"),
        (b"[1]", "holds list"),
        (b"\xff\xfe", "not a text file"),
        (b'{"format": ' + b"1" * 5000 + b"}", "Exceeds the limit"),
        (b"[" * 100_000, "recursion depth"),
        (None, "cannot be read"),
    ],
)
def test_what_is_no_calibration_at_all_is_one_error(tmp_path, content, expected):
    path = tmp_path / "cal.json"
    if content is not None:
        path.write_bytes(content)
    assert expected in load_error(path)


HERE = {"device": DEVICE, "model_config": CONFIG, "quant": "w4", "tensor_parallel_size": 1}


def test_the_right_calibration_matches():
    check_matches(make_calibration(), **HERE)
    # names do not count, shapes do: a fine-tuned checkpoint elsewhere on disk has the same step times
    check_matches(make_calibration(model="another-name"), **HERE)


@pytest.mark.parametrize(
    ("changed", "expected", "remedy"),
    [
        ({"device": "Other GPU"}, "measured on Some GPU, this is Other GPU", "python -m calib.sweep"),
        ({"quant": "w8a8"}, "for a w4 drafter, the run has --self-spec.quant w8a8", "python -m calib.fit"),
        ({"tensor_parallel_size": 2}, "for tensor parallel size 1, the run has 2", "--self-spec.calibration auto"),
        (
            {"model_config": CONFIG | {"num_hidden_layers": 48}},
            "another model than the policy (num_layers 28 there, 48 here)",
            "python -m calib.transfer",
        ),
    ],
)
def test_a_foreign_calibration_is_an_error_that_says_how_to_make_the_right_one(changed, expected, remedy):
    with pytest.raises(SelfSpecError) as caught:
        check_matches(make_calibration(), **HERE | changed)
    message = str(caught.value)
    assert message.startswith("--self-spec.calibration: ") and expected in message and remedy in message and "\n" not in message


def test_the_shipped_lookup_takes_the_exact_match_and_the_best_kind(tmp_path, monkeypatch):
    for kind in ("transferred", "fitted", "few-shot"):
        make_calibration(kind=kind).save(tmp_path / f"{kind}.json")
    make_calibration(device="Other GPU").save(tmp_path / "other.json")
    monkeypatch.setattr(calibration_file, "shipped_paths", lambda: sorted(tmp_path.glob("*.json")))
    assert shipped(**HERE) == make_calibration()
    (tmp_path / "fitted.json").unlink()
    assert shipped(**HERE).kind == "few-shot"
    assert shipped(**HERE | {"device": "Other GPU"}).device == "Other GPU"
    for changed in (
        {"device": "No GPU"},
        {"quant": "w8a8"},
        {"tensor_parallel_size": 2},
        {"model_config": CONFIG | {"vocab_size": 32000}},
    ):
        assert shipped(**HERE | changed) is None


def test_every_shipped_file_loads_and_names_no_folder():
    for path in shipped_paths():
        calibration = load(path)
        assert not any(re.match(r"/|~", token) for token in calibration.provenance.argv), path
        assert "/" not in calibration.provenance.sweep_file, path


def test_a_wheel_installs_the_shipped_calibrations(tmp_path):
    source, installed = tmp_path / "source", tmp_path / "installed"
    source.mkdir()
    for name in ("pyproject.toml", "setup.cfg", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for package in ("openrlhf_sd", "calib"):
        shutil.copytree(ROOT / package, source / package, ignore=shutil.ignore_patterns("__pycache__"))
    (source / "calib" / "shipped").mkdir(exist_ok=True)
    make_calibration().save(source / "calib" / "shipped" / "some-7b.json")
    expected = {path.name for path in shipped_paths()} | {"some-7b.json"}
    build = "import sys; from setuptools.build_meta import build_wheel; build_wheel(sys.argv[1])"
    subprocess.run([sys.executable, "-c", build, str(tmp_path)], cwd=source, check=True, capture_output=True)
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        wheel.extractall(installed)
    # isolated from this checkout, which an editable install may have put on the path
    script = (
        "import sys; sys.path.insert(0, sys.argv[1]); from openrlhf_sd import calibration as c; "
        "print(c.__file__); print(*(c.load(path) and path.name for path in c.shipped_paths()))"
    )
    command = [sys.executable, "-S", "-c", script, str(installed)]
    shown = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True, env={"PATH": os.environ["PATH"]})
    where, names = shown.stdout.splitlines()
    assert where.startswith(str(installed)) and set(names.split()) == expected


def test_reading_a_calibration_needs_the_standard_library_only():
    heavy = {"numpy", "scipy", "torch", "vllm", "ray"}
    script = f"import sys; import openrlhf_sd.calibration; print(*{heavy} & set(sys.modules))"
    shown = subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True, capture_output=True, text=True)
    assert shown.stdout.split() == []


def test_provenance_holds_every_point_that_the_fit_was_offered(tmp_path):
    path = tmp_path / "sweep.csv"
    path.write_text(
        "model,batch,seq,gamma,mode,mean_ms,median_ms,std_ms,min_ms,max_ms,n_samples\n"
        "M,1,256,0,target_decode,10,10,0,10,10,9\nM,1,256,7,target_verify,12,12,0,12,12,9\n"
    )
    sweep = read_sweep(path)
    provenance = fit_provenance(["--sweep", "sweep.csv"], sweep)
    assert provenance.fitted_points == point_digests(sweep.timings) and provenance.sweep_sha256 == sweep.sha256
    assert provenance.sweep_file == "sweep.csv"
    part = dataclasses.replace(sweep, timings=sweep.timings[:1])
    assert set(fit_provenance([], part).fitted_points) == {(1, 256, 0)}
    calibration = make_calibration(provenance=provenance)
    assert Calibration.from_dict(json.loads(json.dumps(calibration.to_dict()))) == calibration
