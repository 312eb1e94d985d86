"""Every command of README.md and docs/ is run here, or by a test that ELSEWHERE names, or is marked as one that no test can run.

A command is run as it is documented, by a shell, in a folder that has the files it names. Replaced is only what PLACEHOLDERS
lists; flags in brackets are given, and `more` makes a long simulation short. Lines of the launcher are dry-run, marked or not.
"""

from __future__ import annotations

import ast
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from calibrations import CONFIG, TERMS, make_calibration, write_published, write_sweep
from documented_commands import ROOT, commands_of, documented_commands
from explained_models import LLAMA_8B, QWEN_7B, QWEN_14B
from run_folders import FIXED, make_run
from zoo_fixture import PROBLEMS, byte_tokenizer, write_zoo

from calib import simulate_grid
from calib.sweep_csv import read_sweep
from openrlhf_sd.calibration import load
from openrlhf_sd.metrics import SpecDecodeCounts
from openrlhf_sd.policy.cost_model import CostModel
from openrlhf_sd.policy.model_constants import model_constants

# The launcher's scripts run by path, as a folder on sys.path, not as an installed package.
sys.path.insert(0, str(ROOT / "examples" / "launcher"))

import compare_arms  # noqa: E402
import run_arm  # noqa: E402

COMMANDS = documented_commands()

AUTOMATIC = "tests/test_automatic.py::test_the_command_prints_the_path_and_nothing_else_on_stdout"
QUICKSTART = "tests/engine/test_quickstart.py::test_quickstart"
COMPARISON = "tests/engine/test_quickstart.py::test_comparison_of_the_quickstart"
TRAINING = "tests/engine/test_grpo_end_to_end.py::test_every_rollout_has_its_row"
REPLAY = "tests/engine/test_quickstart.py::test_the_quickstart_is_replayed"
SWEEP = "tests/engine/test_sweep.py::test_sweep_is_interrupted_and_continued"
MATH_REWARD = "tests/test_math_reward.py::test_it_takes_more_right_answers_than_openrlhf_and_no_more_wrong_ones"
PLAIN_VLLM = """\
from vllm import LLM
from openrlhf_sd import SelfSpecConfig, engine_args

if __name__ == "__main__":  # on a CPU vLLM starts its processes by spawning
    llm = LLM(model, **engine_args(SelfSpecConfig(mode="fixed", gamma=3, quant="w4"), model))
    print(llm.generate("Hello")[0].outputs[0].text)
"""
TO_SAFETENSORS = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

