"""What greedy output is compared with: plain vLLM's, token by token."""

from __future__ import annotations

from engines import SIZES

BF16_GAP = 0.05
"""A divergence is excused only where plain vLLM's own two best tokens are this close: verifying gamma + 1 tokens at once sums bf16
products in another order than decoding one."""

NUM_LAST_TOKENS = 40
LAST_PROMPTS = [
    {"prompt_token_ids": [4 + (31 * row + 7 * column) % 19 for column in range(SIZES["max_model_len"] - NUM_LAST_TOKENS)]}
    for row in range(8)
]
"""Prompts that leave so many tokens of the context."""


def excused_divergences(reference, tokens) -> int:
    """0 if equal, 1 if the first difference is a near tie in plain vLLM's logprobs; asserts otherwise.

    Args:
        reference: plain vLLM's CompletionOutput, with 2 logprobs.
    """
    for position, (want, got) in enumerate(zip(reference.token_ids, tokens, strict=True)):
        if want != got:
            best, second = sorted((entry.logprob for entry in reference.logprobs[position].values()), reverse=True)[:2]
            assert best - second < BF16_GAP, f"position {position}: {got} instead of {want}, gap {best - second:.3f}"
            return 1
    return 0
