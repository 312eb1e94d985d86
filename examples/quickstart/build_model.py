"""Builds the quickstart's policy (Qwen2 architecture, random weights) and tokenizer in a folder; downloads nothing.

    python examples/quickstart/build_model.py --out DIR [--seed 0]

Output: a Hugging Face folder (config.json, model.safetensors in bf16, tokenizer.json, ...) that transformers, vLLM
and OpenRLHF load like any other. 1.2M parameters, under 10 seconds.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import task
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

CONTEXT_TOKENS = 1024


def build_tokenizer() -> Qwen2Tokenizer:
    """Qwen2's own byte-level BPE, its vocabulary cut down to what the task writes; decoding gives back the exact text.

    Not a tokenizer of another class: for a Qwen2 model, transformers' AutoTokenizer always makes a Qwen2Tokenizer of
    what it finds.
    """
    byte_level = {" ": "Ġ", "\n": "Ċ"}  # how byte-level BPE spells the two characters that are not printable

    def spell(text: str) -> str:
        return "".join(byte_level.get(c, c) for c in text)

    words = [spell(word) for word in task.WORDS]
    letters = sorted(set("".join(words)))
    # A word grows from its left end: w o, wo r, wor k. So its beginnings are tokens too, although the task uses none.
    beginnings = [(word[:i], word[i]) for word in words for i in range(1, len(word))]
    merges = list(dict.fromkeys(beginnings))
    tokens = [*task.SPECIAL_TOKENS, *spell(task.CHARACTERS), *letters, *(left + right for left, right in merges)]
    return Qwen2Tokenizer(
        vocab={token: i for i, token in enumerate(dict.fromkeys(tokens))},
        merges=merges,
        pad_token=task.PAD,
        bos_token=task.BOS,
        eos_token=task.EOS,
        unk_token=task.UNK,
        model_max_length=CONTEXT_TOKENS,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def build_config(tokenizer: Qwen2Tokenizer) -> Qwen2Config:
    """Every quantized linear has 256 or 512 input channels, multiples of the drafter's group of 128."""
    return Qwen2Config(
        vocab_size=128,  # about 80 in use; a multiple of 64, as vLLM pads it anyway
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT_TOKENS,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )


def save_policy(model: Qwen2ForCausalLM, tokenizer: Qwen2Tokenizer, out: Path) -> None:
    """Writes bf16 weights, as OpenRLHF trains and vLLM serves them. Converts `model` in place."""
    out.mkdir(parents=True, exist_ok=True)
    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)

    started = time.perf_counter()
    torch.manual_seed(args.seed)
    tokenizer = build_tokenizer()
    model = Qwen2ForCausalLM(build_config(tokenizer))
    save_policy(model, tokenizer, args.out)
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    print(f"built a {millions:.1f}M-parameter Qwen2 policy in {args.out} ({time.perf_counter() - started:.1f} s)")


if __name__ == "__main__":
    main()