AutoModelForCausalLM.from_pretrained("OLD", dtype="auto", trust_remote_code=False).save_pretrained("NEW")
AutoTokenizer.from_pretrained("OLD", trust_remote_code=False).save_pretrained("NEW")
"""
ELSEWHERE = {
    "bash examples/quickstart.sh": QUICKSTART,
    "bash examples/compare.sh quickstart": COMPARISON,
    "bash examples/compare.sh quickstart --arms vanilla,auto --seeds 1,2,3 --steps 8 --out runs/three-seeds": COMPARISON,
    "bash examples/setup.sh --dry-run": "tests/test_setup.py::test_dry_run_says_what_it_picked_and_touches_nothing",
    "bash tests/run.sh": "tests/test_run_script.py::test_without_flags_it_runs_what_is_neither_slow_nor_for_gpus",
    "bash tests/run.sh --all": "tests/test_run_script.py::test_all_is_what_this_machine_can_run",
    "openrlhf-sd --self-spec --self-spec.run_dir runs/a <all your flags of openrlhf.cli.train_ppo_ray>": TRAINING,
    "openrlhf-sd --self-spec.run_dir runs/b <the same flags>": TRAINING,
    "python -m openrlhf.cli.train_ppo_ray": TRAINING,
    "openrlhf-sd --explain": "tests/test_explain.py::test_a_good_run_is_explained_and_nothing_is_written",
    "python -m calib.sweep --model DIR --out sweep.csv [--quick]": SWEEP,
    "python -m openrlhf_sd.bench": "tests/engine/test_bench.py::test_bench_compares_with_plain_vllm",
    "python -m openrlhf_sd.simulator": "tests/test_simulator.py::test_a_calibration_alone_is_the_truth_that_all_policies_know",
    "python -m openrlhf_sd.simulator --trace quickstart_out/auto/metrics.jsonl --calibration quickstart_out/auto/calibration.json": REPLAY,
    "python -m calib.automatic --model DIR --logprobs 1": AUTOMATIC,
    "python -m calib.simulate_grid": "tests/test_documented_commands.py::test_simulate_grid",
    "python -m pytest tests/test_math_reward.py": MATH_REWARD,
    "python tests/upstream/vllm_stop_string.py": "tests/test_upstream_faults.py::test_the_fault_is_there",
    TO_SAFETENSORS: "tests/test_security.py::test_the_documented_conversion_keeps_weights_and_runs_no_code",
    PLAIN_VLLM: "tests/engine/test_plain_vllm.py::test_the_documented_script_runs",
}

GRID = (
    "python -m calib.simulate_grid --jobs 2 "
    "--model $OPENRLHF_SD_A100_SWEEPS/sweep_a100_tp1_qwen257b.csv $OPENRLHF_SD_A100_SWEEPS/qwen2.5-7b.config.json 7 "
    "--model $OPENRLHF_SD_A100_SWEEPS/sweep_a100_tp1_llama318binstruct.csv $OPENRLHF_SD_A100_SWEEPS/llama-3.1-8b.config.json 5"
)
LAUNCHER = {"bash examples/run.sh ": run_arm.main, "bash examples/compare.sh ": compare_arms.main}
LAUNCHES = sorted({command.text for command in COMMANDS if command.text.startswith(tuple(LAUNCHER))})
RUN_HERE: set[str] = {GRID, *(text for text in LAUNCHES if "--dry-run" in text)}


def runs(*texts: str, more: str = ""):
    """Decorates the test of what these documented commands do: it gets each one done, as the fixture `done`."""
    RUN_HERE.update(texts)
    return pytest.mark.parametrize("done", [(text, more) for text in texts], indirect=True, ids=texts)


# Accounts.


def test_every_command_is_run_or_marked():
    for command in COMMANDS:
        ways = {"run here": command.text in RUN_HERE, "in ELSEWHERE": command.text in ELSEWHERE, "marked": bool(command.marks)}
        assert sum(ways.values()) == 1, (
            f"{command.document}: {command.text!r} must be run here, or have its test named in ELSEWHERE, or be marked [GPUs], "
            f"[network] or [Slurm], one of the three; it is {ways}"
        )


def test_every_command_run_is_still_documented():
    assert {*RUN_HERE, *ELSEWHERE} <= {command.text for command in COMMANDS}


@pytest.mark.parametrize("test", sorted(set(ELSEWHERE.values())))
def test_the_tests_named_are_there(test):
    file, name = test.split("::")
    tree = ast.parse((ROOT / file).read_text())
    assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


DOCUMENT = """\
Once `bash a.sh` and `calib.sweep`, **[network]** or `--flag 1`.

| say `python -m b` | **[GPUs]** |
|---|---|
| `hf c **kept**` | `not one` |

    bash d.sh \\
        --flag 1   # [Slurm] why

For **[GPUs]**:

