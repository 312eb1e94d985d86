"""vLLM's worker inside its engine process on a CPU, as OpenRLHF asks for engines of one rank ("uni") and gets them on a GPU.

vLLM's CPU platform gives the worker a process of its own (`platforms/cpu.py`), to set its OpenMP threads by the environment. That process
imports torch and vLLM a second time at every start, takes two messages per engine step, and lets the engine process poll for the answers.
Here the threads are set by call: as many as vLLM would give the worker, on any of the engine's cores.
"""

from __future__ import annotations

import os

import torch
from vllm import envs
from vllm.utils.ompmultiprocessing import OMPProcessManager
from vllm.v1.executor.uniproc_executor import UniProcExecutor


class InProcessExecutor(UniProcExecutor):
    def _init_executor(self) -> None:
        """Raises ValueError for more ranks than one."""
        if self.parallel_config.world_size != 1:
            raise ValueError("openrlhf_sd: give engine_args the tensor_parallel_size that the engine gets")
        if envs.VLLM_ENABLE_V1_MULTIPROCESSING:  # else this is a user's own process, and its threads are theirs
            self._keep_to_cores(OMPProcessManager(self.vllm_config))
        super()._init_executor()

    def _keep_to_cores(self, binding: OMPProcessManager) -> None:
        """`binding` has read VLLM_CPU_OMP_THREADS_BIND and VLLM_CPU_NUM_OF_RESERVED_CPU."""
        if binding.skip_setup or not binding.cpu_lists[0]:
            return
        # By default one NUMA node's, one logical core of each physical. All of them are open to every thread, where vLLM ties each to its
        # own: two engines then share a machine's cores, instead of the first of them.
        os.sched_setaffinity(0, [*binding.cpu_lists[0], *binding.reserved_cpu_list])
        torch.set_num_threads(len(binding.cpu_lists[0]))
