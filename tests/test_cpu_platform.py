"""The CPU platform under unmodified OpenRLHF and vLLM: what an engine computes with after weight syncs, sizes, patches."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the CPU platform is inactive where CUDA is present")

VOCAB_SIZE = 512
PROMPTS = [[2 + (7 * i + j * j) % 500 for j in range(40)] for i in range(8)]


def build_policy(folder: Path, tied: bool):
    """Save a random 0.2M-parameter Qwen2 with a byte-level tokenizer, and return it.

    Untied, its head equals the embeddings at the start: vLLM must not take that for tying, for training moves them
    apart.
    """
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

    vocab = {token: index for index, token in enumerate(["<pad>", "<eos>", *sorted(ByteLevel.alphabet())])}
    # AutoTokenizer makes a Qwen2Tokenizer for a Qwen2 model whatever was saved, so save one.
    tokenizer = Qwen2Tokenizer(vocab=vocab, merges=[], unk_token="<pad>", eos_token="<eos>", pad_token="<pad>")
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=1024,
        tie_word_embeddings=tied,
        initializer_range=0.06,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )
    model = Qwen2ForCausalLM(config).to(torch.bfloat16)
    if not tied:
        model.lm_head.weight.data.copy_(model.model.embed_tokens.weight.data)
    model.save_pretrained(folder)
    return model


# ---- Weight sync into a plain vllm.LLM


@pytest.fixture
def start_engine(tmp_path, monkeypatch):
    """-> a function that builds a policy and starts a plain engine of it, and returns both."""
    monkeypatch.setenv("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")  # as OpenRLHF's actor sets it: dtypes travel by RPC
    import vllm

    from openrlhf_sd.cpu.engine_kwargs import CPU_WORKER_EXTENSION, PLAIN_WORKER

    engines = []

    def start(tied: bool, enforce_eager: bool):
        model = build_policy(tmp_path / "model", tied)
        llm = vllm.LLM(
            str(tmp_path / "model"),
            worker_cls=PLAIN_WORKER,
            worker_extension_cls=CPU_WORKER_EXTENSION,
            enforce_eager=enforce_eager,
            dtype="bfloat16",
            max_model_len=128,
            kv_cache_memory_bytes=1 << 26,
            logprobs_mode="processed_logprobs",
        )
        engines.append(llm)
        return model, llm

    yield start
    for llm in engines:
        llm.llm_engine.engine_core.shutdown()


@pytest.mark.parametrize(
    "tied, enforce_eager",
    [pytest.param(True, False, id="tied-compiled"), pytest.param(False, True, id="untied-eager", marks=pytest.mark.slow)],
)
def test_engine_computes_with_the_new_weights_after_two_broadcasts(start_engine, tied, enforce_eager):
    from trainer import Trainer, perturb  # imports vLLM

    from openrlhf_sd.cpu import float32_linears

    model, llm = start_engine(tied, enforce_eager)
    trainer = Trainer(llm)
    assert logprob_error(llm, model) < 0.02
    assert llm.collective_rpc(linears_in_float32) == [float32_linears.are_needed()]
    for seed in (1, 2):
        perturb(model, scale=0.5, seed=seed)
        assert logprob_error(llm, model) > 0.1  # the changes are large enough to see a stale weight
        trainer.broadcast(model)
        assert logprob_error(llm, model) < 0.02
    if tied:
        # The same broadcast without the repair of the tied head, to show that it is needed.
        perturb(model, scale=0.5, seed=3)
        *others, (last_name, last) = model.named_parameters()
        for name, parameter in others:
            trainer.send(name, parameter.data, is_last=False)
        llm.collective_rpc(forget_tied_heads)
        trainer.send(last_name, last.data, is_last=True)
        assert logprob_error(llm, model) > 0.1


def logprob_error(llm, model) -> float:
    """Mean |engine's logprob - Hugging Face's| over sampled tokens, under the arguments OpenRLHF samples with."""
    from trainer import logprob_errors
    from vllm import SamplingParams

    params = SamplingParams(temperature=1.0, max_tokens=20, min_tokens=1, logprobs=1, ignore_eos=True)
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in PROMPTS], params, use_tqdm=False)
    return logprob_errors(model, outputs).mean().item()


def linears_in_float32(worker) -> bool:
    from openrlhf_sd.cpu.float32_linears import Float32Linear

    model = worker.model_runner.get_model()
    products = [layer.cpu_linear for layer in model.modules() if hasattr(layer, "cpu_linear") and layer is not model.model.embed_tokens]
    assert len(products) == 4 * 2 + 1  # of two layers and the output head
    assert not isinstance(model.model.embed_tokens.cpu_linear, Float32Linear)  # memory for nothing
    [all_of_them] = {isinstance(product, Float32Linear) for product in products}
    return all_of_them


def forget_tied_heads(worker) -> None:
    worker._sync_tied_heads.clear()


# ---- Sizes


def test_engine_kwargs_are_sized_for_shared_memory_and_keep_other_extensions():
    from openrlhf_sd.cpu.engine_kwargs import (
        CPU_WORKER_EXTENSION,
        IN_PROCESS_EXECUTOR,
        PLAIN_WORKER,
        UPSTREAM_WORKER_EXTENSION,
        cpu_engine_kwargs,
    )

    upstream = {"worker_extension_cls": UPSTREAM_WORKER_EXTENSION, "gpu_memory_utilization": 0.5, "max_model_len": 896}
    upstream |= {"distributed_executor_backend": "uni"}
    adapted = cpu_engine_kwargs(upstream, available_bytes=16 << 30, kv_bytes_per_token=1024)
    assert adapted["worker_extension_cls"] == CPU_WORKER_EXTENSION
    assert adapted["distributed_executor_backend"] == IN_PROCESS_EXECUTOR
    assert adapted["worker_cls"] == PLAIN_WORKER
    # 128 requests x (896 + 128) tokens x 1024 bytes = 128 MiB, less than 16 GiB x 0.25 x 0.5
    assert adapted["kv_cache_memory_bytes"] == 128 << 20
    assert cpu_engine_kwargs(adapted, 1 << 29, 1024) == adapted
    # 0.5 GiB x 0.25 x 0.5 = 64 MiB is all there is
    assert cpu_engine_kwargs(upstream, 1 << 29, 1024)["kv_cache_memory_bytes"] == 64 << 20
    other = {**upstream, "worker_extension_cls": "a.b.C", "worker_cls": "a.b.Worker"}
    assert cpu_engine_kwargs(other, 1 << 30, 1024)["worker_extension_cls"] == "a.b.C"
    assert cpu_engine_kwargs(other, 1 << 30, 1024)["worker_cls"] == "a.b.Worker"
    two_ranks = {**upstream, "distributed_executor_backend": "ray"}
    assert cpu_engine_kwargs(two_ranks, 1 << 30, 1024)["distributed_executor_backend"] == "ray"


def test_platform_patches_do_nothing_until_their_module_is_imported():
    code = (
        "import sys; from openrlhf_sd.cpu import platform; platform.install(); platform.install(); "
        "assert not {'torch', 'openrlhf', 'ray'} & set(sys.modules); "
        "import torch; assert torch.cuda.current_device() == torch.device('cpu') and not torch.cuda.is_available(); "
        "import openrlhf.models.ring_attn_utils as r; assert 'flash_attn' not in sys.modules; r.unpad_input()"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "use --ds.attn_implementation sdpa or eager" in result.stderr.splitlines()[-1]
