"""The engine claims of tests/engine on a CUDA machine: the same classes on vLLM's GPU worker, with and without CUDA graphs.

Not yet run: no machine with vLLM's CUDA build was at hand.
"""

from __future__ import annotations

import os

import pytest
from engines import DraftsSince, call, generate, greedy, plain_engine, sampled, self_spec_engine, token_prompts
from greedy_reference import LAST_PROMPTS, NUM_LAST_TOKENS, excused_divergences
from vllm.platforms import current_platform

from openrlhf_sd import SelfSpecConfig

os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"

EAGER = pytest.mark.parametrize("enforce_eager", [True, False], ids=["eager", "graphs"])
IS_BLACKWELL = (current_platform.get_device_capability() or (0, 0))[0] >= 10
NO_INT8 = pytest.mark.skipif(IS_BLACKWELL, reason="vLLM has no int8 kernel for this GPU")
QUANT = pytest.mark.parametrize("quant", ["w4", pytest.param("w8a8", marks=NO_INT8)])


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    from models import build_random_policy

    return build_random_policy(tmp_path_factory.mktemp("policy"), tied=False)


@EAGER
def test_identical_drafter_is_accepted_with_the_kv_cache_of_plain_vllm(policy, enforce_eager):
    with plain_engine(policy, enforce_eager=enforce_eager) as llm:
        plain_blocks = llm.llm_engine.vllm_config.cache_config.num_gpu_blocks
    with self_spec_engine(policy, SelfSpecConfig(mode="fixed", gamma=4, quant="none"), enforce_eager=enforce_eager) as llm:
        assert llm.llm_engine.vllm_config.cache_config.num_gpu_blocks == plain_blocks
        drafts = DraftsSince(llm)
        generate(llm, token_prompts(32, 512), sampled(100))
        # GEMMs pick other kernels for other batch shapes, so equal weights give nearly equal logits.
        assert drafts.acceptance_rate() > 0.98


@EAGER
@QUANT
def test_greedy_is_plain_vllm_while_gamma_changes(measured, policy, quant, enforce_eager):
    import random_gamma

    prompts = token_prompts(64, 512)
    with plain_engine(policy, enforce_eager=enforce_eager) as llm:
        reference = llm.generate(prompts, greedy(96, logprobs=2), use_tqdm=False)
    config = SelfSpecConfig(mode="fixed", gamma=7, quant=quant)
    with self_spec_engine(policy, config, enforce_eager=enforce_eager, scheduler_cls=random_gamma.QUALNAME) as llm:
        drafts = DraftsSince(llm)
        outputs = generate(llm, prompts, greedy(96))
        assert drafts.counts()["num_drafts"] > 0
    divergences = sum(excused_divergences(want.outputs[0], got) for want, got in zip(reference, outputs, strict=True))
    measured(f"{quant}: {divergences} of 64 prompts diverge, each at a near tie")


@EAGER
def test_greedy_up_to_the_end_of_the_context_and_again_from_the_prefix_cache(policy, enforce_eager):
    """Drafts beyond max_model_len are written nowhere, least of all over the prompt's first keys and values."""
    until_the_end = NUM_LAST_TOKENS + 24
    with plain_engine(policy, enforce_eager=enforce_eager) as llm:
        reference = llm.generate(LAST_PROMPTS, greedy(until_the_end, logprobs=2), use_tqdm=False)
    with self_spec_engine(policy, SelfSpecConfig(mode="fixed", gamma=7, quant="w4"), enforce_eager=enforce_eager) as llm:
        drafts = DraftsSince(llm)
        for _ in ("computed", "from the prefix cache"):
            for want, got in zip(reference, generate(llm, LAST_PROMPTS, greedy(until_the_end)), strict=True):
                assert len(got) == NUM_LAST_TOKENS
                excused_divergences(want.outputs[0], got)
        assert drafts.counts()["num_drafts"] > 0


class IpcTrainer:
    """The transport of `--train.colocate_all`: handles to tensors of this process, the end mark with the last one."""

    def __init__(self, policy) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(policy, dtype=torch.bfloat16)

    def sync(self, llm, seed: int) -> None:
        """Change every parameter and send it."""
        from openrlhf.trainer.ray.utils import get_physical_gpu_id
        from torch.multiprocessing.reductions import reduce_tensor
        from trainer import perturb

        perturb(self.model, scale=0.3, seed=seed)
        parameters = list(self.model.named_parameters())
        for position, (name, parameter) in enumerate(parameters, start=1):
            weight = parameter.data.cuda()
            handles = {get_physical_gpu_id(): reduce_tensor(weight)}
            is_last = position == len(parameters)
            llm.collective_rpc("update_weight_cuda_ipc", args=(name, weight.dtype, weight.shape, handles, is_last))

    def assert_followed(self, llm) -> None:
        """By policy (logprobs are this model's) and drafter (accepted)."""
        from trainer import logprob_errors

        drafts = DraftsSince(llm)
        outputs = llm.generate(token_prompts(24, 512), sampled(32, logprobs=0), use_tqdm=False)
        assert logprob_errors(self.model, outputs).mean() < 0.02
        assert drafts.acceptance_rate() > 0.5


