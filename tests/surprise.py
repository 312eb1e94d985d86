"""Whether sampled tokens are as surprising as the policy's own probabilities say: exactness where a test of frequencies at a few
positions has no eyes, at the rare tokens of every position. A long answer of a policy that is sure of itself is spoilt by one of them."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from scipy.stats import poisson

RARE = 1e-3
"""Probability below which a token counts as rare."""


@dataclass(frozen=True)
class Surprise:
    num_tokens: int
    z_score: float
    """Of the sum of -log p of the tokens, against the sum of the entropies they were drawn with."""

    num_rare: int
    expected_rare: float
    """What the policy gives to all rare tokens together, summed over the positions."""

    @property
    def rare_p_value(self) -> float:
        """Two-sided."""
        one_sided = min(poisson.cdf(self.num_rare, self.expected_rare), poisson.sf(self.num_rare - 1, self.expected_rare))
        return min(1.0, 2 * float(one_sided))

    def __str__(self) -> str:
        rare = f"{self.num_rare} tokens of p < {RARE:g}, {self.expected_rare:.1f} expected (p={self.rare_p_value:.3f})"
        return f"surprise {self.z_score:+.2f} standard deviations off in {self.num_tokens} tokens, {rare}"


def surprise(sampled: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> Surprise:
    """Args:
    sampled: per response the logits (T, V) its tokens were drawn with at temperature 1, and the tokens (T,).
    """
    num_tokens, excess, variance, num_rare, expected_rare = 0, 0.0, 0.0, 0, 0.0
    for logits, tokens in sampled:
        logprobs = logits.double().log_softmax(-1)
        probs = logprobs.exp()
        # 0 log 0 is 0.
        information = -logprobs.masked_fill(probs == 0, 0.0)
        entropy = (probs * information).sum(-1)
        drawn = logprobs.gather(-1, tokens[:, None]).squeeze(-1)
        num_tokens += len(tokens)
        excess += (-drawn - entropy).sum().item()
        variance += ((probs * information**2).sum(-1) - entropy**2).clamp_min(0).sum().item()
        num_rare += int((drawn < math.log(RARE)).sum())
        expected_rare += (probs * (probs < RARE)).sum().item()
    return Surprise(num_tokens, excess / math.sqrt(variance), num_rare, expected_rare)


def surprise_of_outputs(model, outputs) -> Surprise:
    """Of vLLM's outputs, against a Hugging Face model, in float32 for accuracy."""

    def drawn():
        for output in outputs:
            prompt, tokens = list(output.prompt_token_ids), list(output.outputs[0].token_ids)
            with torch.no_grad():
                logits = model(torch.tensor([prompt + tokens])).logits[0]
            yield logits[len(prompt) - 1 : -1], torch.tensor(tokens)

    return surprise(drawn())
