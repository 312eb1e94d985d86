"""The launcher: settings against the paper's table, arms against each other, and what it would run. Nothing is trained."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "examples"
sys.path.insert(0, str(EXAMPLES / "launcher"))  # its scripts run by path, as a folder on sys.path, not as an installed package

import checks  # noqa: E402
import command  # noqa: E402
import compare_arms  # noqa: E402
import experiment  # noqa: E402
import inputs  # noqa: E402
import run_arm  # noqa: E402
import stages  # noqa: E402

from openrlhf_sd import flags as launch_flags  # noqa: E402
from openrlhf_sd.config import SelfSpecError  # noqa: E402

PAPER_MODELS = ("qwen2.5-7b", "qwen2.5-14b", "llama3.1-8b-instruct")
SPECULATING = ("fixed", "toggle", "adaptive", "auto")


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def with_gpus(monkeypatch):
    monkeypatch.setattr(checks.platform, "is_needed", lambda: False)


def dry_run(capsys, *argv):
    """The flags a dry run prints."""
    assert run_arm.main([*argv, "--dry-run"]) == 0
    words = shlex.split(capsys.readouterr().out.replace("\\\n", " "))
    return command.parse_flags(words[words.index("openrlhf-sd") + 1 :])


def parsed(flags):
    """(SelfSpecConfig or None, OpenRLHF's flags as its own parser reads them)."""
    config, _, upstream_argv = launch_flags.split_flags(command.to_argv(flags))
    return config, vars(launch_flags.parse_upstream(upstream_argv))


def error_line(capsys, main, *argv):
    assert main(list(argv)) == 2
    [line] = capsys.readouterr().err.splitlines()
    return line


# Arms.


@pytest.mark.parametrize("model", experiment.MODELS)
@pytest.mark.parametrize("arm", experiment.ARMS)
def test_a_dry_run_passes_openrlhfs_parser_and_checks(capsys, model, arm):
    config, _ = parsed(dry_run(capsys, model, arm))
    assert (config.mode if config else "vanilla") == arm


@pytest.mark.parametrize("model", experiment.MODELS)
def test_arms_differ_only_in_our_flags_and_in_what_lies_in_the_run_folder(model):
    one = experiment.load(model)
    by_arm = {arm: command.arm_flags(one, arm, Path("runs", model, arm)) for arm in experiment.ARMS}
    openrlhfs = {
        arm: {
            name: [value.replace(flags["--self-spec.run_dir"][0], "RUN_DIR") for value in values]
            for name, values in flags.items()
            if not name.startswith("--self-spec")
        }
        for arm, flags in by_arm.items()
    }
    assert all(openrlhfs[arm] == openrlhfs["vanilla"] for arm in experiment.ARMS)
    in_run_dir = {name for name, values in openrlhfs["vanilla"].items() if "RUN_DIR" in "".join(values)}
    assert in_run_dir == {"--ckpt.output_dir", "--ckpt.path"}


def test_the_printed_command_is_for_pasting_into_a_shell(capsys, tmp_path):
    run_arm.main(["quickstart", "fixed", "--dry-run", "--data-dir", "a folder with 'quotes'"])
    shell = 'openrlhf-sd() { printf \'%s\\n\' "$WANDB_MODE" "$@"; }\n' + capsys.readouterr().out
    lines = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, check=True).stdout.splitlines()
    assert lines[:3] == ["offline", "--self-spec", "fixed"]
    assert lines[lines.index("--data.prompt_dataset") + 1] == f"{tmp_path}/a folder with 'quotes'/prompts.jsonl"


# What the paper's table says, worked out by hand from shared/reference.md.

