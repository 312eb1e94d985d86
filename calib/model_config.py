"""A model's config.json from disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from openrlhf_sd.config import SelfSpecError


def read_model_config(path: str | Path) -> dict[str, Any]:
    """Contents of a config.json, or of the one in a folder.

    Raises:
        SelfSpecError: there is none, or it holds no JSON object.
    """
    path = config_path(path)
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise SelfSpecError(f"--model-config: {path} cannot be read ({error}); give a model's config.json or its folder") from error
    if not isinstance(config, dict):
        raise SelfSpecError(f"--model-config: {path} holds no JSON object; give a model's config.json or its folder")
    return config


def model_name(path: str | Path) -> str:
    """What to call the model of a config file: its folder, or a file's own name where that says more than config.json."""
    path = config_path(path).resolve()
    stem = path.name.removesuffix(".json").removesuffix("config").rstrip("._-")
    return stem or path.parent.name


def config_path(path: str | Path) -> Path:
    path = Path(path).expanduser()
    return path / "config.json" if path.is_dir() else path
