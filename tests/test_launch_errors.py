"""Bad input ends in one line that names the flag, exit code 2, and nothing started."""

import json
import subprocess
import sys

import pytest

from openrlhf_sd import launch
from openrlhf_sd.calibration import shipped_paths
from openrlhf_sd.config import SelfSpecError

TINY_CONFIG = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_size": 96,
    "intermediate_size": 256,
    "num_attention_heads": 2,
}


@pytest.fixture
def good_flags(tmp_path):
    """A command line that passes every check, to be spoiled in one place."""
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(TINY_CONFIG))
    (tmp_path / "reward.py").write_text("")
    (tmp_path / "prompts.jsonl").write_text("")
    return {
        "--actor.model_name_or_path": str(model),
        "--reward.remote_url": str(tmp_path / "reward.py"),
        "--data.prompt_dataset": str(tmp_path / "prompts.jsonl"),
        "--ds.attn_implementation": "sdpa",
        "--vllm.num_engines": "1",
        "--algo.advantage.estimator": "group_norm",
        "--rollout.n_samples_per_prompt": "4",
    }


def as_argv(flag_values):
    return [token for flag, value in flag_values.items() for token in ((flag,) if value is None else (flag, value))]


@pytest.fixture
def forbid_training(monkeypatch):
    def train(*args):
        raise AssertionError("training was started")

    monkeypatch.setattr(launch, "train", train)