COMMON = {
    "algo.advantage.estimator": "group_norm",
    "rollout.batch_size": 128,
    "rollout.n_samples_per_prompt": 8,
    "train.batch_size": 1024,  # 128 x 8: one update per rollout
    "train.max_epochs": 1,
    "train.num_episodes": 2,
    "data.max_len": 9216,  # 1024 + 8192
    "rollout.max_new_tokens": 8192,
    "rollout.temperature": 1.0,
    "rollout.top_p": 1.0,
    "actor.adam.lr": 5e-7,
    "actor.lr_scheduler": "constant",
    "actor.eps_clip": 0.2,
    "algo.kl.use_loss": True,
    "algo.kl.estimator": "k3",
    "train.seed": 42,
    "vllm.num_engines": 8,
    "vllm.tensor_parallel_size": 1,
    "actor.num_gpus_per_node": 8,
    "train.colocate_all": True,
    "vllm.enable_sleep": True,
    "ds.enable_sleep": True,
    "vllm.enforce_eager": False,
    "data.apply_chat_template": True,
    "data.input_key": "input",
    "data.label_key": "label",
}
OWN = {
    "qwen2.5-7b": {
        "algo.kl.init_coef": 1e-4,
        "vllm.gpu_memory_utilization": 0.6,
        "ds.adam_offload": False,
        "algo.advantage.is_correction_level": "off",
    },
    "qwen2.5-14b": {
        "algo.kl.init_coef": 1e-4,
        "vllm.gpu_memory_utilization": 0.7,
        "ds.adam_offload": True,
        "algo.advantage.is_correction_level": "token",
        "algo.advantage.is_correction_mode": "mask",
        "algo.advantage.is_correction_gating": "ratio",
        "algo.advantage.is_correction_threshold": [0.5, 2.0],
    },
    "llama3.1-8b-instruct": {
        "algo.kl.init_coef": 1e-2,
        "vllm.gpu_memory_utilization": 0.6,
        "ds.adam_offload": False,
        "algo.advantage.is_correction_level": "off",
    },
}
DATA = {
    "qwen2.5-7b": "--level hard --model qwen",
    "qwen2.5-14b": "--level hard --model qwen",
    "llama3.1-8b-instruct": "--level medium --model llama-instruct",
}
FIXED_GAMMA = {"qwen2.5-7b": 7, "qwen2.5-14b": 5, "llama3.1-8b-instruct": 5}


@pytest.mark.parametrize("model", PAPER_MODELS)
def test_settings_are_the_papers(model):
    one = experiment.load(model)
    _, flags = parsed(command.arm_flags(one, "vanilla", Path("run")))
    assert {name: flags[name] for name in COMMON} == COMMON
    assert {name: flags[name] for name in OWN[model]} == OWN[model]
    assert one.make_data.endswith(f"{DATA[model]} --drop_empty_answers")


@pytest.mark.parametrize("model", PAPER_MODELS)
def test_arms_speculate_as_in_the_paper(model):
    one = experiment.load(model)
    configs = {arm: parsed(command.arm_flags(one, arm, Path("run")))[0] for arm in experiment.ARMS}
    assert configs["vanilla"] is None
    assert configs["fixed"].gamma == configs["toggle"].gamma == FIXED_GAMMA[model]
    adaptive = configs["adaptive"]
    assert (adaptive.gamma, adaptive.ladder) == (5, (5, 7, 9, 11))
    assert (adaptive.raise_at, adaptive.lower_at, adaptive.patience) == (0.94, 0.85, 2)
    assert (adaptive.margin, adaptive.ramp_up) == (0.05, 32)


def test_a_models_file_holds_only_what_the_models_do_not_share():
    by_model = {model: experiment.load(model).openrlhf for model in PAPER_MODELS}
    own = {name for flags in by_model.values() for name in flags if any(other.get(name) != flags[name] for other in by_model.values())}
    assert own == {name for flags in OWN.values() for name in flags}


@pytest.mark.parametrize("path", sorted(experiment.SETTINGS.glob("*.toml")), ids=lambda path: path.stem)
def test_a_settings_file_opens_with_hardware_and_wall_time(path):
    header = "".join(line for line in path.read_text().splitlines(keepends=True)[:6] if line.startswith("#"))
    assert "Hardware: " in header and "Wall time: " in header


# Overrides.


def test_an_override_replaces_a_setting_of_openrlhf_and_one_of_ours(capsys):
    flags = dry_run(capsys, "qwen2.5-7b", "fixed", "--train.seed=7", "--self-spec.gamma", "3", "--actor.adam.betas", "0.9", "0.95")
    config, upstream = parsed(flags)
    assert (config.gamma, upstream["train.seed"], upstream["actor.adam.betas"]) == (3, 7, [0.9, 0.95])


