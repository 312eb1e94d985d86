"""`openrlhf-sd --explain`: what is printed, every problem at once, and nothing started or loaded."""

import json
import subprocess
import sys

import pytest
from explained_models import LLAMA_8B, QWEN_7B

from calib import device
from openrlhf_sd import explain, flags, gpus, launch, provenance
from openrlhf_sd.config import SelfSpecError
from openrlhf_sd.drafter_scheme import default_quant


@pytest.fixture
def run_flags(tmp_path):
    """The paper's Qwen2.5-7B run, without a mode."""
    for name, model_config in (("qwen", QWEN_7B), ("llama", LLAMA_8B)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(model_config))
    (tmp_path / "reward.py").write_text("")
    (tmp_path / "prompts.jsonl").write_text("")
    return {
        "--actor.model_name_or_path": str(tmp_path / "qwen"),
        "--reward.remote_url": str(tmp_path / "reward.py"),
        "--data.prompt_dataset": str(tmp_path / "prompts.jsonl"),
        "--data.max_len": "9216",
        "--vllm.num_engines": "8",
        "--vllm.gpu_memory_utilization": "0.6",
        "--rollout.batch_size": "128",
        "--rollout.n_samples_per_prompt": "8",
        "--algo.advantage.estimator": "group_norm",
        "--train.colocate_all": None,
        "--vllm.enable_sleep": None,
    }


def as_argv(flag_values):
    return [token for flag, value in flag_values.items() for token in ((flag,) if value is None else (flag, value))]


ON_A100 = {"--explain": None, "--self-spec.gpu": "a100-80gb"}


def as_json(capsys, run_flags, **changed):
    code = launch.main(["--explain", "json", *as_argv(run_flags | changed)])
    return code, json.loads(capsys.readouterr().out)


def test_a_good_run_is_explained_and_nothing_is_written(run_flags, tmp_path, capsys):
    run_dir = tmp_path / "run"
    argv = as_argv({**ON_A100, "--self-spec": "toggle", "--self-spec.run_dir": str(run_dir), **run_flags})
    assert launch.main(argv) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    assert not run_dir.exists()
    for line in (
        "  mode     toggle",
        "  drafter  w4, groups of 128; embeddings, head, final norm and KV cache are the policy's",
        "  vLLM's share   48.00 GB  = 0.6 x 80.0 GB (--vllm.gpu_memory_utilization)",
        "  drafter         3.36 GB  quantized linears with their scales",
        "  KV cache       29.40 GB  at most: 512,779 tokens of 57,344 bytes; without the drafter 571,453",
        "  step times  shipped: fitted for Qwen2.5-7B, drafter w4, TP 1, on NVIDIA A100-SXM4-80GB",
    ):
        assert line in printed.out.splitlines()
    assert "Problems" not in printed.out
    assert max(map(len, printed.out.splitlines())) <= 120
    assert not any(line.endswith(" ") for line in printed.out.splitlines())


def test_vanilla_is_explained_without_a_drafter(run_flags, capsys):
    assert launch.main(as_argv({**ON_A100, **run_flags})) == 0
    printed = capsys.readouterr().out
    assert "vanilla OpenRLHF, no speculation" in printed
    assert "571,453 tokens" in printed
    assert "drafter" not in printed and "Where speculation" not in printed


def test_json_holds_what_the_text_says(run_flags, capsys):
    code, explained = as_json(capsys, run_flags, **{"--self-spec": "auto", "--self-spec.gpu": "a100-80gb"})
    assert code == 0
    assert explained["memory"]["drafter_bytes"] == 3_364_601_856
    assert explained["config"]["group_size"] == 128
    assert explained["problems"] == []
    assert {"batch": 1, "context": 512} == {key: explained["region"]["cells"][0][key] for key in ("batch", "context")}


