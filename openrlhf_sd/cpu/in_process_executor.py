"""vLLM's worker inside its engine process on a CPU, as OpenRLHF asks for engines of one rank ("uni") and gets them on a GPU.

vLLM's CPU platform gives the worker a process of its own (`platforms/cpu.py`), to set its OpenMP threads by the environment. That process
imports torch and vLLM a second time at every start, takes two messages per engine step, and leaves a core to the engine process, which
polls for the answers. Here the threads are set by call, on all the cores of the engine.
"""

from __future__ import annotations

import os

import torch
from vllm.utils.ompmultiprocessing import OMPProcessManager
from vllm.v1.executor.uniproc_executor import UniProcExecutor


class InProcessExecutor(UniProcExecutor):
    def _init_executor(self) -> None:
        binding = OMPProcessManager(self.vllm_config)  # reads VLLM_CPU_OMP_THREADS_BIND
        if not binding.skip_setup:
            # One NUMA node's, one logical core of each physical; reserved is what vLLM would have kept for this process beside the worker.
            cores = [*binding.cpu_lists[0], *binding.reserved_cpu_list]
            os.sched_setaffinity(0, cores)  # of this thread, and of those that OpenMP starts from it
            torch.set_num_threads(len(cores))
        super()._init_executor()
