"""Checks that end a hopeless run in one line, before Ray, vLLM or DeepSpeed start. Cheapest first."""

from __future__ import annotations

import argparse
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from openrlhf_sd.config import SelfSpecConfig, SelfSpecError
from openrlhf_sd.drafter_scheme import check_group_size, linear_input_widths
from openrlhf_sd.model_support import check_model, check_weights, own_code

RUN_CONFIG = "config.json"
DATA_SUFFIXES = (".json", ".jsonl", ".csv", ".parquet", ".arrow")

VLLM_MAX_NUM_SEQS = 128
"""Requests that an engine of OpenRLHF runs at once, on a GPU and on a CPU: nobody says otherwise, and an `AsyncLLMEngine` takes
`SchedulerConfig.DEFAULT_MAX_NUM_SEQS`. (A `vllm.LLM` would take 256 or more, by the device: `EngineArgs.get_batch_defaults`.)"""

Problems = Iterator[SelfSpecError]


def check(config: SelfSpecConfig | None, run_dir: str | None, upstream: argparse.Namespace) -> None:
    """Raises SelfSpecError for the first thing that is wrong with the files and flags of this run on any machine.

    Args:
        config: None for a vanilla run.
        upstream: OpenRLHF's flags, flat, dotted names.
    """
    model_config = read_model_config(vars(upstream)["actor.model_name_or_path"])
    for problem in problems(config, run_dir, upstream, model_config):
        raise problem
    if run_dir is not None:
        _check_writable(Path(run_dir))


def check_cpu(upstream: argparse.Namespace) -> None:
    """Raises SelfSpecError for the first flag that asks for what a machine without CUDA does not have."""
    for problem in cpu_problems(upstream):
        raise problem


def problems(
    config: SelfSpecConfig | None, run_dir: str | None, upstream: argparse.Namespace, model_config: dict[str, Any] | None
) -> Problems:
    """Everything that makes this run hopeless on any machine, one by one, cheapest first. Nothing is written.

    Args:
        model_config: the policy's config.json; None where only the hub knows it.
    """
    flags = vars(upstream)
    yield from flag_problems(config, run_dir, upstream)
    if model_config is not None:
        yield from _context_length(model_config, flags)
        if config is not None:
            yield from _drafter(config, model_config, flags)
    yield from _inputs(flags)
    if run_dir is not None and (Path(run_dir) / RUN_CONFIG).exists():
        yield SelfSpecError(f"--self-spec.run_dir: {run_dir} already holds a run; give another folder")


def flag_problems(config: SelfSpecConfig | None, run_dir: str | None, upstream: argparse.Namespace) -> Problems:
    """Those of them that show in the flags alone, without a look at the model, the data or a folder."""
    flags = vars(upstream)
    yield from _bounds(flags)
    if config is not None:
        yield from _self_spec(flags)
        yield from _audit(config, run_dir, flags)
        yield from _ramp_up(config, flags)
    yield from _colocation(flags)
    yield from _dtype(flags)
    yield from _dynamic_batch(flags)


def warnings(upstream: argparse.Namespace) -> Iterator[str]:
    """What a user may not want and no flag forbids."""
    yield from own_code({f"--{name}": value for name, value in vars(upstream).items() if name.endswith(".model_name_or_path")})


def cpu_problems(upstream: argparse.Namespace) -> Problems:
    """What else is hopeless on a machine without CUDA."""
    yield from _cpu_trainer(vars(upstream))
    yield from _cpu_engines(vars(upstream))


def requests_per_engine(flags: dict[str, Any]) -> int:
    """Requests of one rollout that the busiest engine gets: OpenRLHF deals out whole prompts with all their samples, evenly."""
    prompts = flags["rollout.vllm_generate_batch_size"] or flags["rollout.batch_size"]
    return math.ceil(prompts / flags["vllm.num_engines"]) * flags["rollout.n_samples_per_prompt"]


def requests_at_once(flags: dict[str, Any]) -> int:
    """Of those, how many vLLM runs at the same time at most."""
    return min(requests_per_engine(flags), VLLM_MAX_NUM_SEQS)