@pytest.mark.parametrize("gpu", ["h100", "H200", "b200"])
def test_a_gpu_nobody_measured_gets_its_memory_and_no_prediction(run_flags, capsys, gpu):
    code, explained = as_json(capsys, run_flags, **{"--self-spec": "auto", "--self-spec.gpu": gpu})
    assert code == 0
    assert explained["memory"]["kv_tokens"] > 0
    assert explained["region"] is None
    assert explained["why_no_region"].startswith("no prediction: nobody has measured this device")
    assert explained["why_no_region"].endswith("the run measures its own machine first, once, and decides by that")


def test_every_problem_is_listed_and_the_first_is_the_line(run_flags, capsys, tmp_path):
    bad = {
        "--self-spec": "toggle",
        "--self-spec.ramp_up": "128",
        "--ds.lora.rank": "8",
        "--actor.num_gpus_per_node": "4",
        "--vllm.gpu_memory_utilization": "0.2",
        "--reward.remote_url": str(tmp_path / "none.py"),
        "--rollout.micro_batch_size": "4096",
        "--self-spec.calibration": "none.json",
    }
    assert launch.main(as_argv(ON_A100 | run_flags | bad)) == 2
    printed = capsys.readouterr()
    problems = " ".join(printed.out[printed.out.index("Problems") :].split())
    for problem in (
        "--ds.lora.rank: does not work",
        "--self-spec.ramp_up: toggle waits until more than 128",
        "--train.colocate_all: puts the engines on the actor's GPUs, but the actor has 4",
        "--ref.num_gpus_per_node: actor and reference share GPUs",
        "--reward.remote_url: no file",
        "OpenRLHF refuses these flags: The number of sample batches must be greater",
        "--vllm.gpu_memory_utilization: 0.2 leaves 0 tokens",
        "--self-spec.calibration: none.json: cannot be read",
    ):
        assert problem in problems
    [line] = printed.err.splitlines()
    assert line.startswith("openrlhf-sd: error: --ds.lora.rank: does not work") and line.endswith("(and 7 more, above)")


def test_without_a_model_the_other_problems_are_listed_too(run_flags, capsys):
    change = {"--actor.model_name_or_path": "/no/such/model", "--data.prompt_dataset": "none.jsonl", "--self-spec": "fixed"}
    assert launch.main(as_argv(ON_A100 | run_flags | change)) == 2
    printed = capsys.readouterr()
    assert "--data.prompt_dataset: no file none.jsonl" in printed.out
    assert printed.err.startswith("openrlhf-sd: error: --actor.model_name_or_path: no folder /no/such/model")


def test_no_flags_at_all_are_problems_and_no_traceback(capsys):
    assert launch.main(["--explain", "--self-spec.gpu", "h100"]) == 2
    printed = capsys.readouterr()
    assert "--reward.remote_url: missing" in printed.out
    assert "not counted: no vLLM engines" in printed.out


def test_the_path_of_a_config_json_will_do(run_flags, capsys, tmp_path):
    (tmp_path / "qwen" / "config.json").rename(tmp_path / "qwen2.5-7b.config.json")
    change = {"--actor.model_name_or_path": str(tmp_path / "qwen2.5-7b.config.json"), "--self-spec.gpu": "a100-80gb"}
    code, explained = as_json(capsys, run_flags, **change)
    assert (code, explained["memory"]["kv_tokens"]) == (0, 571_453)


