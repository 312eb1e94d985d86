"""Run a patch when a module is imported, not before.

Ray starts more worker processes than a run uses, and OpenRLHF, vLLM and DeepSpeed take seconds to import. Patching
eagerly would make every process pay for all of them, so each patch waits for its own module.
"""

from __future__ import annotations

import importlib.machinery
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from types import ModuleType

ModulePatch = Callable[[ModuleType], AbstractContextManager[None]]
"""A context manager around the module's own import: what it does before `yield` runs first, what comes after sees the
module."""


class _PatchingFinder:
    """A `sys.meta_path` finder that leaves the finding to the others and wraps the loading of the modules it has
    patches for."""

    def __init__(self) -> None:
        self.patches: dict[str, ModulePatch] = {}

    def find_spec(self, name: str, path: object = None, target: ModuleType | None = None) -> importlib.machinery.ModuleSpec | None:
        patch = self.patches.get(name)
        if patch is None:
            return None
        for finder in sys.meta_path:
            spec = finder.find_spec(name, path, target) if finder is not self else None
            if spec is not None and spec.loader is not None:
                spec.loader.exec_module = _patched(spec.loader.exec_module, patch)
                return spec
        return None


def _patched(load_module: Callable[[ModuleType], None], patch: ModulePatch) -> Callable[[ModuleType], None]:
    def exec_module(module: ModuleType) -> None:
        with patch(module):
            load_module(module)

    return exec_module


_FINDER = _PatchingFinder()


def patch_on_import(patches: dict[str, ModulePatch]) -> None:
    """Apply each patch when its module is imported; at once to a module that already is.

    Applies each patch once however often it is called.

    Args:
        patches: full module name -> patch.
    """
    if _FINDER not in sys.meta_path:
        sys.meta_path.insert(0, _FINDER)
    for name, patch in patches.items():
        if name in _FINDER.patches:
            continue
        _FINDER.patches[name] = patch
        if name in sys.modules:
            with patch(sys.modules[name]):
                pass
