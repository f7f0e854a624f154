"""Tells transformers the names of sparsify's attention functions, without importing it."""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys
import types
from typing import Any

_HOME = "transformers.modeling_utils"


def register() -> None:
    """Makes transformers know the names, now or as soon as it is imported."""
    if (registry := sys.modules.get(_HOME)) is None:
        if not any(isinstance(finder, _WhenImported) for finder in sys.meta_path):
            sys.meta_path.insert(0, _WhenImported())
    elif hasattr(registry, "ALL_ATTENTION_FUNCTIONS"):  # else it is being imported just now, and has nothing to add to
        _register()


def _register() -> None:
    from sparsify import releases

    if not releases.obstacle("transformers"):  # named in a warning already
        # registers itself when it has been imported; it may be the one that imports transformers' registry just now
        importlib.import_module("sparsify.generation.caches.attention")


class _WhenImported(importlib.abc.MetaPathFinder):
    """Registers when transformers' registry has been imported; finds nothing by itself. A search alone, which many make to learn what is
    installed, changes nothing."""

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if fullname != _HOME:
            return None
        for finder in [one for one in sys.meta_path if one is not self]:
            search = getattr(finder, "find_spec", None)
            if search is not None and (spec := search(fullname, path, target)) is not None:
                if spec.loader is not None:
                    spec.loader = _Registering(spec.loader)
                return spec
        return None


class _Registering(importlib.abc.Loader):
    """Another loader, after whose module the names are registered. Whatever else is asked of it the other one answers."""

    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: types.ModuleType) -> None:
        sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, _WhenImported)]
        # what reads a module's source or resources later finds the loader that knows them
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        _register()
