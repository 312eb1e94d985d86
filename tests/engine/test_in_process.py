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
    with self_spec_engine(untied_policy, SelfSpecConfig(mode="fixed", gamma=1)) as llm:
        found_threads, found_cores = call(llm, threads_and_cores)
        assert set(found_cores) <= set(cores)
        # vLLM leaves a core to others where there are two.
        assert found_threads == (1 if is_bound else max(1, len(found_cores) - 1))
        children = psutil.Process().children(recursive=True)
        assert not any(process.name().startswith("VLLM::Worker") for process in children)