def test_of_a_flag_given_twice_the_later_wins(capsys):
    flags = dry_run(
        capsys,
        "qwen2.5-7b",
        "fixed",
        "--self-spec.gamma",
        "3",
        "--train.seed",
        "1",
        "--self-spec.gamma",
        "4",
        "--train.seed",
        "2",
    )
    assert (flags["--self-spec.gamma"], flags["--train.seed"]) == (["4"], ["2"])


def test_folders_are_taken_from_flags(capsys, tmp_path):
    where = ("--model-dir", "Qwen/Qwen2.5-7B", "--data-dir", "mine", "--self-spec.run_dir", "elsewhere/run")
    _, flags = parsed(dry_run(capsys, "qwen2.5-7b", "vanilla", *where))
    assert flags["actor.model_name_or_path"] == "Qwen/Qwen2.5-7B"
    assert flags["data.prompt_dataset"] == str(tmp_path / "mine" / "train.jsonl")
    assert flags["eval.dataset"] == str(tmp_path / "mine" / "test.jsonl")
    assert flags["ckpt.output_dir"] == str(tmp_path / "elsewhere" / "run" / "trained")
    assert flags["reward.remote_url"] == str(EXAMPLES / "math_reward.py")


def test_defaults_are_folders_here_and_not_hub_names(capsys, tmp_path):
    _, flags = parsed(dry_run(capsys, "qwen2.5-7b", "vanilla"))
    assert flags["actor.model_name_or_path"] == str(tmp_path / "models" / "Qwen2.5-7B")


def test_steps_limit_the_prompts_of_a_single_pass(capsys):
    # 3 steps of 128 prompts.
    _, flags = parsed(dry_run(capsys, "qwen2.5-7b", "vanilla", "--steps", "3"))
    assert (flags["data.max_samples"], flags["train.num_episodes"]) == (384, 1)
    # The quickstart's own 15 steps, of 32 prompts instead of 16.
    _, flags = parsed(dry_run(capsys, "quickstart", "vanilla", "--rollout.batch_size", "32"))
    assert flags["data.max_samples"] == 480


ERRORS = {
    "unknown model": (("qwen2.5-8b", "auto"), "MODEL: unknown 'qwen2.5-8b'; choose one of qwen2.5-7b, "),
    "unknown arm": (("qwen2.5-7b", "sometimes"), "ARM: unknown 'sometimes'; choose one of vanilla, fixed, "),
    "no arm": (("qwen2.5-7b",), "the following arguments are required: ARM"),
    "an arm that is another": (
        ("qwen2.5-7b", "fixed", "--self-spec", "auto"),
        "--self-spec: the arm says this already",
    ),
    "our flag without a mode": (
        ("qwen2.5-7b", "vanilla", "--self-spec.gamma", "3"),
        "--self-spec.gamma: means nothing without",
    ),
    "a value out of range": (
        ("qwen2.5-7b", "fixed", "--self-spec.gamma", "99"),
        "--self-spec.gamma: 99 is out of range",
    ),
    "misspelt flag": (
        ("qwen2.5-7b", "auto", "--rollout.batch_siz", "8"),
        "--rollout.batch_siz: no such flag; did you mean",
    ),
    "misspelt flag of the launcher": (("qwen2.5-7b", "auto", "--dry-rum"), "--dry-rum: no such flag"),
    "contradiction OpenRLHF finds": (
        ("qwen2.5-7b", "auto", "--rollout.n_samples_per_prompt", "1", "--train.batch_size", "128"),
        "OpenRLHF refuses these flags: group_norm requires n_samples_per_prompt > 1",
    ),
    "update larger than the rollout": (
        ("qwen2.5-7b", "auto", "--rollout.batch_size", "64"),
        "--train.batch_size: 1024 is more than the 512 samples of a rollout",
    ),
    "toggle that would never start": (
        # 8 prompts x 8 samples over 8 engines: 8 requests each, and the guard waits for more than 32.
        ("qwen2.5-7b", "toggle", "--rollout.batch_size", "8", "--train.batch_size", "64"),
        "--self-spec.ramp_up: toggle waits until more than 32 requests",
    ),
    "no steps": (("quickstart", "auto", "--steps", "0"), "--steps: '0' is not a whole number of at least 1"),
    "empty run folder": (("quickstart", "auto", "--self-spec.run_dir"), "--self-spec.run_dir: needs one value"),
}


