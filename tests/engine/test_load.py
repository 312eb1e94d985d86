"""10,000 requests of mixed lengths, 512 at a time, through one engine whose gamma changes at every step."""

from __future__ import annotations

import threading
import time

import psutil
import pytest
import random_gamma
from engines import generate, greedy, self_spec_engine, token_prompts

from openrlhf_sd import SelfSpecConfig

pytestmark = pytest.mark.slow

NUM_REQUESTS = 10_000
NUM_AT_ONCE = 512
LENGTHS = [1 + (37 * number) % 97 for number in range(NUM_REQUESTS)]


class ResidentMemory(threading.Thread):
    """Bytes of RAM that the engine's processes hold, once a second."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.samples: list[int] = []
        self.stopped = threading.Event()

    def run(self) -> None:
        processes = [process for process in psutil.Process().children(recursive=True) if "VLLM" in process.name()]
        while not self.stopped.wait(1.0):
            self.samples.append(sum(process.memory_info().rss for process in processes))


def test_ten_thousand_requests(measured, warm_policy):
    prompts = [token_prompts(NUM_AT_ONCE, 23)[number % NUM_AT_ONCE] for number in range(NUM_REQUESTS)]
    config = SelfSpecConfig(mode="fixed", gamma=5, quant="w8a8")
    sizes = {"max_num_seqs": NUM_AT_ONCE, "kv_cache_memory_bytes": 512 << 20}
    with self_spec_engine(warm_policy, config, scheduler_cls=random_gamma.QUALNAME, **sizes) as llm:
        core = llm.llm_engine.engine_core
        num_blocks = core.call_utility("test_num_free_blocks")
        memory = ResidentMemory()
        memory.start()
        started = time.monotonic()
        outputs = generate(llm, prompts, [greedy(length) for length in LENGTHS])
        seconds = time.monotonic() - started
        memory.stopped.set()
        assert list(map(len, outputs)) == LENGTHS
        # The same prompt, however long its response and whatever ran beside it, begins with the same tokens: nothing was mixed up.
        longest = {prompt: max(outputs[prompt::NUM_AT_ONCE], key=len) for prompt in range(NUM_AT_ONCE)}
        num_other = sum(output != longest[number % NUM_AT_ONCE][: len(output)] for number, output in enumerate(outputs))
        assert num_other <= NUM_REQUESTS // 1000, "more than near ties of bf16 explain (tests/engine/test_greedy.py met none in 64)"
        assert core.call_utility("test_num_free_blocks") == num_blocks
        half, end = memory.samples[len(memory.samples) // 2], memory.samples[-1]
        assert end < 1.02 * half
    measured(
        f"load: {NUM_REQUESTS} requests, {sum(LENGTHS)} tokens in {seconds:.0f} s, {num_other} responses with another near tie, memory of the "
        f"engine {half / 2**20:.0f} MiB at half time, {end / 2**20:.0f} MiB at the end"
    )
