"""vLLM keeps compiled models on disk under a hash of their configuration, which leaves the quantization of ours out (it is no part of the
model's own). Policy and drafter are the same class with the same sizes: one loading the other's graph would crash or be silently wrong."""

from __future__ import annotations

from pathlib import Path

from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs

from openrlhf_sd import SelfSpecConfig, engine_args
from openrlhf_sd.engine.proposer import SelfDraftProposer


def tiny_policy(folder: Path) -> Path:
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    Qwen2ForCausalLM(Qwen2Config(vocab_size=64, **sizes)).to(torch.bfloat16).save_pretrained(folder)
    return folder


def configs(policy: Path, quant: str) -> tuple[VllmConfig, VllmConfig]:
    arguments = engine_args(SelfSpecConfig(mode="fixed", gamma=3, quant=quant), policy)
    config = EngineArgs(str(policy), skip_tokenizer_init=True, dtype="bfloat16", max_model_len=64, **arguments).create_engine_config()
    proposer = SelfDraftProposer.__new__(SelfDraftProposer)  # without the buffers that its __init__ allocates
    proposer.vllm_config, proposer.speculative_config = config, config.speculative_config
    proposer._quant, proposer._group_size = quant, config.additional_config["self_spec"]["group_size"]
    return config, proposer._create_draft_vllm_config()


def test_no_two_of_policy_and_drafters_share_a_compiled_graph(tmp_path):
    policy = tiny_policy(tmp_path)
    hashes = [config.compute_hash() for quant in ("none", "w4", "w8a8") for config in configs(policy, quant)]
    assert len(set(hashes)) == 6