@pytest.mark.parametrize("argv, message", ERRORS.values(), ids=ERRORS.keys())
def test_bad_input_is_one_line(capsys, argv, message):
    assert error_line(capsys, run_arm.main, *argv).startswith(f"run.sh: error: {message}")


def test_a_settings_file_with_a_key_nobody_reads_is_refused(tmp_path, monkeypatch):
    (tmp_path / "quickstart.toml").write_text('gpus = 0\nmodle = "x"\ndata = "y"\n[openrlhf]\n')
    monkeypatch.setattr(experiment, "SETTINGS", tmp_path)
    with pytest.raises(SelfSpecError, match="unknown key modle; known are"):
        experiment.load("quickstart")


# Starting.


@pytest.fixture
def executed(monkeypatch):
    """Command lines the process would have become."""
    lines = []
    monkeypatch.setattr(run_arm.os, "execv", lambda path, argv: lines.append(argv))
    monkeypatch.setattr(stages, "set_environment", lambda experiment: None)
    return lines


def test_without_a_gpu_an_experiment_of_8_starts_nothing(capsys, monkeypatch, executed):
    monkeypatch.setattr(checks.platform, "is_needed", lambda: True)
    assert "qwen2.5-7b: needs 8 GPUs and this machine has none" in error_line(capsys, run_arm.main, "qwen2.5-7b", "auto")
    assert executed == []


def test_a_missing_model_or_data_folder_is_one_line_that_says_how_to_get_it(capsys, tmp_path, with_gpus, executed):
    line = error_line(capsys, run_arm.main, "qwen2.5-7b", "auto")
    assert line.startswith(f"run.sh: error: --actor.model_name_or_path: no folder {tmp_path}/models/Qwen2.5-7B")
    line = error_line(capsys, run_arm.main, "qwen2.5-7b", "auto", "--model-dir", "Qwen/Qwen2.5-7B")
    assert line.startswith(f"run.sh: error: --data.prompt_dataset: no file {tmp_path}/data/simplerl-hard-qwen/train.jsonl; make it with ")
    assert (
        f"python -m data_prep.simplerl_zoo --level hard --model qwen --drop_empty_answers --out {tmp_path}/data/simplerl-hard-qwen" in line
    )
    assert executed == []


def test_a_run_becomes_openrlhf_sd_with_the_flags_of_its_dry_run(capsys, tmp_path, with_gpus, executed):
    (tmp_path / "reward.py").touch()
    (tmp_path / "data").mkdir()
    for name in ("train.jsonl", "test.jsonl"):
        (tmp_path / "data" / name).touch()
    argv = (
        "qwen2.5-7b",
        "auto",
        "--model-dir",
        "Qwen/Qwen2.5-7B",
        "--data-dir",
        "data",
        "--reward.remote_url",
        str(tmp_path / "reward.py"),
    )
    flags = dry_run(capsys, *argv)
    run_arm.main(argv)
    assert executed == [[sys.executable, "-m", "openrlhf_sd.launch", *command.to_argv(flags)]]


def test_the_quickstart_makes_its_own_model_and_prompts_but_not_those_of_others(monkeypatch, executed, tmp_path, capsys):
    prepared = []
    monkeypatch.setattr(inputs.subprocess, "run", lambda argv, check: prepared.append(argv[2:]) or SimpleNamespace(returncode=0))
    monkeypatch.setattr(inputs, "missing_inputs", lambda experiment, flags: {})
    home = tmp_path / "runs" / "quickstart"
    run_arm.main(["quickstart", "auto", "--steps", "2"])
    # 2 steps of 16 prompts.
    assert prepared == [["--warm-start", f"{home}/warm_start", "--data", f"{home}/data", "--num-prompts", "32"]]
    prepared.clear()
    run_arm.main(["quickstart", "auto", "--data.prompt_dataset", "theirs.jsonl"])
    assert prepared == [["--warm-start", f"{home}/warm_start"]]
    prepared.clear()
    run_arm.main(["quickstart", "auto", "--model-dir", "Qwen/Qwen2.5-0.5B", "--data-dir", "theirs"])
    assert prepared == [], "the toy under another model's name"
    assert len(executed) == 3


# Comparing.


def test_arms_take_turns_and_every_other_seed_goes_backwards():
    assert compare_arms.in_turns(["vanilla", "fixed", "auto"], [1, 2, 3]) == [
        *(("vanilla", 1), ("fixed", 1), ("auto", 1)),
        *(("auto", 2), ("fixed", 2), ("vanilla", 2)),
        *(("vanilla", 3), ("fixed", 3), ("auto", 3)),
    ]