SPOILED = {
    "missing model folder": ({"--actor.model_name_or_path": "/no/such/model"}, "--actor.model_name_or_path: no folder"),
    "unknown mode": ({"--self-spec": "sometimes"}, "--self-spec: unknown mode"),
    "gamma out of range": (
        {"--self-spec": "fixed", "--self-spec.gamma": "99"},
        "--self-spec.gamma: 99 is out of range",
    ),
    "abbreviated flag": ({"--self-spec": "fixed", "--self-spec.gam": "3"}, "--self-spec.gam: no such flag"),
    "group size that does not divide": (
        # 96 input channels are no multiple of 64
        {"--self-spec": "fixed", "--self-spec.quant": "w4", "--self-spec.group_size": "64"},
        "--self-spec.group_size: 64 does not divide the input width 96",
    ),
    "LoRA": ({"--self-spec": "fixed", "--ds.lora.rank": "8"}, "--ds.lora.rank: does not work with --self-spec"),
    "4-bit trainer": ({"--self-spec": "fixed", "--ds.load_in_4bit": None}, "--ds.load_in_4bit: does not work with --self-spec"),
    "images": (
        {"--self-spec": "fixed", "--data.max_images_per_prompt": "2"},
        "--data.max_images_per_prompt: does not work with --self-spec",
    ),
    "engines of another dtype than the trainer": ({"--ds.param_dtype": "fp16"}, "--ds.param_dtype: OpenRLHF's vLLM engines are bf16"),
    "no engines": (
        {"--self-spec": "fixed", "--vllm.num_engines": "0"},
        "--vllm.num_engines: 0 is too few (OpenRLHF generates with vLLM engines alone)",
    ),
    "a check of OpenRLHF that ends in another error than its own": (
        {"--use_ms": None},
        "OpenRLHF refuses these flags: ModuleNotFoundError: ",
    ),
    "vanilla without engines": ({"--vllm.num_engines": "0"}, "--vllm.num_engines: 0 is too few"),
    "evaluating every 0 steps": ({"--eval.steps": "0"}, "--eval.steps: OpenRLHF divides by it after the first step; give -1 for never"),
    "saving every 0 steps": ({"--ckpt.save_steps": "0"}, "--ckpt.save_steps: OpenRLHF divides by it"),
    "logging every 0 steps": ({"--logger.logging_steps": "0"}, "--logger.logging_steps: 0 is too few"),
    "micro batches of nothing": ({"--rollout.micro_batch_size": "0"}, "--rollout.micro_batch_size: 0 is too few"),
    "no room for prompts": (
        {"--data.max_len": "256", "--rollout.max_new_tokens": "256"},
        "--rollout.max_new_tokens: 256 leaves no room for the prompt in --data.max_len 256",
    ),
    "missing prompts to evaluate": ({"--eval.dataset": "/no/such/test.jsonl", "--eval.steps": "5"}, "--eval.dataset: no file"),
    "agent that is no Python file": ({"--train.agent_func_path": "my.agent"}, "--train.agent_func_path: my.agent is no .py file"),
    "critic on more GPUs than the actor's": (
        {
            **{"--train.colocate_all": None, "--algo.advantage.estimator": "gae"},
            **{"--actor.num_gpus_per_node": "1", "--ref.num_gpus_per_node": "1"},
        },
        "--critic.num_gpus_per_node: with --train.colocate_all the critic lives on the actor's 1 GPUs, but asks for 8",
    ),
    "critic and reward model apart": (
        {
            **{"--train.colocate_critic_reward": None, "--algo.advantage.estimator": "gae"},
            **{"--reward.model_name_or_path": "some/reward", "--critic.num_gpus_per_node": "2", "--reward.num_gpus_per_node": "4"},
        },
        "--reward.num_gpus_per_node: critic and reward model share GPUs, but have 1 x 2 and 1 x 4",
    ),
    "cached prompts of two policies": (
        {
            **{"--self-spec": "fixed", "--vllm.enable_prefix_caching": None},
            **{"--train.async_enable": None, "--train.partial_rollout_enable": None},
        },
        "--vllm.enable_prefix_caching: not tested together with --train.partial_rollout_enable",
    ),
    "audit without a place for evidence": (
        {"--self-spec": "fixed", "--self-spec.audit": "5"},
        "--self-spec.audit: has nowhere to save evidence",
    ),
    "audit of responses of two policies": (
        {
            **{"--self-spec": "fixed", "--self-spec.audit": "5", "--self-spec.run_dir": "never-made"},
            **{"--train.async_enable": None, "--train.partial_rollout_enable": None},
        },
        "--self-spec.audit: with --train.partial_rollout_enable the weights change",
    ),
    "audit of a cut distribution": (
        {
            **{"--self-spec": "fixed", "--self-spec.audit": "5", "--self-spec.run_dir": "never-made"},
            **{"--algo.advantage.is_correction_level": "token", "--rollout.top_p": "0.9"},
        },
        "--self-spec.audit: the rollout's logprobs are those after --rollout.top_p",
    ),
    "dynamic batch that would never update": (
        {"--train.dynamic_batch_enable": None, "--rollout.batch_size": "31"},
        "--train.batch_size: 128 is more than the 124 samples of a rollout",
    ),
    "toggle that would never start": (
        # 4 prompts of 4 samples: 16 requests, and the guard waits for more than 32
        {"--self-spec": "toggle", "--rollout.batch_size": "4"},
        "--self-spec.ramp_up: toggle waits until more than 32 requests",
    ),
    "toggle without step times": (
        {"--self-spec": "toggle", "--self-spec.calibration": "none"},
        "--self-spec.calibration: toggle decides by a calibration",
    ),
    "missing calibration": (
        {"--self-spec": "auto", "--self-spec.calibration": "no_such.json"},
        "--self-spec.calibration: no_such.json: cannot be read",
    ),
    "calibration of another machine": (
        {"--self-spec": "auto", "--self-spec.calibration": str(shipped_paths()[0])},
        "--self-spec.calibration: was measured on NVIDIA A100",
    ),
    "LoRA with self-speculation": ({"--self-spec": "fixed", "--ds.lora.rank": "8"}, "--ds.lora.rank: does not work"),
    "no engine": ({"--self-spec": "fixed", "--vllm.num_engines": "0"}, "--vllm.num_engines:"),
    "engines that do not cover the actor's GPUs": (
        # 1 engine of 1 GPU; OpenRLHF's actor has 1 x 8 by default
        {"--train.colocate_all": None},
        "--train.colocate_all: puts the engines on the actor's GPUs, but the actor has 8",
    ),
    "reference on other GPUs than the actor's": (
        {"--train.colocate_actor_ref": None, "--actor.num_gpus_per_node": "4"},
        "--ref.num_gpus_per_node: actor and reference share GPUs, but have 1 x 4 and 1 x 8",
    ),
    "flag without mode": ({"--self-spec.gamma": "3"}, "--self-spec.gamma: means nothing without"),
    "unknown flag of OpenRLHF": ({"--rollout.batch_siz": "8"}, "--rollout.batch_siz: no such flag; did you mean"),
    "missing reward file": ({"--reward.remote_url": "/no/such/reward.py"}, "--reward.remote_url: no file"),
    "missing prompts": ({"--data.prompt_dataset": "/no/such/prompts.jsonl"}, "--data.prompt_dataset: no file"),
    "contradiction OpenRLHF finds": (
        {"--rollout.n_samples_per_prompt": "1"},
        "OpenRLHF refuses these flags: group_norm requires n_samples_per_prompt > 1",
    ),
}

