"""What, besides the speculation, differs between runs: the warnings that let a reader distrust a comparison."""

from __future__ import annotations

from typing import Any

from openrlhf_sd.provenance import SECRET_FLAGS
from openrlhf_sd.run_records import ROLLOUT_S, RunRecords

SEED_FLAG = "train.seed"
UNCOMPARED_FLAGS = (SEED_FLAG, "ckpt.path", "ckpt.output_dir", "logger.tensorboard_dir")
UNCOMPARED_PREFIXES = ("self_spec.", "self-spec.", "logger.wandb.")
"""Flags that may differ without making two runs different experiments: seeds, where things go and what they are called."""


def is_compared(flag: str) -> bool:
    return not (flag in UNCOMPARED_FLAGS or flag.startswith(UNCOMPARED_PREFIXES))


def differences(run: RunRecords, base: RunRecords, label: str, base_label: str) -> list[str]:
    """One sentence for each kind of difference: OpenRLHF flags, machine, versions, steps logged."""
    warnings = []
    flags, base_flags = run.config["openrlhf"], base.config["openrlhf"]
    differing = [
        f"--{flag}: {shown(flags, flag)} against {shown(base_flags, flag)}"
        for flag in sorted(set(flags) | set(base_flags))
        if is_compared(flag) and shown(flags, flag) != shown(base_flags, flag)
    ]
    if differing:
        warnings.append(f"{label} and {base_label} ran with different OpenRLHF flags: " + "; ".join(differing))
    warnings += surroundings(run, base, label, base_label)
    steps, base_steps = set(run.scalar(ROLLOUT_S)), set(base.scalar(ROLLOUT_S))
    if steps != base_steps:
        warnings.append(
            f"{label} logged {len(steps)} steps, {base_label} {len(base_steps)}: the sums cover different work, "
            f"the speed-ups and the reward difference only the {len(steps & base_steps)} steps both logged"
        )
    return warnings


def surroundings(run: RunRecords, base: RunRecords, label: str, base_label: str) -> list[str]:
    """Different machines and versions."""
    warnings = []
    if run.provenance and base.provenance:
        if run.provenance["machine"] != base.provenance["machine"]:
            warnings.append(f"{label} and {base_label} ran on different machines: their times do not compare")
        packages, base_packages = run.provenance["packages"], base.provenance["packages"]
        changed = [p for p in sorted(set(packages) | set(base_packages)) if packages.get(p) != base_packages.get(p)]
        if changed:
            warnings.append(f"{label} and {base_label} ran with different versions of " + ", ".join(changed))
    return warnings


def shown(flags: dict[str, Any], flag: str) -> str:
    """A flag's value as text; secrets are never shown."""
    if flag not in flags:
        return "not set"
    return "(hidden)" if flag in SECRET_FLAGS and flags[flag] is not None else str(flags[flag])