class FakeStages:
    """Stands in for the processes: a training run leaves the record of a finished one, unless it is to fail."""

    def __init__(self, fails=()):
        self.names, self.commands, self.fails = [], {}, fails

    def __call__(self, name, argv):
        self.names.append(name)
        self.commands[name] = argv
        if name in self.fails:
            raise stages.StageFailed(f"{name}: failed (exit code 1)")
        if name != "comparison":
            flags = argv[len(stages.LAUNCH) :]
            run_dir = Path(*command.parse_flags(flags)["--self-spec.run_dir"])
            run_dir.mkdir(parents=True)
            (run_dir / "provenance.json").write_text(json.dumps({"status": "finished", "argv": flags}))
        return 1.0


@pytest.fixture
def compare(monkeypatch):
    """Runs compare.sh's program on the quickstart with fake processes; returns what they were."""
    monkeypatch.setattr(compare_arms, "make_inputs", lambda *args: None)
    monkeypatch.setattr(stages, "set_environment", lambda experiment: None)

    def run(*argv, fails=()):
        fake = FakeStages(fails)
        monkeypatch.setattr(stages, "run_stage", fake)
        return compare_arms.main(["quickstart", "--out", "out", *argv]), fake

    return run


def test_compare_runs_the_four_arms_with_two_seeds_and_compares_all_of_them(compare, tmp_path):
    code, fake = compare()
    names = [
        "vanilla-seed1",
        "fixed-seed1",
        "adaptive-seed1",
        "auto-seed1",
        "auto-seed2",
        "adaptive-seed2",
        "fixed-seed2",
        "vanilla-seed2",
    ]
    assert (code, fake.names) == (0, [*names, "comparison"])
    folders = [str(tmp_path / "out" / name) for name in names]
    assert fake.commands["comparison"] == [
        *stages.LAUNCH,
        "compare",
        *folders,
        "--out",
        str(tmp_path / "out" / "comparison"),
    ]
    config, flags = parsed(command.parse_flags(fake.commands["fixed-seed2"][len(stages.LAUNCH) :]))
    assert (config.mode, flags["train.seed"]) == ("fixed", 2)


def test_compare_goes_on_where_it_failed_and_does_not_compare_without_the_failed_run(compare, tmp_path):
    with pytest.raises(stages.StageFailed, match="auto-seed1: failed"):
        compare("--arms", "vanilla,auto", fails=["auto-seed1"])
    leftover = tmp_path / "out" / "auto-seed1" / "metrics.jsonl"
    leftover.parent.mkdir()
    leftover.write_text("half a run")
    code, fake = compare("--arms", "vanilla,auto")
    assert (code, fake.names) == (0, ["auto-seed1", "auto-seed2", "vanilla-seed2", "comparison"])
    assert not leftover.exists()
    code, fake = compare("--arms", "vanilla,auto")
    assert (code, fake.names) == (0, ["comparison"])


def test_a_failed_run_ends_the_comparison_before_the_next(compare):
    fake = FakeStages(fails=["fixed-seed1"])
    runs = [SimpleNamespace(name=f"{arm}-seed1", folder=Path(arm), flags={}) for arm in ("vanilla", "fixed", "auto")]

    def train(name, folder, flags):
        return fake(name, [*stages.LAUNCH, "--self-spec.run_dir", str(folder)])

    with pytest.raises(stages.StageFailed):
        compare_arms.run_all(runs, train)
    assert fake.names == ["vanilla-seed1", "fixed-seed1"]


def test_finished_runs_of_other_flags_are_not_taken_for_these(compare, capsys):
    compare("--arms", "vanilla", "--seeds", "1", "--steps", "2")
    code, fake = compare("--arms", "vanilla", "--seeds", "1", "--steps", "3")
    assert (code, fake.names) == (2, [])
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("compare.sh: error: --data.max_samples: ") and "give --out another folder" in line


def test_a_secret_hidden_in_the_record_does_not_make_a_run_another_one(tmp_path):
    (tmp_path / "provenance.json").write_text(json.dumps({"status": "finished", "argv": ["--a", "1", "--logger.wandb.key", "(hidden)"]}))
    assert stages.is_finished(tmp_path, {"--a": ["1"], "--logger.wandb.key": ["s3cret"]})