```bash
more="--flag 1"
# a comment
python - x <<'END'
print(1)  # kept
END
```
"""


def test_commands_are_found_with_their_marks():
    assert [(command.text, sorted(command.marks)) for command in commands_of("x.md", DOCUMENT)] == [
        ("bash a.sh", ["network"]),
        ("python -m b", []),
        ("hf c **kept**", ["GPUs"]),
        ("bash d.sh --flag 1", ["Slurm"]),
        ("python - x <<'END'\nprint(1)  # kept\nEND", ["GPUs"]),
    ]


@pytest.mark.parametrize("block", ["    make all\n", "```bash\nA=1 make all\n```\n", "```sh\nbash a.sh\n```\n"])
def test_a_line_of_a_code_block_that_may_be_a_command_is_not_passed_over(block):
    with pytest.raises(ValueError, match="documented_commands.py"):
        list(commands_of("x.md", block))


# Runs.

PLACEHOLDERS = {
    "<all your flags>": "--self-spec --self-spec.gpu a100-80gb "
    "--actor.model_name_or_path MODEL_DIR --data.prompt_dataset prompts.jsonl --reward.remote_url reward.py --data.max_len 9216 "
    "--vllm.num_engines 8 --vllm.gpu_memory_utilization 0.6 --vllm.enable_sleep --train.colocate_all "
    "--rollout.batch_size 128 --rollout.n_samples_per_prompt 8 --algo.advantage.estimator group_norm"
}
STEPS_S = [9.0, 4.0, 4.0, 4.0]


@dataclass(frozen=True)
class Done:
    """A command that ended with exit code 0. Its folder held `before`, and what it made is new there."""

    folder: Path
    stdout: str
    before: frozenset[str]

    def made(self, name: str) -> Path:
        """Raises AssertionError unless the command alone can have made it."""
        assert name not in self.before
        return self.folder / name


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    """A folder with everything that documented commands read, under the names that the documents give it."""
    folder = tmp_path_factory.mktemp("inputs")
    for name, config in {"DIR": CONFIG, "DIR_OR_JSON": CONFIG, "OTHER_DIR": QWEN_14B, "MODEL_DIR": QWEN_7B}.items():
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps(config))
    byte_tokenizer().save_pretrained(folder / "MODEL_DIR")
    for name in ("prompts.jsonl", "reward.py"):
        (folder / name).touch()
    write_zoo(folder / "ZOO_DIR", "hard")
    (folder / "calib").symlink_to(ROOT / "calib")

    calibration = make_calibration()
    for name in ("sweep.csv", "S.csv"):
        write_sweep(folder / name, calibration)
    write_sweep(folder / "other_sweep.csv", calibration, too_high=0.01)
    for name in ("cal.json", "CAL.json", "A.json", "OTHER.json"):
        make_calibration(fitted_on=read_sweep(folder / "sweep.csv").timings).save(folder / name)

    published = {
        "qwen2.5-7b": ("sweep_a100_tp1_qwen257b.csv", QWEN_7B),
        "llama-3.1-8b": ("sweep_a100_tp1_llama318binstruct.csv", LLAMA_8B),
    }
    for model, (sweep, config) in published.items():
        (folder / f"{model}.config.json").write_text(json.dumps(config))
        costs = CostModel(model_constants(config), "w4", TERMS).under("identical")
        rows = read_sweep(write_sweep(folder / "own.csv", make_calibration(cost_model=costs))).timings
        write_published(folder / sweep, model, [timing for timing in rows if timing.kind != "cycle"])

    make_run(folder / "runs" / "b", STEPS_S)
    counts = SpecDecodeCounts(10, 20, 15, [9, 6], [10, 10])
    make_run(folder / "runs" / "a", [seconds / 2 for seconds in STEPS_S], arm="fixed", self_spec=FIXED, counts=counts)
    return folder


@pytest.fixture
def done(request, inputs, tmp_path) -> Done:
    text, more = request.param
    for placeholder, value in PLACEHOLDERS.items():
        text = text.replace(placeholder, value)
    text = re.sub(r"\[(--[^\]]+)\]", r"\1", text)
    assert not re.search(r"[\[\]]--|<\w+ ", text), f"{text}: a placeholder that nothing stands for"
    folder = tmp_path / "folder"
    shutil.copytree(inputs, folder, symlinks=True)
    # What a command makes may be what another one reads.
    made = [folder / word for word in re.findall(r"--out (\S+)", text)]
    for path in made:
        path.unlink(missing_ok=True)
    before = frozenset(path.name for path in folder.iterdir())
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "OPENRLHF_SD_A100_SWEEPS": str(folder),
    }
    command = ["bash", "-c", f"{text} {more}" if more else text]
    finished = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return Done(folder, finished.stdout, before)


@pytest.mark.parametrize("text", LAUNCHES)
def test_launcher_lines_pass_a_dry_run(text, capsys, tmp_path, monkeypatch):
    """Whether they need GPUs or not: OpenRLHF's own parser and checks take every flag."""
    monkeypatch.chdir(tmp_path)
    [(start, main)] = [(start, main) for start, main in LAUNCHER.items() if text.startswith(start)]
    assert main([*shlex.split(text.removeprefix(start)), "--dry-run"]) == 0
    assert "openrlhf-sd " in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


@runs("openrlhf-sd compare runs/b runs/a --out comparison")
def test_compare(done):
    folder = done.made("comparison")
    assert {path.name for path in folder.iterdir()} == {"report.html", "report.md", "report.json"}
    arms = json.loads((folder / "report.json").read_text())["arms"]
    assert {arm["arm"]: arm["rollout_s"]["median"] for arm in arms} == {"vanilla": 4.0, "fixed": 2.0}


@runs("openrlhf-sd watch runs/a")
def test_watch(done):
    assert done.stdout.startswith(f"fixed γ=2 w8a8 · finished · {len(STEPS_S)} rollouts recorded\n")


@runs("openrlhf-sd --explain <all your flags>")
def test_explain(done):
    assert "  mode     auto" in done.stdout
    assert "step times  shipped: fitted for Qwen2.5-7B, drafter w4, TP 1, on NVIDIA A100-SXM4-80GB" in done.stdout


@runs("openrlhf-sd --help")
def test_help(done):
    ours = done.stdout.index("--self-spec.gamma_max")
    assert ours < done.stdout.index("--actor.model_name_or_path")


