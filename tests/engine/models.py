"""Small random policies for engine tests, built in a second; no file comes from anywhere else."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM


def build_random_policy(folder: Path, *, tied: bool, vocab_size: int = 512, spread: float = 0.05, seed: int = 0) -> Path:
    """A 2M-parameter Qwen2 in bf16. `spread` is the standard deviation of its weights: larger makes its next token less uniform."""
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=vocab_size,
        hidden_size=256,
        num_hidden_layers=4,
        intermediate_size=512,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        tie_word_embeddings=tied,
        initializer_range=spread,
    )
    model = Qwen2ForCausalLM(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):  # zero by default, and a lost bias would go unnoticed
            torch.nn.init.normal_(parameter, std=spread)
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder
