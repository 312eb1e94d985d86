"""Workers that leave one upstream fault in place, to show that each repair is needed and tested."""

from __future__ import annotations

from vllm.model_executor.kernels.linear.scaled_mm.cpu import CPUInt8ScaledMMLinearKernel
from vllm.v1.sample import rejection_sampler

from openrlhf_sd.engine import cpu_repairs
from openrlhf_sd.engine.worker import SelfSpecWorker

_upstream_expand = rejection_sampler.expand_batch_to_tokens


class WithoutExpandRepair(SelfSpecWorker):
    def init_device(self) -> None:
        super().init_device()
        rejection_sampler.expand_batch_to_tokens = _upstream_expand


class WithoutScaleRepair(SelfSpecWorker):
    def init_device(self) -> None:
        super().init_device()
        CPUInt8ScaledMMLinearKernel.process_weights_for_onednn = cpu_repairs._process_weights_for_onednn
