"""What can be said about a command line before it runs, by OpenRLHF's own parser and checks and by ours."""

from __future__ import annotations

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
    config, run_dir, upstream_argv = launch_flags.split_flags(to_argv(flags))
    upstream = launch_flags.parse_upstream(upstream_argv)
    for problem in preflight.flag_problems(config, run_dir, upstream):
        raise problem
    if experiment.gpus == 0 and platform.is_needed():
        preflight.check_cpu(upstream)
    launch_flags.check_upstream(upstream)


def check_machine(experiment: Experiment) -> None:
    """Raises SelfSpecError where the experiment needs GPUs and the machine has none."""
    if experiment.gpus > 0 and platform.is_needed():
        raise SelfSpecError(
            f"{experiment.name}: needs {experiment.gpus} GPUs and this machine has none; --dry-run checks and prints the command here"
        )