def addresses(worker) -> dict[str, int]:
    runner = worker.model_runner
    models = {"policy": runner.get_model(), "drafter": runner.drafter.model}
    return {f"{role} {name}": parameter.data_ptr() for role, model in models.items() for name, parameter in model.named_parameters()}


@EAGER
@QUANT
def test_drafter_follows_a_weight_sync_over_cuda_ipc(policy, quant, enforce_eager):
    trainer = IpcTrainer(policy)
    config = SelfSpecConfig(mode="fixed", gamma=3, quant=quant)
    with self_spec_engine(policy, config, enforce_eager=enforce_eager, gpu_memory_utilization=0.3) as llm:
        before = call(llm, addresses)
        for seed in (1, 2):
            trainer.sync(llm, seed)
            # CUDA graphs hold these.
            assert call(llm, addresses) == before
            trainer.assert_followed(llm)


def test_a_captured_drafter_computes_what_an_eager_one_does(measured, policy):
    """The check after each sync (`drafter_probe.py`) runs outside of the graphs and cannot see what they hold. Drafts of the same weights
    must be accepted as often with them as without. The biases are large here, because those are what Marlin moves at every sync."""
    import torch

    rates = {}
    for mode, enforce_eager in (("eager", True), ("graphs", False)):
        trainer = IpcTrainer(policy)
        with torch.no_grad():
            for name, parameter in trainer.model.named_parameters():
                if name.endswith("bias"):
                    parameter.mul_(20)
        config = SelfSpecConfig(mode="fixed", gamma=3, quant="w4")
        with self_spec_engine(policy, config, enforce_eager=enforce_eager, gpu_memory_utilization=0.3) as llm:
            for seed in (1, 2, 3):
                trainer.sync(llm, seed)
            drafts = DraftsSince(llm)
            generate(llm, token_prompts(64, 512), sampled(96))
            rates[mode] = drafts.acceptance_rate()
    measured(f"w4 after three syncs, acceptance: {rates}")
    assert abs(rates["eager"] - rates["graphs"]) < 0.03


@pytest.mark.parametrize("level", [1, 2])
def test_drafter_follows_a_weight_sync_between_sleep_and_wake_up(policy, level):
    """OpenRLHF with --vllm.enable_sleep, level 1: asleep right after the start, weights awake for the sync, then the KV cache."""
    trainer = IpcTrainer(policy)
    config = SelfSpecConfig(mode="fixed", gamma=3, quant="w4")
    with self_spec_engine(policy, config, enforce_eager=False, gpu_memory_utilization=0.3, enable_sleep_mode=True) as llm:
        for seed in (1, 2):
            llm.sleep(level=level)
            llm.wake_up(tags=["weights"])
            trainer.sync(llm, seed)
            llm.wake_up(tags=["kv_cache"])
            trainer.assert_followed(llm)


def test_a_full_batch_of_the_longest_drafts_fits_beside_the_kv_cache(tmp_path):
    """vLLM's start-up profile drafts one token per request; OpenRLHF's defaults then give 95% of the memory away, mostly to the KV cache.
    Its 128 requests with 7 drafts each and the vocabulary of Qwen2.5 take several fp32 tensors of 0.6 GB in one step."""
    from models import build_random_policy

    vocab_size = 151936
    policy = build_random_policy(tmp_path / "policy", tied=False, vocab_size=vocab_size)
    config = SelfSpecConfig(mode="fixed", gamma=7, quant="w4")
    sizes = {"kv_cache_memory_bytes": None, "gpu_memory_utilization": 0.95, "max_num_seqs": 128}
    more = {"logprobs_mode": "processed_logprobs", "max_logprobs": 1}
    with self_spec_engine(policy, config, enforce_eager=False, **sizes, **more) as llm:
        outputs = generate(llm, token_prompts(128, vocab_size), sampled(64, top_p=0.99, logprobs=1))
    assert [len(tokens) for tokens in outputs] == 128 * [64]