def test_our_overrides_go_to_the_arms_that_speculate(compare):
    _, fake = compare("--arms", "vanilla,fixed", "--seeds", "1", "--self-spec.gamma", "2", "--rollout.temperature", "0.8")
    vanilla, fixed = (parsed(command.parse_flags(fake.commands[f"{arm}-seed1"][3:])) for arm in ("vanilla", "fixed"))
    assert vanilla[0] is None and fixed[0].gamma == 2
    assert vanilla[1]["rollout.temperature"] == fixed[1]["rollout.temperature"] == 0.8


COMPARE_ERRORS = {
    "unknown arm": (("quickstart", "--arms", "vanilla,rtn"), "--arms: unknown 'rtn'"),
    "an arm twice": (("quickstart", "--arms", "auto,auto"), "--arms: auto,auto names one of them twice"),
    "no seed": (("quickstart", "--seeds", "1,x"), "--seeds: '1,x' is not a list like 1,2,3"),
    "one seed for all": (("quickstart", "--train.seed", "3"), "--train.seed: is each run's own here"),
    "one folder for all": (
        ("quickstart", "--self-spec.run_dir", "x"),
        "--self-spec.run_dir: is each run's own here; give --out",
    ),
}


@pytest.mark.parametrize("argv, message", COMPARE_ERRORS.values(), ids=COMPARE_ERRORS.keys())
def test_bad_input_of_compare_is_one_line(capsys, argv, message):
    assert error_line(capsys, compare_arms.main, *argv).startswith(f"compare.sh: error: {message}")


def test_a_stage_that_fails_says_its_name_and_exit_code():
    with pytest.raises(stages.StageFailed, match=r"auto-seed1: failed \(exit code 3\)"):
        stages.run_stage("auto-seed1", [sys.executable, "-c", "raise SystemExit(3)"])


@pytest.mark.parametrize("sent, exit_code", [(signal.SIGINT, 130), (signal.SIGTERM, 1)])
def test_an_interrupted_comparison_waits_for_the_stage_to_clean_up(tmp_path, sent, exit_code):
    stage = (
        "import pathlib, signal, sys, time\n"
        "def clean_up(signum, frame): time.sleep(0.5); pathlib.Path('clean').touch(); sys.exit(1)\n"
        "signal.signal(signal.SIGINT, clean_up); signal.signal(signal.SIGTERM, clean_up)\n"
        "pathlib.Path('started').touch(); time.sleep(60)\n"
    )
    program = f"import sys, cli, stages; sys.exit(cli.exit_code('x', lambda: stages.run_stage('x', [sys.executable, '-c', {stage!r}])))"
    environment = {**os.environ, "PYTHONPATH": f"{EXAMPLES / 'launcher'}{os.pathsep}{ROOT}"}
    process = subprocess.Popen([sys.executable, "-c", program], env=environment, start_new_session=True)
    while not (tmp_path / "started").exists():
        time.sleep(0.02)
    if sent == signal.SIGINT:
        os.killpg(process.pid, sent)  # Ctrl-C reaches every process of the terminal
    else:
        process.send_signal(sent)
    assert process.wait(timeout=30) == exit_code
    assert (tmp_path / "clean").exists()


# Shell.


@pytest.mark.parametrize("script", ["run.sh", "compare.sh", "slurm.sh", "quickstart.sh"])
def test_shell_scripts_parse(script):
    subprocess.run(["bash", "-n", EXAMPLES / script], check=True)


def test_an_unfinished_attempt_is_moved_aside_and_never_deleted(tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr(stages, "run_stage", lambda name, command: started.append(name) or 0.0)
    run_dir = tmp_path / "auto-seed1"
    for attempt in ("first", "second"):
        run_dir.mkdir()
        (run_dir / "checkpoint").write_text(attempt)
        stages.train("auto-seed1", run_dir, {})
    assert not run_dir.exists() and started == ["auto-seed1"] * 2
    kept = sorted(tmp_path.iterdir())
    assert [path.name for path in kept] == ["auto-seed1.unfinished-1", "auto-seed1.unfinished-2"]
    assert [(path / "checkpoint").read_text() for path in kept] == ["first", "second"]
