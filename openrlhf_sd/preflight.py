"""Checks that end a hopeless run in one line, before Ray, vLLM or DeepSpeed start. Cheapest first."""

from __future__ import annotations

import argparse
import json
import math
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from openrlhf_sd.config import SelfSpecConfig, SelfSpecError
from openrlhf_sd.model_support import check_model

RUN_CONFIG = "config.json"
DATA_SUFFIXES = (".json", ".jsonl", ".csv", ".parquet", ".arrow")


def check(config: SelfSpecConfig | None, run_dir: str | None, upstream: argparse.Namespace) -> None:
    """Raises SelfSpecError for what is wrong with the files and flags of this run on any machine.

    Args:
        config: None for a vanilla run.
        upstream: OpenRLHF's flags, flat, dotted names.
    """
    flags = vars(upstream)
    if config is not None:
        _check_self_spec(flags)
        _check_ramp_up(config, flags)
    model_config = _read_model_config(flags["actor.model_name_or_path"])
    if config is not None and model_config is not None:
        check_model(model_config, "--actor.model_name_or_path")
        if config.group_size is not None:
            _check_group_size(config.group_size, model_config, flags["vllm.tensor_parallel_size"])
    _check_inputs(flags)
    if run_dir is not None:
        _check_run_dir(Path(run_dir))


def check_cpu(upstream: argparse.Namespace) -> None:
    """Raises SelfSpecError for flags that ask for what a machine without CUDA does not have."""
    _check_cpu_trainer(vars(upstream))
    _check_cpu_engines(vars(upstream))


def _check_self_spec(flags: dict[str, Any]) -> None:
    if flags["ds.lora.rank"] > 0:
        raise SelfSpecError(
            "--ds.lora.rank: does not work with --self-spec, because OpenRLHF's weight sync sends adapters "
            "the engine cannot load; train without LoRA"
        )
    if not flags["vllm.num_engines"]:
        raise SelfSpecError("--vllm.num_engines: --self-spec speculates inside vLLM engines; give at least 1")


def _check_ramp_up(config: SelfSpecConfig, flags: dict[str, Any]) -> None:
    if config.mode not in ("toggle", "adaptive"):
        return
    prompts = flags["rollout.vllm_generate_batch_size"] or flags["rollout.batch_size"]
    per_engine = math.ceil(prompts * flags["rollout.n_samples_per_prompt"] / flags["vllm.num_engines"])
    if per_engine <= config.ramp_up:
        raise SelfSpecError(
            f"--self-spec.ramp_up: {config.mode} waits until more than {config.ramp_up} requests have decoded at once, and an engine of this "
            f"run gets {per_engine}, so it would never speculate; give --self-spec.ramp_up {per_engine // 2} or less"
        )


def _check_cpu_trainer(flags: dict[str, Any]) -> None:
    attention = flags["ds.attn_implementation"]
    if attention not in ("sdpa", "eager"):
        raise SelfSpecError(f"--ds.attn_implementation: {attention} needs a GPU and there is none; use sdpa or eager")
    needs_flash_attention = {
        "--ds.packing_samples": flags["ds.packing_samples"],
        "--train.dynamic_batch_enable": flags["train.dynamic_batch_enable"],
        "--ds.ring_attn_size": flags["ds.ring_attn_size"] > 1,
    }
    needs_cuda_kernels = {
        "--ds.load_in_4bit": flags["ds.load_in_4bit"],
        "--ds.use_liger_kernel": flags["ds.use_liger_kernel"],
        "--ds.deepcompile": flags["ds.deepcompile"],
    }
    for flag, given in needs_flash_attention.items():
        if given:
            raise SelfSpecError(f"{flag}: packs samples with flash-attn, which needs a GPU and there is none; drop it")
    for flag, given in needs_cuda_kernels.items():
        if given:
            raise SelfSpecError(f"{flag}: needs CUDA kernels and there is no GPU; drop it")


def _check_cpu_engines(flags: dict[str, Any]) -> None:
    if flags["vllm.sync_with_ray"]:
        raise SelfSpecError(
            "--vllm.sync_with_ray: vLLM's CPU worker is no Ray actor, Ray cannot send it weights; drop it"
        )
    if flags["vllm.tensor_parallel_size"] > 1:
        raise SelfSpecError(
            "--vllm.tensor_parallel_size: one engine uses the cores of this machine already; "
            "use 1, or more --vllm.num_engines"
        )
    if flags["vllm.enable_sleep"] and flags["train.colocate_all"]:
        raise SelfSpecError("--vllm.enable_sleep: vLLM cannot sleep on the CPU; drop it")
    if flags["train.colocate_all"] and flags["vllm.sync_backend"] == "nccl":
        raise SelfSpecError(
            "--train.colocate_all: hands weights over by CUDA IPC and there is no GPU; add --vllm.sync_backend gloo"
        )


def _read_model_config(model: str | None) -> dict[str, Any] | None:
    """config.json of the model, or None for a name that only the hub knows."""
    flag = "--actor.model_name_or_path"
    if model is None:
        raise SelfSpecError(f"{flag}: missing; give the folder of the policy to train")
    folder = Path(model).expanduser()
    if not folder.is_dir():
        looks_like_path = model.startswith(("/", ".", "~")) or model.count("/") != 1
        if looks_like_path or os.environ.get("HF_HUB_OFFLINE") == "1":
            raise SelfSpecError(f"{flag}: no folder {model}; give the folder that holds the model's {RUN_CONFIG}")
        return None
    path = folder / "config.json"
    try:
        return json.loads(path.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise SelfSpecError(f"{flag}: cannot read {path} ({error}); give the folder of a Hugging Face model") from error


def _check_group_size(group_size: int, model_config: dict[str, Any], tensor_parallel_size: int) -> None:
    # Imports torch, a second or two: the price of having the rule in one place. Without --self-spec.group_size it is
    # not paid.
    from openrlhf_sd.engine.quantize import check_group_size, linear_input_widths

    check_group_size(group_size, linear_input_widths(SimpleNamespace(**model_config), tensor_parallel_size))


def _check_inputs(flags: dict[str, Any]) -> None:
    if not (flags["reward.remote_url"] or flags["reward.model_name_or_path"] or flags["train.agent_func_path"]):
        raise SelfSpecError(
            "--reward.remote_url: missing; give a .py file with a reward_func, or --reward.model_name_or_path"
        )
    for name in ("reward.remote_url", "train.agent_func_path"):
        path = flags[name]
        if path is not None and path.endswith(".py") and not Path(path).is_file():
            raise SelfSpecError(f"--{name}: no file {path}")
    datasets = flags["data.prompt_dataset"]
    if datasets is None:
        raise SelfSpecError("--data.prompt_dataset: missing; give a data set, for example prompts.jsonl")
    for dataset in datasets.split(","):
        if dataset.strip().endswith(DATA_SUFFIXES) and not Path(dataset.strip()).is_file():
            raise SelfSpecError(f"--data.prompt_dataset: no file {dataset.strip()}")


def _check_run_dir(run_dir: Path) -> None:
    flag = "--self-spec.run_dir"
    if (run_dir / RUN_CONFIG).exists():
        raise SelfSpecError(f"{flag}: {run_dir} already holds a run; give another folder")
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        probe = run_dir / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise SelfSpecError(f"{flag}: cannot write to {run_dir} ({error.strerror}); give another folder") from error
