"""The rollout engines of a run: OpenRLHF's `create_vllm_engines` with our actor in place of its own.

OpenRLHF names its actor literally inside `create_vllm_engines`, so `make_create_vllm_engines` gives back a function that calls the
unchanged upstream one while that name means our subclass. Trainers, sample generators and the weight broadcast stay upstream's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from openrlhf_sd.config import SelfSpecConfig
from openrlhf_sd.controller_states import ControllerStates
from openrlhf_sd.policy.cost_model import CostModel
from openrlhf_sd.rollout_actor import plain_rollout_actor
from openrlhf_sd.rollout_pool import start_pool
from openrlhf_sd.self_spec_actor import self_spec_rollout_actor


@dataclass(frozen=True)
class SelfSpecRun:
    """What every self-speculating engine of a run is told.

    Args:
        costs: calibrated step times; None where the mode needs none.
        states: where controller states are kept; None for a run without checkpoints.
    """

    config: SelfSpecConfig
    costs: CostModel | None
    states: ControllerStates | None


def make_create_vllm_engines(
    self_spec: SelfSpecRun | None, run_dir: str | None, resumed_step: int = 0, started: Callable[[list[Any]], None] = lambda engines: None
) -> Any:
    """A stand-in for `openrlhf.trainer.ray.create_vllm_engines` with the same signature.

    Args:
        self_spec: None for vanilla engines whose rollouts are recorded and nothing else.
        run_dir: where metrics.jsonl and evidence go; None keeps no file.
        resumed_step: global step of the checkpoint that the run goes on from; 0 for a run that starts anew.
        started: takes the engines' actors once they have been told to start.
    """
    from openrlhf.trainer.ray import vllm_engine

    upstream_create = vllm_engine.create_vllm_engines

    def create_vllm_engines(num_engines: int, *args: Any, **kwargs: Any) -> list[Any]:
        upstream_actor = vllm_engine.RolloutRayActor
        folder = run_dir and Path(run_dir).resolve()  # an actor may work in another one
        ours: dict[str, Any] = {"run_dir": folder, "resumed_step": resumed_step}
        if self_spec is None:
            actors = _NumberedActors(plain_rollout_actor(upstream_actor), ours)
        else:
            ours |= {"self_spec": self_spec, "pool": start_pool(num_engines)}
            actors = _NumberedActors(self_spec_rollout_actor(upstream_actor), ours)
        vllm_engine.RolloutRayActor = actors
        try:
            engines = upstream_create(num_engines, *args, **kwargs)
        finally:
            vllm_engine.RolloutRayActor = upstream_actor
        started(engines)
        return engines

    return create_vllm_engines


class _NumberedActors:
    """Quacks like a Ray actor class for `.options(...).remote(**kwargs)`; adds our arguments and each engine's number."""

    def __init__(self, actor: Any, extra_kwargs: dict[str, Any]) -> None:
        self._actor = actor
        self._extra_kwargs = extra_kwargs
        self._num_engines = 0

    def options(self, **options: Any) -> Any:
        self._options = options
        return self

    def remote(self, **kwargs: Any) -> Any:
        engine = self._num_engines
        self._num_engines += 1
        return self._actor.options(**self._options).remote(**kwargs, engine=engine, **self._extra_kwargs)