LEAST = {
    "vllm.num_engines": (1, "OpenRLHF generates with vLLM engines alone"),
    "vllm.tensor_parallel_size": (1, "an engine runs on that many GPUs"),
    "rollout.batch_size": (1, "prompts per rollout"),
    "rollout.n_samples_per_prompt": (1, "responses per prompt"),
    "rollout.micro_batch_size": (1, "responses that the trainer scores at once"),
    "train.batch_size": (1, "responses per update"),
    "train.micro_batch_size": (1, "responses that the trainer learns from at once"),
    "actor.num_nodes": (1, "the policy has to be trained somewhere"),
    "actor.num_gpus_per_node": (1, "the policy has to be trained somewhere"),
    "logger.logging_steps": (1, "steps between two logged ones"),
}
"""Flag -> its least value, what it is. OpenRLHF finds a lower one out when Ray has started already, mostly by a division by zero."""

NEVER = ("eval.steps", "ckpt.save_steps")
"""Flags of which OpenRLHF takes a 0 for a divisor, after the first training step, and -1 for never."""


def _bounds(flags: dict[str, Any]) -> Problems:
    for name, (least, what) in LEAST.items():
        if (flags[name] or 0) < least:
            found = "missing" if flags[name] is None else f"{flags[name]} is too few"
            yield SelfSpecError(f"--{name}: {found} ({what}); give at least {least}")
    for name in NEVER:
        if flags[name] == 0:
            yield SelfSpecError(f"--{name}: OpenRLHF divides by it after the first step; give -1 for never")
    longest_response = flags["rollout.max_new_tokens"]
    if longest_response is not None and longest_response >= flags["data.max_len"]:
        yield SelfSpecError(
            f"--rollout.max_new_tokens: {longest_response} leaves no room for the prompt in --data.max_len "
            f"{flags['data.max_len']}, which holds prompt and response; OpenRLHF would cut prompts silently; raise --data.max_len"
        )


def _self_spec(flags: dict[str, Any]) -> Problems:
    if flags["ds.lora.rank"] > 0:
        yield SelfSpecError(
            "--ds.lora.rank: does not work with --self-spec, because OpenRLHF's weight sync sends adapters "
            "the engine cannot load; train without LoRA"
        )
    if flags["ds.load_in_4bit"]:
        yield SelfSpecError(
            "--ds.load_in_4bit: does not work with --self-spec, because the trainer's packed 4-bit weights are none the engine can load or "
            "the drafter be quantized from; train in bf16"
        )
    if flags["data.max_images_per_prompt"] > 0:
        yield SelfSpecError(
            "--data.max_images_per_prompt: does not work with --self-spec, because the drafter has no way to see images; train without "
            "--self-spec"
        )
    if flags["train.partial_rollout_enable"] and flags["vllm.enable_prefix_caching"]:
        yield SelfSpecError(
            "--vllm.enable_prefix_caching: not tested together with --train.partial_rollout_enable, where a prompt cached under the old "
            "weights must not be found under the new ones; drop one of the two"
        )
    if flags["use_ms"] and not Path(flags["actor.model_name_or_path"] or "").expanduser().is_dir():
        yield SelfSpecError("--use_ms: --self-spec must read the model before ModelScope can fetch it; download it and give its folder")


def _audit(config: SelfSpecConfig, run_dir: str | None, flags: dict[str, Any]) -> Problems:
    if not config.audit:
        return
    if run_dir is None:
        yield SelfSpecError("--self-spec.audit: has nowhere to save evidence; add --self-spec.run_dir")
    if flags["train.partial_rollout_enable"]:
        yield SelfSpecError(
            "--self-spec.audit: with --train.partial_rollout_enable the weights change in the middle of a response, so no one policy can "
            "score it again; drop one of the two"
        )
    if flags["algo.advantage.is_correction_level"] != "off" and flags["rollout.top_p"] < 1:
        yield SelfSpecError(
            "--self-spec.audit: the rollout's logprobs are those after --rollout.top_p and cannot be computed again from a prefill; use "
            "--rollout.top_p 1 or drop the audit"
        )


def _dtype(flags: dict[str, Any]) -> Problems:
    """What OpenRLHF's weight sync asserts after the first training step (`trainer/ray/vllm_worker_wrap.py`): its engines are bf16."""
    if flags["ds.param_dtype"] != "bf16" and flags["vllm.num_engines"]:
        yield SelfSpecError(
            f"--ds.param_dtype: OpenRLHF's vLLM engines are bf16 and refuse weights in {flags['ds.param_dtype']} at the first sync; "
            "use bf16"
        )


def _dynamic_batch(flags: dict[str, Any]) -> Problems:
    """OpenRLHF updates once per whole train batch of a rollout (`NaiveReplayBuffer.setup_dynamic_batch`), and without one says nothing."""
    samples = flags["rollout.batch_size"] * flags["rollout.n_samples_per_prompt"]
    if flags["train.dynamic_batch_enable"] and samples < flags["train.batch_size"]:
        yield SelfSpecError(
            f"--train.batch_size: {flags['train.batch_size']} is more than the {samples} samples of a rollout (--rollout.batch_size x "
            "--rollout.n_samples_per_prompt), so with --train.dynamic_batch_enable OpenRLHF would never update the policy; give "
            f"--train.batch_size {samples} or less"
        )


