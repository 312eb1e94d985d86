"""vLLM's CPU worker as every engine of a training and of a measurement has it, the vanilla ones too."""

from __future__ import annotations

from vllm.distributed.device_communicators.shm_broadcast import SpinCondition
from vllm.v1.worker.cpu_worker import CPUWorker

from openrlhf_sd.cpu import bf16_products, float32_linears

BUSY_WAIT_S = 0.02
"""Longer than the pauses between the steps of a rollout, or between two parameters of a broadcast."""

LINEARS_ARG = "openrlhf_sd_linears"
"""Key in `additional_config`, which vLLM's digest of a compiled graph holds: one made without our linears is not this engine's, nor one
made with them another's."""


class PlainCpuWorker(CPUWorker):
    def init_device(self) -> None:
        bf16_products.install()
        if float32_linears.are_needed():
            float32_linears.install()
            self.vllm_config.additional_config[LINEARS_ARG] = "float32"
        _sleep_soon_when_idle()
        super().init_device()


def _sleep_soon_when_idle() -> None:
    """A worker in a process of its own polls for its next call for a second before it sleeps: on a core the trainer, next in turn, is
    waiting for, or another engine that takes turns with it in a measurement.

    Set on the class, over the value each instance keeps: vLLM makes the worker's queue, with a value of its own, later.
    """
    SpinCondition.busy_loop_s = property(lambda self: BUSY_WAIT_S, lambda self, value: None)
