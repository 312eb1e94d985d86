"""Controller states beside OpenRLHF's checkpoints: `CKPT_PATH/self_spec/engine{i}.jsonl`, one line per finished training step.

A resumed run takes the line of the step that its checkpoint holds, so that the ladder stands where it stood and acceptance is known.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from openrlhf_sd.config import SelfSpecConfig, SelfSpecError
from openrlhf_sd.metrics import read_rows
from openrlhf_sd.policy.controller import make_controller
from openrlhf_sd.policy.speedup import StepCosts

FOLDER = "self_spec"


@dataclass(frozen=True)
class ControllerStates:
    """Args:
    folder: CKPT_PATH/self_spec.
    global_step: the step of the checkpoint that this run resumes; 0 for a run that starts anew.
    mode: states of another mode are not this run's.
    """

    folder: str
    global_step: int
    mode: str

    def row(self, global_step: int, state: dict[str, Any]) -> dict[str, Any]:
        """The line of a finished training step, to be appended to `path`."""
        return {"global_step": global_step, "mode": self.mode, "state": state}

    def saved(self, engine: int) -> dict[str, Any] | None:
        """The state at the checkpoint, None when this run starts anew, or when the run before it had no such engine, or another mode:
        acceptance is then learned from the first rollout on."""
        path = self.path(engine)
        if self.global_step == 0 or not path.exists():
            return None
        rows, _ = read_rows(path)
        # A step may be there twice: a run that was resumed earlier has lived through it again.
        found = [row for row in rows if row.get("global_step") == self.global_step and row.get("mode") == self.mode]
        return found[-1]["state"] if found else None

    def check(self, config: SelfSpecConfig, costs: StepCosts | None) -> None:
        """Raises SelfSpecError where the state at the checkpoint is not one that these settings can go on from."""
        state = self.saved(engine=0)
        try:
            if state is not None:
                make_controller(config, costs).restore(state)
        except (ValueError, KeyError, TypeError) as error:
            raise SelfSpecError(
                f"--ckpt.load_enable: {self.path(0)} was saved under other --self-spec settings ({error}); give those of the run before, "
                f"or remove the folder {FOLDER} to learn anew"
            ) from None

    def path(self, engine: int) -> Path:
        return Path(self.folder) / f"engine{engine}.jsonl"


def controller_states(upstream: dict[str, Any], mode: str) -> ControllerStates | None:
    """From OpenRLHF's flags; None where the run neither saves nor loads checkpoints.

    Raises:
        SelfSpecError: the checkpoint to resume names no step.
    """
    saves = upstream["ckpt.save_steps"] > 0 or (upstream["eval.dataset"] and upstream["eval.steps"] > 0)
    if not saves and not upstream["ckpt.load_enable"]:
        return None
    return ControllerStates(str(Path(upstream["ckpt.path"]).resolve() / FOLDER), checkpoint_step(upstream), mode)


def checkpoint_step(upstream: dict[str, Any]) -> int:
    """The global step that a run with these flags of OpenRLHF goes on from; 0 for a run that starts anew. DeepSpeed's file `latest` names
    the newest checkpoint, OpenRLHF calls it global_stepN or best_global_stepN.

    Raises:
        SelfSpecError: the checkpoint names no step, or one that is not the step it holds.
    """
    latest = Path(upstream["ckpt.path"]) / "_actor" / "latest"
    if not upstream["ckpt.load_enable"] or not latest.exists():
        return 0  # without a checkpoint OpenRLHF starts anew, too
    match = re.fullmatch(r"(?:best_)?global_step(\d+)", latest.read_text().strip())
    if match is None:
        raise SelfSpecError(f"--ckpt.path: {latest} names no global_step; give the folder of an OpenRLHF run, or drop --ckpt.load_enable")
    if match[0].startswith("best") and upstream["train.async_enable"]:
        # It is named after the step that was evaluated, and the trainer has gone on meanwhile.
        raise SelfSpecError(
            f"--ckpt.load_enable: with --train.async_enable the checkpoint {match[0]} holds a later step than its name says, and the "
            f"controller's state would be that of another; write a global_stepN of --ckpt.save_steps into {latest}"
        )
    return int(match[1])