def _ramp_up(config: SelfSpecConfig, flags: dict[str, Any]) -> Problems:
    if config.mode not in ("toggle", "adaptive") or not flags["vllm.num_engines"]:
        return
    at_once = requests_at_once(flags)
    if at_once <= config.ramp_up:
        yield SelfSpecError(
            f"--self-spec.ramp_up: {config.mode} waits until more than {config.ramp_up} requests have decoded at once, and an engine of "
            f"this run decodes {at_once} at most, so it would never speculate; give --self-spec.ramp_up {at_once // 2} or less"
        )


def _colocation(flags: dict[str, Any]) -> Problems:
    """What OpenRLHF asserts when Ray has started already."""
    actor_gpus, ref_gpus = ((flags[f"{role}.num_nodes"], flags[f"{role}.num_gpus_per_node"]) for role in ("actor", "ref"))
    if flags["train.colocate_all"] and not flags["train.async_enable"] and flags["vllm.num_engines"]:
        engine_gpus = flags["vllm.num_engines"] * flags["vllm.tensor_parallel_size"]
        if math.prod(actor_gpus) != engine_gpus:
            yield SelfSpecError(
                f"--train.colocate_all: puts the engines on the actor's GPUs, but the actor has {math.prod(actor_gpus)} (--actor.num_nodes "
                f"x --actor.num_gpus_per_node) and the engines {engine_gpus} (--vllm.num_engines x --vllm.tensor_parallel_size); make them "
                "equal"
            )
    critic_gpus, reward_gpus = ((flags[f"{role}.num_nodes"], flags[f"{role}.num_gpus_per_node"]) for role in ("critic", "reward"))
    has_critic = flags["algo.advantage.estimator"] == "gae"
    has_reward = bool(flags["reward.model_name_or_path"])
    if flags["train.colocate_critic_reward"] and has_critic and has_reward and critic_gpus != reward_gpus:
        yield SelfSpecError(
            f"--reward.num_gpus_per_node: critic and reward model share GPUs, but have {critic_gpus[0]} x {critic_gpus[1]} and "
            f"{reward_gpus[0]} x {reward_gpus[1]} (nodes x GPUs); give the reward model the critic's"
        )
    for role, is_there, gpus in (("critic", has_critic, critic_gpus), ("reward", has_reward, reward_gpus)):
        if flags["train.colocate_all"] and is_there and math.prod(gpus) > math.prod(actor_gpus):
            yield SelfSpecError(
                f"--{role}.num_gpus_per_node: with --train.colocate_all the {role} lives on the actor's {math.prod(actor_gpus)} GPUs, but "
                f"asks for {math.prod(gpus)} (--{role}.num_nodes x --{role}.num_gpus_per_node); give it the actor's"
            )
    colocates_ref = flags["train.colocate_all"] or flags["train.colocate_actor_ref"]
    if colocates_ref and flags["algo.kl.init_coef"] > 0 and actor_gpus != ref_gpus:
        yield SelfSpecError(
            f"--ref.num_gpus_per_node: actor and reference share GPUs, but have {actor_gpus[0]} x {actor_gpus[1]} and {ref_gpus[0]} x "
            f"{ref_gpus[1]} (nodes x GPUs); give the reference the actor's"
        )


def _context_length(model_config: dict[str, Any], flags: dict[str, Any]) -> Problems:
    """What vLLM refuses when Ray has started already. Models whose positions are stretched by RoPE scaling are left to it."""
    positions, longest = model_config.get("max_position_embeddings"), flags["data.max_len"]
    rope = model_config.get("rope_scaling") or model_config.get("rope_parameters") or {}
    is_per_layer = any(isinstance(value, dict) for value in rope.values())
    is_stretched = is_per_layer or rope.get("rope_type", rope.get("type", "default")) != "default"
    may_be_longer = os.environ.get("VLLM_ALLOW_LONG_MAX_MODEL_LEN", "0") != "0" or "model_max_length" in model_config
    if isinstance(positions, int) and longest > positions and flags["vllm.num_engines"] and not is_stretched and not may_be_longer:
        yield SelfSpecError(
            f"--data.max_len: prompt and response may take {longest} tokens, but the model has {positions} positions and vLLM refuses "
            f"more; give {positions} or less, or a model with a longer context"
        )


