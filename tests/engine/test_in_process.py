"""On a CPU the worker lives in its engine's process (cpu/in_process_executor.py): where its threads run then."""

from __future__ import annotations

import os

import psutil
import pytest
import torch
from engines import call, self_spec_engine

from openrlhf_sd import SelfSpecConfig

pytestmark = [
    pytest.mark.whole_machine,
    pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU that is vLLM's own way"),
]


def threads_and_cores(worker) -> tuple[int, list[int]]:
    return torch.get_num_threads(), sorted(os.sched_getaffinity(0))


@pytest.mark.parametrize("is_bound", [False, True])
def test_cores_of_the_worker(is_bound, untied_policy, monkeypatch):
    cores = sorted(os.sched_getaffinity(0))
    if is_bound:
        cores = cores[-1:]
        monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", str(cores[0]))
    num_threads = min(len(cores), psutil.cpu_count(logical=False))
    with self_spec_engine(untied_policy, SelfSpecConfig(mode="fixed", gamma=1)) as llm:
        found_threads, found_cores = call(llm, threads_and_cores)
        assert found_threads == len(found_cores) == num_threads
        assert set(found_cores) <= set(cores)
        children = psutil.Process().children(recursive=True)
        assert not any(process.name().startswith("VLLM::Worker") for process in children)