def test_a_hub_name_that_is_not_cached_is_one_line(run_flags, capsys, monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    change = {"--actor.model_name_or_path": "nobody/has-this-model", "--self-spec": "auto"}
    assert launch.main(as_argv(ON_A100 | run_flags | change)) == 2
    assert capsys.readouterr().err == (
        "openrlhf-sd: error: --actor.model_name_or_path: nobody/has-this-model is not in the hub's cache here, and --explain downloads "
        "nothing; give the model's folder or the path of its config.json\n"
    )


def test_a_model_that_cannot_be_counted_stops_speculation_but_not_a_vanilla_run(run_flags, capsys, tmp_path):
    mixture = QWEN_7B | {"architectures": ["MixtralForCausalLM"], "num_local_experts": 8}
    (tmp_path / "qwen" / "config.json").write_text(json.dumps(mixture))
    assert launch.main(as_argv(ON_A100 | run_flags)) == 0
    assert "not counted: model config: num_local_experts says mixture of experts" in capsys.readouterr().out
    assert launch.main(as_argv(ON_A100 | run_flags | {"--self-spec": "auto"})) == 2
    assert "not MixtralForCausalLM" in capsys.readouterr().err


@pytest.mark.parametrize(("instructions", "is_said"), [("AVX2", True), ("AVX-512 with bf16", False)])
def test_a_cpu_without_avx512_holds_the_policy_in_float32_too(run_flags, capsys, monkeypatch, tmp_path, instructions, is_said):
    monkeypatch.setattr(device, "has_gpu", lambda: False)
    monkeypatch.setattr(provenance, "_cpu_model", lambda: f"A CPU (family 25, model 1, {instructions})")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    _, explained = as_json(capsys, run_flags)
    copies = [note for note in explained["notes"] if note.startswith("weights: without AVX-512")]
    assert bool(copies) == is_said
    assert not is_said or copies[0].endswith(f"{2 * explained['memory']['policy_bytes'] / 1e9:.2f} GB beside what is counted above")


@pytest.mark.parametrize(("quant", "copies"), [("w4", 0), ("w8a8", 1), ("none", 2)])
def test_so_it_does_a_drafter_that_multiplies_in_int8_or_float32(run_flags, capsys, monkeypatch, tmp_path, quant, copies):
    monkeypatch.setattr(device, "has_gpu", lambda: False)
    monkeypatch.setattr(provenance, "_cpu_model", lambda: "A CPU (family 25, model 1, AVX2)")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    _, explained = as_json(capsys, run_flags, **{"--self-spec": "fixed", "--self-spec.quant": quant})
    [note] = [note for note in explained["notes"] if note.startswith("weights: without AVX-512")]
    assert (f"{copies * explained['memory']['drafter_bytes'] / 1e9:.2f} GB for the drafter's own copy" in note) == bool(copies)


def test_without_a_gpu_it_is_about_this_cpu(run_flags, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(device, "has_gpu", lambda: False)
    monkeypatch.setattr(device, "free_bytes", lambda ranks: 40_000_000_000)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    code, explained = as_json(capsys, run_flags, **{"--self-spec": "auto"})
    assert code == 2
    assert explained["config"]["quant"] == default_quant(on_gpu=False)
    assert explained["memory"]["kv_bytes"] == 6_000_000_000  # a quarter of 0.6 x 40e9
    assert [problem.split(":")[0] for problem in explained["problems"]] == [
        "--ds.attn_implementation",
        "--train.colocate_all",
    ]


def test_this_machines_gpu_counts_with_the_memory_its_driver_shows(monkeypatch, tmp_path):
    fake = tmp_path / "nvidia-smi"
    fake.write_text('#!/bin/sh\ncase "$1" in *name*) echo "NVIDIA H200" ;; *) echo 143771 ;; esac\n')
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(device, "_is_installed", lambda package: False)  # of the CPU build of vLLM
    here = gpus.gpu_here()
    assert (here.device, here.chip, here.memory_bytes) == ("NVIDIA H200", "GH100", 143771 * 2**20)
    assert here.bandwidth_bytes_per_s == 4.8e12


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"--self-spec": "fixed"}, "fixed speculates at every batch: at 128 requests of 512 tokens it is predicted to run at 0."),
        ({"--self-spec": "toggle"}, "toggle decides nothing until more than 32 requests have decoded at once"),
        ({"--self-spec": "toggle", "--self-spec.ramp_up": "8"}, "at 9 and stay on for the whole rollout; --self-spec.ramp_up "),
        ({"--self-spec": "auto", "--vllm.enforce_eager": None}, "--vllm.enforce_eager: the step times are of CUDA graphs"),
        ({"--self-spec": "auto", "--vllm.enable_prefix_caching": None}, "--vllm.enable_prefix_caching: samples of one prompt share"),
        ({"--self-spec": "auto"}, "chunked prefill: steps that also compute prompts are not in the prediction"),
        ({"--self-spec": "auto"}, "128 requests x gamma 11 holds about 7 fp32 tensors of 0.86 GB"),  # 128 x 11 x 152,064 x 4 bytes
        ({"--self-spec": "auto"}, "its weights, the drafter with them, move to pinned memory of the host (18.6 GB per GPU)"),
        ({"--self-spec": "adaptive", "--algo.dynamic_filtering_enable": None}, "--algo.dynamic_filtering_enable: batches may grow again"),
        ({"--rollout.n_samples_per_prompt": "16"}, "vLLM runs at most 128 requests at once"),
        ({}, "KV cache: 62 requests of --data.max_len 9216 fit at once, 128 run; that is enough for a mean of 4464 tokens each"),
    ],
)
def test_notes_say_what_flags_mean(run_flags, capsys, change, says):
    code, explained = as_json(capsys, run_flags, **{"--self-spec.gpu": "a100-80gb"} | change)
    assert code == 0
    assert any(says in note for note in explained["notes"]), explained["notes"]