def _drafter(config: SelfSpecConfig, model_config: dict[str, Any], flags: dict[str, Any]) -> Problems:
    flag = "actor.model_name_or_path"
    try:
        check_model(model_config, f"--{flag}")
        check_weights(flags[flag], f"--{flag}")
        if config.group_size is not None:
            widths = linear_input_widths(SimpleNamespace(**model_config), flags["vllm.tensor_parallel_size"])
            check_group_size(config.group_size, widths)
    except SelfSpecError as problem:
        yield problem


def _cpu_trainer(flags: dict[str, Any]) -> Problems:
    attention = flags["ds.attn_implementation"]
    if attention not in ("sdpa", "eager"):
        yield SelfSpecError(f"--ds.attn_implementation: {attention} needs a GPU and there is none; use sdpa or eager")
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
            yield SelfSpecError(f"{flag}: packs samples with flash-attn, which needs a GPU and there is none; drop it")
    for flag, given in needs_cuda_kernels.items():
        if given:
            yield SelfSpecError(f"{flag}: needs CUDA kernels and there is no GPU; drop it")


def _cpu_engines(flags: dict[str, Any]) -> Problems:
    if flags["vllm.sync_with_ray"]:
        yield SelfSpecError("--vllm.sync_with_ray: vLLM's CPU worker is no Ray actor, Ray cannot send it weights; drop it")
    if flags["vllm.tensor_parallel_size"] > 1:
        yield SelfSpecError(
            "--vllm.tensor_parallel_size: one engine uses the cores of this machine already; use 1, or more --vllm.num_engines"
        )
    if flags["train.colocate_all"] and flags["vllm.sync_backend"] == "nccl":
        yield SelfSpecError("--train.colocate_all: hands weights over by CUDA IPC and there is no GPU; add --vllm.sync_backend gloo")


def read_model_config(model: str | None) -> dict[str, Any] | None:
    """config.json of the model, or None for a name that only the hub knows. Raises SelfSpecError when there is none to be had."""
    flag = "--actor.model_name_or_path"
    if model is None:
        raise SelfSpecError(f"{flag}: missing; give the folder of the policy to train")
    folder = Path(model).expanduser()
    if not folder.is_dir():
        looks_like_path = model.startswith(("/", ".", "~")) or model.count("/") != 1
        if looks_like_path or os.environ.get("HF_HUB_OFFLINE") == "1":
            raise SelfSpecError(f"{flag}: no folder {model}; give the folder that holds the model's {RUN_CONFIG}")
        return None
    return load_model_config(folder / RUN_CONFIG)


def load_model_config(path: Path) -> dict[str, Any]:
    """Raises SelfSpecError when the file holds no JSON object."""
    flag, mend = "--actor.model_name_or_path", "give the folder of a Hugging Face model"
    try:
        model_config = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise SelfSpecError(f"{flag}: cannot read {path} ({error}); {mend}") from error
    if not isinstance(model_config, dict):
        raise SelfSpecError(f"{flag}: {path} holds no JSON object; {mend}")
    return model_config


def _inputs(flags: dict[str, Any]) -> Problems:
    if not (flags["reward.remote_url"] or flags["reward.model_name_or_path"] or flags["train.agent_func_path"]):
        yield SelfSpecError("--reward.remote_url: missing; give a .py file with a reward_func, or --reward.model_name_or_path")
    for name in ("reward.remote_url", "train.agent_func_path"):
        path = flags[name]
        if path is not None and path.endswith(".py") and not Path(path).is_file():
            yield SelfSpecError(f"--{name}: no file {path}")
    agent = flags["train.agent_func_path"]
    if agent is not None and not agent.endswith(".py"):
        yield SelfSpecError(f"--train.agent_func_path: {agent} is no .py file; give one with an AgentExecutor")
    if flags["data.prompt_dataset"] is None:
        yield SelfSpecError("--data.prompt_dataset: missing; give a data set, for example prompts.jsonl")
    for name in ("data.prompt_dataset", "eval.dataset"):
        for dataset in filter(None, map(str.strip, (flags[name] or "").split(","))):
            if dataset.endswith(DATA_SUFFIXES) and not Path(dataset).is_file():
                yield SelfSpecError(f"--{name}: no file {dataset}")


def _check_writable(run_dir: Path) -> None:
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        probe = run_dir / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise SelfSpecError(f"--self-spec.run_dir: cannot write to {run_dir} ({error.strerror}); give another folder") from error
