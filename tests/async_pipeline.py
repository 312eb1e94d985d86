"""When an asynchronous engine process (vLLM on CUDA, tensor parallel size 1) fetches the outputs of its steps: the order of
`EngineCore.step_with_batch_queue`, `UniProcExecutor` and `GPUModelRunner` (V1) of vLLM 0.29.0, reduced to times."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from calib.cell_times import TimedStep


@dataclass(frozen=True)
class Machine:
    """Seconds, of the GPU and of the host that launches its work."""

    target_s: float
    draft_s: float
    verify_s: Callable[[int], float]
    """By gamma."""

    schedule_s: float
    launch_target_s: float
    launch_draft_s: float


class Pipeline:
    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._host_s = 0.0
        self._gpu_free_s = 0.0
        self._sampled_s = 0.0
        self._started_s = 0.0
        self._gamma_verified = 0
        self._in_flight: tuple[float, int, int] | None = None

    def step(self, gamma: int) -> tuple[float, int, int] | None:
        """Launch a step that drafts `gamma` tokens, then fetch the output of the step before: when it came, what that step verified, what
        it drafted. None before the first."""
        machine = self._machine
        corrects_counts = self._in_flight is not None and self._in_flight[1] > 0
        last_sampled_s = self._sampled_s
        # The input buffers are free when the GPU has begun the step before.
        self._host_s = max(self._host_s + machine.schedule_s, self._started_s)
        self._started_s = max(self._gpu_free_s, self._host_s)
        self._host_s += machine.launch_target_s
        verified = self._gamma_verified
        target_s = machine.verify_s(verified) if verified else machine.target_s
        self._sampled_s = max(self._started_s + target_s, self._host_s)
        if corrects_counts:
            self._host_s = max(self._host_s, last_sampled_s)
        self._gpu_free_s = self._sampled_s
        for _ in range(gamma):
            self._host_s += machine.launch_draft_s
            self._gpu_free_s = max(self._gpu_free_s + machine.draft_s, self._host_s)
        fetched, self._in_flight = self._in_flight, (self._gpu_free_s, verified, gamma)
        self._gamma_verified = gamma
        if fetched is None:
            return None
        ended_s, *gammas = fetched
        self._host_s = max(self._host_s, ended_s)
        return self._host_s, *gammas


def played_asynchronously(script: list[int], machine: Machine, context: float = 100.0) -> list[TimedStep]:
    """What a sweep's scheduler writes down of a script; the plain step after it is not in it."""
    pipeline = Pipeline(machine)
    outputs = [output for output in map(pipeline.step, [*script, 0]) if output]
    return [TimedStep(output[0] - before[0], *output[1:], context) for before, output in zip(outputs, outputs[1:])]