def test_engines_that_share_gpus_and_never_sleep_leave_the_trainer_the_rest(run_flags, capsys):
    del run_flags["--vllm.enable_sleep"]
    _, explained = as_json(capsys, run_flags, **{"--self-spec.gpu": "a100-80gb"})
    assert any("keep their 48.0 GB while it trains, which leaves it 32.0 GB" in note for note in explained["notes"])


def test_asynchronous_training_is_explained(run_flags, capsys):
    del run_flags["--vllm.enable_sleep"]
    change = {"--self-spec.gpu": "a100-80gb", "--train.async_enable": None, "--self-spec": "toggle"}
    _, explained = as_json(capsys, run_flags, **change)
    for says in ("shares GPUs among the trainer's models only", "toggle, once on, stays on", "between two weight broadcasts"):
        assert any(says in note for note in explained["notes"]), says


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--self-spec --self-spec.gpu h100", "--self-spec.gpu: names the GPU that --explain is about; add --explain or drop it"),
        ("--explain --self-spec.gpu v100", "--self-spec.gpu: 'v100' is not in the table of GPUs; choose one of a100-80gb,"),
        ("--explain --self-spec.gpu", "--self-spec.gpu: needs a value"),
        ("--explain=yaml", "--explain: unknown format 'yaml'; choose one of text, json"),
        ("--explain --explain", "--explain: given twice"),
        ("--explain --self-spec fixed --self-spec.gamma 99", "--self-spec.gamma: 99 is out of range"),
        ("--explain --rollout.batch_siz 8", "--rollout.batch_siz: no such flag; did you mean --rollout.batch_size?"),
    ],
)
def test_flags_that_cannot_be_read_are_one_line(capsys, argv, message):
    assert launch.main(argv.split()) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith(f"openrlhf-sd: error: {message}")


def test_explain_flags_leave_the_run_alone():
    argv = ["--self-spec", "toggle", "--explain", "json", "--self-spec.gpu=h100", "--ds.zero_stage", "2"]
    assert flags.take_explain_flags(argv) == ("json", "h100", ["--self-spec", "toggle", "--ds.zero_stage", "2"])
    assert flags.take_explain_flags(["--ds.zero_stage", "2", "--explain"]) == ("text", None, ["--ds.zero_stage", "2"])


def test_a_hopeless_run_raises_after_it_is_printed(run_flags, capsys):
    with pytest.raises(SelfSpecError, match="--ds.lora.rank"):
        explain.main(as_argv(ON_A100 | run_flags | {"--self-spec": "fixed", "--ds.lora.rank": "8"}))
    assert "Problems" in capsys.readouterr().out


def test_nothing_heavy_is_loaded(run_flags):
    code = (
        "import sys; from openrlhf_sd import launch; assert launch.main(sys.argv[1:]) == 0; "
        "print(sorted({'torch', 'ray', 'vllm', 'transformers', 'scipy'} & set(sys.modules)), file=sys.stderr)"
    )
    argv = as_argv({**ON_A100, "--self-spec": "auto", **run_flags})
    result = subprocess.run([sys.executable, "-c", code, *argv], capture_output=True, text=True, check=True)
    assert result.stderr.strip() == "[]"
