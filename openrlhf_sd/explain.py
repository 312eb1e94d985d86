"""`openrlhf-sd --explain <all flags of a run>`: what would run, before anything starts.

Prints mode, drafter, the memory of a GPU, where speculation is predicted to pay, and every problem of the flags, from the model's
config.json alone: no engine, no Ray, no GPU, no torch. With `--self-spec.gpu NAME` it is about that GPU instead of this machine.
Exit codes: 0; 2 where the run is hopeless, with the first problem as the usual line after all that could be said.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from calib.model_config import model_name
from openrlhf_sd import explain_text, flags, preflight
from openrlhf_sd.calibration_choice import rollout_logprobs
from openrlhf_sd.config import SelfSpecConfig, SelfSpecError
from openrlhf_sd.drafter_scheme import resolve_scheme
from openrlhf_sd.explain_memory import MemoryPlan, check_memory, plan_memory
from openrlhf_sd.explain_notes import notes
from openrlhf_sd.explain_region import Region, find_step_times, predict_region, role
from openrlhf_sd.gpus import Gpu, gpu_here, named_gpu
from openrlhf_sd.policy.model_constants import model_constants

NO_PREDICTION = (
    "no prediction: nobody has measured this device with this drafter and tensor-parallel size, and data sheets do not say how long its "
    "steps take. There, python -m calib.sweep --model DIR --out sweep.csv --quick does, and python -m calib.fit makes a calibration of it; "
)


@dataclass(frozen=True)
class Explanation:
    """Attributes:
    config: what was asked, its scheme resolved where the model is known; None for a vanilla run.
    openrlhf: OpenRLHF's flags, flat.
    gpu: None for a CPU.
    memory, region: None where nothing can be said; why, says the next one.
    problems: why the run is hopeless; empty when it is not.
    """

    config: SelfSpecConfig | None
    openrlhf: dict[str, Any]
    gpu: Gpu | None
    memory: MemoryPlan | None
    why_no_memory: str | None
    region: Region | None
    why_no_region: str | None
    notes: tuple[str, ...]
    problems: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """As JSON, without OpenRLHF's flags, which the reader gave."""
        values = dataclasses.asdict(self)
        del values["openrlhf"]
        return values


def main(argv: Sequence[str]) -> int:
    """Raises SelfSpecError for flags that cannot be parsed, and, after printing, for a run that is hopeless."""
    output, gpu_name, run_argv = flags.take_explain_flags(argv)
    gpu = None if gpu_name is None else named_gpu(gpu_name, flags.GPU_FLAG)
    config, run_dir, upstream_argv = flags.split_flags(run_argv)
    explanation = explain(config, run_dir, flags.parse_upstream(upstream_argv), gpu)
    if output == "json":
        print(json.dumps(explanation.to_dict(), indent=1))
    else:
        explain_text.show(explanation)
    if explanation.problems:
        first, *others = explanation.problems
        raise SelfSpecError(first + (f" (and {len(others)} more, above)" if others else ""))
    return 0


def explain(config: SelfSpecConfig | None, run_dir: str | None, upstream: argparse.Namespace, named: Gpu | None = None) -> Explanation:
    """Args:
    named: the GPU to explain for; None for this machine's, if it has one.
    """
    settings = vars(upstream)
    gpu = named or gpu_here()
    model_config = None
    problems: list[str] = []
    try:
        model_config = _read_model_config(settings["actor.model_name_or_path"])
    except SelfSpecError as problem:
        problems.append(str(problem))
    problems += map(str, preflight.problems(config, run_dir, upstream, model_config))
    if gpu is None:
        problems += map(str, preflight.cpu_problems(upstream))
    try:
        flags.check_upstream(upstream)
    except SelfSpecError as problem:
        problems.append(str(problem))
    except AttributeError:
        if not problems:  # else it stumbled over a missing flag that is named already
            raise

    memory = region = why_no_region = None
    why_no_memory = None if settings["vllm.num_engines"] else "no vLLM engines"
    if model_config is not None and settings["vllm.num_engines"]:
        try:
            constants = model_constants(model_config, settings["vllm.tensor_parallel_size"])
            if config is not None:
                widths = tuple(inputs for _, inputs in constants.layer_linears)
                config = resolve_scheme(config, widths, on_gpu=gpu is not None)
            memory = plan_memory(constants, config, settings, gpu, None if gpu else _free_bytes())
        except SelfSpecError as problem:
            why_no_memory = str(problem)
            if config is not None and why_no_memory not in problems:
                problems.append(why_no_memory)
    if memory is not None:
        try:
            check_memory(memory)
        except SelfSpecError as problem:
            problems.append(str(problem))
        if config is not None:
            try:
                region = _region(config, model_config, settings, gpu, memory, is_here=named is None)
                why_no_region = None if region else NO_PREDICTION + role(config, decides=False)
            except SelfSpecError as problem:
                why_no_region = str(problem)
                problems.append(why_no_region)
    said = (*preflight.warnings(upstream), *notes(config, settings, gpu, memory, region))
    return Explanation(config, settings, gpu, memory, why_no_memory, region, why_no_region, said, tuple(problems))


def _region(
    config: SelfSpecConfig, model_config: dict[str, Any], settings: dict[str, Any], gpu: Gpu | None, memory: MemoryPlan, is_here: bool
) -> Region | None:
    from calib.device import device_name

    device = device_name() if gpu is None else gpu.device
    model, ranks = settings["actor.model_name_or_path"], settings["vllm.tensor_parallel_size"]
    times = find_step_times(config, model_config, model_name(model), device, ranks, rollout_logprobs(settings), is_here)
    if times is None:
        return None
    return predict_region(config, times, memory.requests_at_once, memory.longest_request_tokens, memory.kv_tokens)


def _read_model_config(model: str | None) -> dict[str, Any]:
    """config.json of a folder, of the file itself, or of a name that the hub's cache knows.

    Raises:
        SelfSpecError: there is none.
    """
    if model is not None and Path(model).expanduser().is_file():
        return preflight.load_model_config(Path(model).expanduser())
    found = preflight.read_model_config(model)
    if found is not None:
        return found
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(model, preflight.RUN_CONFIG)
    if not isinstance(cached, str):
        raise SelfSpecError(
            f"--actor.model_name_or_path: {model} is not in the hub's cache here, and {flags.EXPLAIN_FLAG} downloads nothing; give the "
            f"model's folder or the path of its {preflight.RUN_CONFIG}"
        )
    return preflight.load_model_config(Path(cached))


def _free_bytes() -> int:
    from calib.device import free_bytes

    return free_bytes(1)
