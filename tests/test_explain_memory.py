"""Memory plans against numbers worked out by hand."""

import importlib.util
import re
from pathlib import Path

import pytest
from explained_models import LLAMA_8B, QWEN_7B, QWEN_14B

from openrlhf_sd.config import SelfSpecConfig, SelfSpecError
from openrlhf_sd.explain_memory import check_memory, plan_memory
from openrlhf_sd.gpus import GPUS
from openrlhf_sd.policy.model_constants import model_constants
from openrlhf_sd.preflight import VLLM_MAX_NUM_SEQS

A100 = GPUS["a100-80gb"]
W4 = SelfSpecConfig(mode="fixed", gamma=7, quant="w4", group_size=128)

PAPER_FLAGS = {
    "vllm.gpu_memory_utilization": 0.6,
    "vllm.num_engines": 8,
    "data.max_len": 9216,
    "rollout.batch_size": 128,
    "rollout.vllm_generate_batch_size": None,
    "rollout.n_samples_per_prompt": 8,
}
"""The paper's: 128 prompts x 8 samples over 8 engines, 1024 + 8192 tokens."""


def plan(model_config, config=W4, gpu=A100, ranks=1, free_bytes=None, **flags):
    return plan_memory(model_constants(model_config, ranks), config, PAPER_FLAGS | flags, gpu, free_bytes)


def test_qwen_7b_by_hand():
    found = plan(QWEN_7B)
    assert found.budget_bytes == 48_000_000_000  # 0.6 x 80e9
    # 6,525,288,448 in the linears, 544,997,376 each in embedding and head: 7.6153e9 parameters of 2 bytes
    assert found.policy_bytes == 15_230_566_400
    # 6,525,288,448 weights of 4 bits and a scale of 16 bits per 128: 4.125 bits
    assert found.drafter_bytes == 3_364_601_856
    # 2 x 28 layers x 4 heads x 128 x 2 bytes
    assert found.kv_bytes_per_token == 57_344
    assert found.kv_bytes == 48_000_000_000 - 15_230_566_400 - 3_364_601_856 == 29_404_831_744
    assert found.kv_tokens == 512_779  # 29,404,831,744 / 57,344 = 512,779.6
    assert found.kv_tokens_without_drafter == 571_453  # 32,769,433,600 / 57,344 = 571,453.6
    assert found.longest_requests_held == 55  # 512,779 / 9,216 = 55.6
    assert (found.requests_per_engine, found.requests_at_once) == (128, 128)
    # 128 requests x 7 drafts x 152,064 words x 4 bytes
    assert found.draft_probabilities_bytes == 544_997_376


def test_qwen_14b_by_hand():
    found = plan(QWEN_14B, **{"vllm.gpu_memory_utilization": 0.7})
    # per layer 5120 x (7168 + 5120 + 27648) + 13824 x 5120 = 275,251,200; 48 layers: 13,212,057,600; head 778,567,680
    assert found.policy_bytes == 2 * (13_212_057_600 + 2 * 778_567_680) == 29_538_385_920
    assert found.drafter_bytes == 6_812_467_200
    assert found.kv_bytes_per_token == 196_608  # 2 x 48 x 8 x 128 x 2
    assert found.kv_tokens == 99_940  # (56e9 - 29,538,385,920 - 6,812,467,200) / 196,608 = 99,940.7


def test_llama_8b_by_hand():
    found = plan(LLAMA_8B)
    # per layer 4096 x (6144 + 4096 + 28672) + 14336 x 4096 = 218,103,808; 32 layers: 6,979,321,856; head 525,336,576
    assert found.policy_bytes == 2 * (6_979_321_856 + 2 * 525_336_576) == 16_059_990_016
    assert found.drafter_bytes == 3_598_712_832
    assert found.kv_bytes_per_token == 131_072
    assert found.kv_tokens == 216_226  # (48e9 - 16,059,990,016 - 3,598,712,832) / 131,072 = 216,226.9


@pytest.mark.parametrize(
    ("quant", "group_size", "num_bytes"),
    [
        ("w4", 64, 3_466_559_488),  # 4.25 bits
        ("w8a8", None, 6_530_850_816),  # a byte each, and 28 x 49,664 float32 scales
        ("none", None, 13_050_576_896),  # bf16
    ],
)
def test_drafter_bytes_by_scheme(quant, group_size, num_bytes):
    found = plan(QWEN_7B, SelfSpecConfig(mode="fixed", quant=quant, group_size=group_size))
    assert found.drafter_bytes == num_bytes


def test_ranks_share_weights_and_keys():
    found = plan(QWEN_7B, ranks=2)
    assert (found.policy_bytes, found.drafter_bytes) == (7_615_283_200, 1_682_300_928)
    assert found.kv_bytes_per_token == 28_672


def test_a_vanilla_run_has_no_drafter():
    found = plan(QWEN_7B, config=None)
    assert (found.drafter_bytes, found.draft_probabilities_bytes) == (0, 0)
    assert found.kv_tokens == found.kv_tokens_without_drafter == 571_453


def test_the_busiest_engine_gets_whole_prompts():
    # 10 prompts over 8 engines: some get 2, with 8 samples each
    assert plan(QWEN_7B, **{"rollout.batch_size": 10}).requests_per_engine == 16
    assert plan(QWEN_7B, **{"rollout.vllm_generate_batch_size": 256}).requests_per_engine == 256


def test_vllm_runs_no_more_requests_at_once_than_its_default():
    assert plan(QWEN_7B, **{"rollout.n_samples_per_prompt": 32}).requests_at_once == 128
    [package] = importlib.util.find_spec("vllm").submodule_search_locations
    source = (Path(package) / "config" / "scheduler.py").read_text()
    assert re.search(r"DEFAULT_MAX_NUM_SEQS: ClassVar\[int\] = (\d+)", source).group(1) == str(VLLM_MAX_NUM_SEQS)


def test_a_cpu_engine_plans_with_a_share_of_free_memory():
    found = plan(QWEN_7B, SelfSpecConfig(quant="w8a8"), gpu=None, free_bytes=8_000_000_000)
    # a quarter of 0.6 x 8e9, see cpu/engine_kwargs.py
    assert found.kv_bytes == 1_200_000_000
    assert found.kv_tokens == found.kv_tokens_without_drafter == 20_926
    assert found.budget_bytes is None


@pytest.mark.parametrize(
    "flags",
    [
        {"vllm.gpu_memory_utilization": 0.2},  # 16e9 bytes, less than the weights
        {"vllm.gpu_memory_utilization": 0.238},  # 19.04e9 bytes: 444,831,744 beside the weights, 7757 tokens
    ],
)
def test_less_cache_than_one_request_is_hopeless(flags):
    with pytest.raises(SelfSpecError, match=r"^--vllm.gpu_memory_utilization: .* give more, more GPUs .*--vllm.tensor_parallel_size"):
        check_memory(plan(QWEN_7B, **flags))


def test_one_request_is_enough_to_start():
    found = plan(QWEN_7B, **{"vllm.gpu_memory_utilization": 0.24})  # 604,831,744 bytes beside the weights: 10,547 tokens
    check_memory(found)
    assert (found.kv_tokens, found.longest_requests_held) == (10_547, 1)
