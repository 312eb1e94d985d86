"""OpenRLHF's weight-sync RPCs, plus the end mark: OpenRLHF passes `empty_cache=True` with the last parameter of a broadcast and its own
worker ignores it. That is where the drafter becomes whole again."""

from __future__ import annotations

from vllm.platforms import current_platform

if current_platform.is_cpu():
    from openrlhf_sd.cpu.weight_sync import CpuWorkerWrap as _WorkerWrap
else:
    from openrlhf.trainer.ray.vllm_worker_wrap import WorkerWrap as _WorkerWrap


class SelfSpecWorkerWrap(_WorkerWrap):
    """A vLLM `worker_extension_cls`; vLLM adds it to `SelfSpecWorker`, whose methods it may call."""

    def update_weight(self, name, dtype, shape, empty_cache=False) -> None:
        super().update_weight(name, dtype, shape, empty_cache)
        if empty_cache:
            self.self_spec_finish_sync()

    def update_weight_cuda_ipc(self, name, dtype, shape, ipc_handles=None, empty_cache=False) -> None:
        super().update_weight_cuda_ipc(name, dtype, shape, ipc_handles, empty_cache)
        if empty_cache:
            self.self_spec_finish_sync()
