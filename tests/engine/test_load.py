"""10,000 requests of mixed lengths, 512 at a time, through one engine whose gamma changes at every step, in a KV cache that is too small
for them."""

from __future__ import annotations

import gc
import time
from types import SimpleNamespace

import psutil
import pytest
import random_gamma
import torch
from engines import call, generate, greedy, self_spec_engine, spec_decode_counts
from greedy_reference import excused_divergences
from trainer import Trainer
from transformers import AutoModelForCausalLM

from openrlhf_sd import SelfSpecConfig

pytestmark = pytest.mark.slow

NUM_REQUESTS = 10_000
WARM_UP = 2_500
"""Requests before these: allocators settle, 840 MiB after as many, then 886, 897, 905, 909, 912, 915 and 916 after as many again each."""
NUM_AT_ONCE = 512
LAST_STEP_BYTES = 64 << 10
"""The runner keeps the drafts of its last step, which had one request or many. Parameters are not seen (`garbage.py`)."""

LENGTHS = [1 + (37 * number) % 97 for number in range(WARM_UP + NUM_REQUESTS)]

PROMPTS = [{"prompt_token_ids": [4 + (31 * row + 7 * column) % 19 for column in range(4 + 7 * (row % 17))]} for row in range(NUM_AT_ONCE)]
"""Of 4 to 116 tokens: most responses go on in a second block of 128."""

KV_CACHE_BYTES = 64 << 20
"""512 blocks."""


def live_tensor_bytes(worker) -> int:
    """Bytes of all tensors that Python can still reach in the worker."""
    gc.collect()
    return sum(thing.numel() * thing.element_size() for thing in gc.get_objects() if isinstance(thing, torch.Tensor))


def resident_bytes(name: str) -> int:
    """RAM that the newest engine's process of that name holds; engines that tests share may run beside it."""
    processes = [process for process in psutil.Process().children(recursive=True) if process.name().startswith(name)]
    return max(processes, key=psutil.Process.create_time).memory_info().rss


def test_ten_thousand_requests(measured, warm_policy):
    """Five rollouts, a weight sync after each. Memory is looked at after the syncs, where the trainer has its turn."""
    prompts = [PROMPTS[number % NUM_AT_ONCE] for number in range(len(LENGTHS))]
    config = SelfSpecConfig(mode="fixed", gamma=5, quant="w8a8")
    sizes = {"max_num_seqs": NUM_AT_ONCE, "kv_cache_memory_bytes": KV_CACHE_BYTES}
    trainer_model = AutoModelForCausalLM.from_pretrained(warm_policy, dtype=torch.bfloat16)
    with self_spec_engine(warm_policy, config, scheduler_cls=random_gamma.QUALNAME, **sizes) as llm:
        core = llm.llm_engine.engine_core
        trainer = Trainer(llm)
        num_blocks = core.call_utility("test_num_free_blocks")
        started = time.monotonic()
        outputs, tensors, engine = [], [], []
        for part in (slice(first, first + WARM_UP) for first in range(0, len(LENGTHS), WARM_UP)):
            outputs += generate(llm, prompts[part], [greedy(length) for length in LENGTHS[part]])
            trainer.broadcast(trainer_model)
            engine.append(resident_bytes("VLLM::EngineCor"))
            tensors.append(call(llm, live_tensor_bytes))  # last: it makes a list of everything
        seconds = time.monotonic() - started
        assert list(map(len, outputs)) == LENGTHS
        num_preemptions = sum(metric.value for metric in llm.get_metrics() if metric.name == "vllm:num_preemptions")
        drafts = spec_decode_counts(llm)
        assert num_preemptions > 0 and drafts["num_drafts"] > NUM_REQUESTS
        # The same prompt, however long its response and whatever ran beside it, begins with the same tokens: nothing was mixed up.
        whole = [output.outputs[0] for output in llm.generate(PROMPTS, greedy(max(LENGTHS), logprobs=2), use_tqdm=False)]
        num_other = 0
        for number, output in enumerate(outputs):
            same = whole[number % NUM_AT_ONCE]
            begins = SimpleNamespace(token_ids=same.token_ids[: len(output)], logprobs=same.logprobs)
            num_other += excused_divergences(begins, output)
        assert core.call_utility("test_num_free_blocks") == num_blocks
        assert tensors[4] < 1.02 * tensors[2] + LAST_STEP_BYTES
        assert engine[4] < 1.02 * engine[2]
    sizes = {"live tensors": tensors, "engine process": engine}
    shown = ", ".join(f"{name} {values[2] / 2**20:.1f} -> {values[4] / 2**20:.1f}" for name, values in sizes.items())
    measured(
        f"load: {len(LENGTHS)} requests, {sum(LENGTHS)} tokens in {seconds:.0f} s, {drafts['num_drafts']} drafts, {num_preemptions} "
        f"preemptions, {num_other} responses with another near tie; from half time to the end, MiB: {shown}"
    )
