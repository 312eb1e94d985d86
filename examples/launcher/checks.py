"""What can be said about a command line before it runs, by OpenRLHF's own parser and checks and by ours."""

from __future__ import annotations

from typing import Any

from command import Flags, to_argv
from experiment import Experiment

from openrlhf_sd import flags as launch_flags
from openrlhf_sd import preflight
from openrlhf_sd.config import SelfSpecError
from openrlhf_sd.cpu import platform


def check_flags(experiment: Experiment, flags: Flags) -> None:
    """Every check that needs neither the model, the data nor the GPUs. Imports torch.

    Raises:
        SelfSpecError: a flag that neither OpenRLHF nor we know, or a value or a combination that one of us refuses.
    """
    config, _, upstream_argv = launch_flags.split_flags(to_argv(flags))
    upstream = launch_flags.parse_upstream(upstream_argv)
    for problem in preflight.flag_problems(config, upstream):
        raise problem
    if experiment.gpus == 0 and platform.is_needed():
        preflight.check_cpu(upstream)
    launch_flags.check_upstream(upstream)
    _check_batch(vars(upstream))


def check_machine(experiment: Experiment) -> None:
    """Raises SelfSpecError where the experiment needs GPUs and the machine has none."""
    if experiment.gpus > 0 and platform.is_needed():
        raise SelfSpecError(
            f"{experiment.name}: needs {experiment.gpus} GPUs and this machine has none; --dry-run checks and prints the command here"
        )


def _check_batch(flags: dict[str, Any]) -> None:
    samples = flags["rollout.batch_size"] * flags["rollout.n_samples_per_prompt"]
    if flags["train.dynamic_batch_enable"] and samples < flags["train.batch_size"]:
        # openrlhf/trainer/ppo_utils/replay_buffer.py, setup_dynamic_batch: it then makes no step at all, and says nothing.
        raise SelfSpecError(
            f"--train.batch_size: {flags['train.batch_size']} is more than the {samples} samples of a rollout, so OpenRLHF would never "
            f"update the policy; give --train.batch_size {samples}"
        )
