"""The engine claims of tests/engine on a CUDA machine: the same classes on vLLM's GPU worker, with and without CUDA graphs.

Not yet run: no machine with vLLM's CUDA build was at hand.
"""

from __future__ import annotations

import os

import pytest
from engines import AcceptanceSince, generate, greedy, plain_engine, sampled, self_spec_engine, token_prompts

from openrlhf_sd import SelfSpecConfig

os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"

BF16_GAP = 0.05
EAGER = pytest.mark.parametrize("enforce_eager", [True, False], ids=["eager", "graphs"])


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
        acceptance = AcceptanceSince(llm)
        generate(llm, token_prompts(32, 512), sampled(100))
        # GEMMs pick other kernels for other batch shapes, so equal weights give nearly equal logits.
        assert acceptance.rate() > 0.98


@EAGER
@pytest.mark.parametrize("quant", ["w4", "w8a8"])
def test_greedy_is_plain_vllm_while_gamma_changes(measured, policy, quant, enforce_eager):
    import random_gamma

    prompts = token_prompts(64, 512)
    with plain_engine(policy, enforce_eager=enforce_eager) as llm:
        reference = llm.generate(prompts, greedy(96, logprobs=2), use_tqdm=False)
    config = SelfSpecConfig(mode="fixed", gamma=7, quant=quant)
    with self_spec_engine(policy, config, enforce_eager=enforce_eager, scheduler_cls=random_gamma.QUALNAME) as llm:
        outputs = generate(llm, prompts, greedy(96))
    num_excused = 0
    for want, got in zip((output.outputs[0] for output in reference), outputs, strict=True):
        for position, (expected, token) in enumerate(zip(want.token_ids, got, strict=True)):
            if expected != token:
                best, second = sorted((entry.logprob for entry in want.logprobs[position].values()), reverse=True)[:2]
                assert best - second < BF16_GAP
                num_excused += 1
                break
    measured(f"{quant}: {num_excused} of 64 prompts diverge, each at a near tie")


@EAGER
@pytest.mark.parametrize("quant", ["w4", "w8a8"])
def test_drafter_follows_a_weight_sync_over_cuda_ipc(policy, quant, enforce_eager):
    """The transport of `--train.colocate_all`: handles to tensors of this process, the end mark with the last one."""
    import torch
    from openrlhf.trainer.ray.utils import get_physical_gpu_id
    from torch.multiprocessing.reductions import reduce_tensor
    from trainer import logprob_errors, perturb
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(policy, dtype=torch.bfloat16).cuda()
    config = SelfSpecConfig(mode="fixed", gamma=3, quant=quant)
    with self_spec_engine(policy, config, enforce_eager=enforce_eager, gpu_memory_utilization=0.3) as llm:
        for sync in (1, 2):
            perturb(model.cpu(), scale=0.3, seed=sync)
            model.cuda()
            parameters = list(model.named_parameters())
            for position, (name, parameter) in enumerate(parameters, start=1):
                weight = parameter.data.clone()
                handles = {get_physical_gpu_id(): reduce_tensor(weight)}
                is_last = position == len(parameters)
                llm.collective_rpc("update_weight_cuda_ipc", args=(name, weight.dtype, weight.shape, handles, is_last))
            acceptance = AcceptanceSince(llm)
            outputs = llm.generate(token_prompts(24, 512), sampled(32, logprobs=0), use_tqdm=False)
            assert logprob_errors(model.cpu(), outputs).mean() < 0.02
            assert acceptance.rate() > 0.5
