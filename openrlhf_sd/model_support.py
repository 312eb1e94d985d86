"""Which models can draft for themselves, told from a config.json and the names of the files beside it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from openrlhf_sd.config import SelfSpecError

ARCHITECTURES = ("Qwen2ForCausalLM", "Qwen3ForCausalLM", "LlamaForCausalLM", "MistralForCausalLM")
"""Dense decoders whose layers are `model.layers.*`, with `model.embed_tokens`, `model.norm` and `lm_head` around them."""

PICKLES = ("*.bin", "*.pt", "*.pth")
CODE_NAMING_FILES = ("config.json", "tokenizer_config.json", "processor_config.json", "preprocessor_config.json")


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


def check_weights(model: str, named_by: str) -> None:
    """Raises SelfSpecError for a folder that holds its weights as pickle only. From the hub the engine downloads safetensors only.

    Args:
        named_by: the flag or argument the model came by.
    """
    folder = Path(model).expanduser()
    pickles = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
    if pickles and not any(folder.glob("*.safetensors")):
        raise SelfSpecError(
            f"{named_by}: {folder} has no *.safetensors, only pickled weights ({pickles[0]}), which can hold code and are "
            "not loaded; docs/security.md has the lines that convert them"
        )


def own_code(models: dict[str, str | None]) -> Iterator[str]:
    """One sentence for each model folder with a file whose `auto_map` names Python code of the model's own. OpenRLHF sets
    `trust_remote_code` for every model, which runs that code; no flag turns it off.

    Args:
        models: flag -> folder; None, a name of the hub, and a file that is no JSON are passed over.
    """
    for flag, model in models.items():
        named = [name for name in CODE_NAMING_FILES if model is not None and _has_auto_map(Path(model).expanduser() / name)]
        if named:
            yield f"{flag}: {', '.join(named)} of {model} names Python code of the model's own (auto_map), and OpenRLHF runs it"


def _has_auto_map(path: Path) -> bool:
    if not path.is_file():
        return False
    try:
        values = json.loads(path.read_bytes())
    except ValueError:
        return False  # whoever needs this file will say so
    return isinstance(values, dict) and "auto_map" in values
