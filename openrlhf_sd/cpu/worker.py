"""vLLM's CPU worker as every engine of a training and of a measurement has it, the vanilla ones too."""

from __future__ import annotations

from vllm.distributed.device_communicators.shm_broadcast import SpinCondition
from vllm.v1.worker.cpu_worker import CPUWorker

from openrlhf_sd.cpu import bf16_products, float32_linears

BUSY_WAIT_S = 0.02
"""Longer than the pauses between the steps of a rollout, or between two parameters of a broadcast."""


class PlainCpuWorker(CPUWorker):
    def init_device(self) -> None:
        bf16_products.install()
        float32_linears.install()
        _sleep_soon_when_idle()
        super().init_device()


def _sleep_soon_when_idle() -> None:
    """A worker in a process of its own polls for its next call for a second before it sleeps: on a core the trainer, next in turn, is
    waiting for, or another engine that takes turns with it in a measurement.

    Set on the class, over the value each instance keeps: the worker's queue exists already and is out of reach from
    here.
    """
    SpinCondition.busy_loop_s = property(lambda self: BUSY_WAIT_S, lambda self, value: None)