@runs("python -m data_prep.simplerl_zoo --level hard --model qwen --out data/simplerl-hard-qwen --source ZOO_DIR --tokenizer MODEL_DIR")
def test_data_from_a_folder(done):
    folder = done.made("data") / "simplerl-hard-qwen"
    rows = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    assert [row["label"] for row in rows] == [answer for _, answer in PROBLEMS]
    assert {path.name for path in folder.iterdir()} == {"train.jsonl", "test.jsonl", "manifest.json"}


@runs("python -m calib.fit --sweep sweep.csv --model-config DIR --out cal.json")
def test_fit(done):
    fitted = load(done.made("cal.json"))
    assert (fitted.kind, fitted.constants) == ("fitted", model_constants(CONFIG))


@runs("python -m calib.fit --sweep S.csv --model-config DIR_OR_JSON --out CAL.json [--prior OTHER.json] [--exclude-contaminated]")
def test_fit_from_a_prior(done):
    assert load(done.made("CAL.json")).provenance.argv[-3:] == ("--prior", "OTHER.json", "--exclude-contaminated")


@runs("python -m calib.validate --calibration cal.json --sweep other_sweep.csv")
def test_validate(done):
    assert "scored; 0 left out" in done.stdout


@runs("python -m calib.predict --calibration cal.json --batch 16 --seq 2048 --gamma 7 --acceptance 0.9 --json")
def test_predict(done):
    predicted = json.loads(done.stdout)
    assert predicted["target_step_s"] == make_calibration().cost_model.target_step_s(16, 2048)


@runs(
    "python -m calib.plot --calibration cal.json --sweep sweep.csv --out map.png",
    "python -m calib.plot --calibration calib/shipped/a100-tp1-w4-qwen2.5-7b.json --max-batch 128 --max-seq 8192 --out map.png",
)
def test_plot(done):
    assert done.made("map.png").read_bytes().startswith(b"\x89PNG")


@runs("python -m calib.transfer --calibration cal.json --model-config OTHER_DIR --out other.json")
def test_transfer(done):
    moved = load(done.made("other.json"))
    assert (moved.kind, moved.model, moved.constants) == ("transferred", "OTHER_DIR", model_constants(QWEN_14B))


@runs("python -m calib.transfer --calibration A.json --model-config DIR_OR_JSON --out C.json [--model NAME]")
def test_transfer_to_a_name(done):
    assert load(done.made("C.json")).model == "NAME"


@runs(
    "python -m calib.crossval --sweep sweep_a100_tp1_qwen257b.csv --model-config qwen2.5-7b.config.json "
    "--sweep sweep_a100_tp1_llama318binstruct.csv --model-config llama-3.1-8b.config.json"
)
def test_crossval(done):
    rows = [line for line in done.stdout.splitlines() if line.startswith(("| qwen2.5-7b", "| llama-3.1-8b"))]
    assert len(rows) == 8


@runs(
    "python -m openrlhf_sd.simulator --calibration CAL.json --policy ar,fixed,toggle,adaptive,auto,oracle "
    "--lengths lognormal:1500,1.0,8192 --acceptance 0.9",
    more="--engines 1 --batch 8 --rollouts 2 --seeds 1",
)
def test_simulator(done):
    assert all(policy in done.stdout for policy in ("ar", "fixed", "toggle", "adaptive", "auto", "oracle"))


@runs(next(command.text for command in COMMANDS if command.text.startswith("python - ")))
def test_table_of_errors(done):
    """9 measured batches, 55 between them and 64 beyond, at three groups of gammas each."""
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["9"] * 3 + ["55"] * 3 + ["64"] * 3


def test_simulate_grid(inputs, monkeypatch, capsys):
    """A cell per model. Sizes are no flags but constants of the module, which its processes inherit."""
    for name, size in {"ENGINES": 1, "BATCH": 8, "ROLLOUTS": 2}.items():
        monkeypatch.setattr(simulate_grid, name, size)
    monkeypatch.setenv("OPENRLHF_SD_A100_SWEEPS", str(inputs))
    flags = shlex.split(os.path.expandvars(GRID))[3:]
    assert simulate_grid.main([*flags, "--tails", "light", "--acceptances", "0.94", "--seeds", "1"]) == 0
    shown = capsys.readouterr().out
    assert "### qwen2.5-7b, fixed and toggle at gamma 7" in shown and "### llama-3.1-8b, fixed and toggle at gamma 5" in shown
    assert "2 cells, 0 with a missed check" in shown