SPOILED_ON_CPU = {
    "flash attention": (
        {"--ds.attn_implementation": "flash_attention_2"},
        "--ds.attn_implementation: flash_attention_2 needs",
    ),
    "packing": ({"--ds.packing_samples": None}, "--ds.packing_samples: packs samples"),
    "dynamic batch": ({"--train.dynamic_batch_enable": None}, "--train.dynamic_batch_enable: packs samples"),
    "sync with ray": ({"--vllm.sync_with_ray": None}, "--vllm.sync_with_ray:"),
    "tensor parallel": ({"--vllm.tensor_parallel_size": "2"}, "--vllm.tensor_parallel_size:"),
    "CUDA IPC": (
        {"--train.colocate_all": None, "--actor.num_gpus_per_node": "1", "--ref.num_gpus_per_node": "1"},
        "--train.colocate_all: hands weights over by CUDA IPC",
    ),
}


@pytest.mark.parametrize("spoil, message", SPOILED.values(), ids=SPOILED.keys())
def test_bad_input_ends_in_one_line_and_exit_code_2(good_flags, forbid_training, capsys, spoil, message):
    assert launch.main(as_argv({**good_flags, **spoil})) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"openrlhf-sd: error: {message}")


@pytest.mark.parametrize("spoil, message", SPOILED_ON_CPU.values(), ids=SPOILED_ON_CPU.keys())
def test_flags_that_need_a_gpu_are_refused_without_one(good_flags, forbid_training, monkeypatch, capsys, spoil, message):
    monkeypatch.setattr(launch.platform, "is_needed", lambda: True)
    assert launch.main(as_argv({**good_flags, **spoil})) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"openrlhf-sd: error: {message}")


def test_a_model_that_only_modelscope_can_fetch_is_refused(good_flags, forbid_training, monkeypatch, capsys):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    flags = {**good_flags, "--self-spec": "fixed", "--use_ms": None, "--actor.model_name_or_path": "qwen/Qwen2.5-7B"}
    assert launch.main(as_argv(flags)) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("openrlhf-sd: error: --use_ms: --self-spec must read the model before ModelScope can fetch it")


def test_run_dir_that_holds_a_run_is_not_overwritten(good_flags, forbid_training, tmp_path, capsys):
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "config.json").write_text("{}")
    assert launch.main(as_argv({**good_flags, "--self-spec.run_dir": str(run_dir)})) == 2
    assert "--self-spec.run_dir:" in capsys.readouterr().err
    assert [path.name for path in run_dir.iterdir()] == ["config.json"]


