"""Which models can draft for themselves, told from a config.json alone."""

from __future__ import annotations

from typing import Any

from openrlhf_sd.config import SelfSpecError

ARCHITECTURES = ("Qwen2ForCausalLM", "Qwen3ForCausalLM", "LlamaForCausalLM", "MistralForCausalLM")
"""Dense decoders whose layers are `model.layers.*`, with `model.embed_tokens`, `model.norm` and `lm_head` around them."""


def check_model(model_config: dict[str, Any], named_by: str) -> None:
    """Raises SelfSpecError if the drafter cannot be made of this model.

    Args:
        named_by: the flag or argument the model came by.
    """
    architectures = model_config.get("architectures") or ["none"]
    if architectures[0] not in ARCHITECTURES:
        raise SelfSpecError(
            f"{named_by}: self-speculation knows {', '.join(ARCHITECTURES)}, not {architectures[0]}; "
            "use one of those or train without --self-spec"
        )
    if model_config.get("quantization_config"):
        raise SelfSpecError(f"{named_by}: the policy is quantized already; give its bf16 weights")
