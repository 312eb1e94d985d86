"""vLLM's layerwise reload warns of every layer no weight was sent for. Some are never sent any; those must not alarm anyone."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from vllm.model_executor.model_loader.reload.layerwise import finalize_layerwise_reload


@contextmanager
def not_missing(layers: list[torch.nn.Module]) -> Iterator[None]:
    """Drop the warning that a layer of these classes "failed to load weights"; keep it for every other layer."""
    expected = {f"{type(layer).__name__}: Failed to load weights" for layer in layers}

    def is_news(record: logging.LogRecord) -> bool:
        return record.getMessage() not in expected

    logger = logging.getLogger(finalize_layerwise_reload.__module__)
    logger.addFilter(is_news)
    try:
        yield
    finally:
        logger.removeFilter(is_news)


def without_parameters(model: torch.nn.Module) -> list[torch.nn.Module]:
    """Layers that hold computed buffers only, like the tables of a rotary embedding: no checkpoint has anything for them."""
    return [layer for layer in model.modules() if not any(True for _ in layer.parameters())]