def test_run_dir_that_cannot_be_written(good_flags, forbid_training, tmp_path, capsys):
    (tmp_path / "file").touch()
    assert launch.main(as_argv({**good_flags, "--self-spec.run_dir": str(tmp_path / "file" / "run")})) == 2
    assert "--self-spec.run_dir: cannot write to" in capsys.readouterr().err


def test_a_failed_run_is_recorded_as_failed_and_its_secrets_are_not(good_flags, monkeypatch, tmp_path):
    def train(*args):
        raise RuntimeError("boom")

    monkeypatch.setattr(launch, "train", train)
    run_dir = tmp_path / "run"
    ours = {"--self-spec": "fixed", "--self-spec.run_dir": str(run_dir)}
    argv = as_argv({**good_flags, **ours, "--logger.wandb.key": "s3cret"})
    with pytest.raises(RuntimeError, match="boom"):
        launch.main(argv)
    config = json.loads((run_dir / "config.json").read_text())
    provenance = json.loads((run_dir / "provenance.json").read_text())
    assert config["arm"] == "fixed"
    assert config["self_spec"]["mode"] == "fixed"
    assert config["openrlhf"]["logger.tensorboard_dir"] == str(run_dir / "tensorboard")
    assert provenance["status"] == "failed"
    assert provenance["ended_unix_s"] >= provenance["started_unix_s"]
    assert {"openrlhf_sd", "torch", "ray"} <= set(provenance["packages"])
    assert "s3cret" not in (run_dir / "config.json").read_text() + (run_dir / "provenance.json").read_text()


def test_bad_input_loads_neither_torch_nor_ray():
    code = (
        "import sys; from openrlhf_sd import launch; "
        "assert launch.main(['--actor.model_name_or_path', '/no/such/model']) == 2; "
        "print(sorted({'torch', 'ray', 'vllm', 'transformers'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize(
    "change, message",
    [
        ({"architectures": ["MixtralForCausalLM"]}, "not MixtralForCausalLM"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantized already"),
    ],
)
def test_a_model_that_cannot_draft_for_itself_is_refused(good_flags, forbid_training, capsys, change, message):
    model = good_flags["--actor.model_name_or_path"]
    with open(f"{model}/config.json", "w") as file:
        json.dump({**TINY_CONFIG, **change}, file)
    assert launch.main(as_argv({**good_flags, "--self-spec": "fixed"})) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("openrlhf-sd: error: --actor.model_name_or_path: ") and message in line


def test_responses_longer_than_the_model_has_positions_are_refused(good_flags, forbid_training, capsys):
    model = good_flags["--actor.model_name_or_path"]
    with open(f"{model}/config.json", "w") as file:
        json.dump({**TINY_CONFIG, "max_position_embeddings": 4096}, file)
    assert launch.main(as_argv({**good_flags, "--data.max_len": "9216"})) == 2
    assert "--data.max_len: prompt and response may take 9216 tokens, but the model has 4096 positions" in capsys.readouterr().err


@pytest.mark.parametrize("text, message", [("[]", "holds no JSON object"), ("{", "cannot read")])
def test_a_config_that_is_none_is_named(good_flags, forbid_training, capsys, text, message):
    model = good_flags["--actor.model_name_or_path"]
    with open(f"{model}/config.json", "w") as file:
        file.write(text)
    assert launch.main(as_argv(good_flags)) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("openrlhf-sd: error: --actor.model_name_or_path: ") and message in line


def test_a_build_for_cuda_that_finds_no_gpu_is_no_reason_to_train_on_the_cpu(monkeypatch):
    import torch

    def init():
        raise RuntimeError("The NVIDIA driver on your system is too old\n(found version 12040)")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert launch.platform.is_needed()
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "init", init)
    with pytest.raises(SelfSpecError, match=r"CUDA 13\.0 and cannot use a GPU here \(The NVIDIA .* too old \(found version 12040\)\)"):
        launch.platform.is_needed()
