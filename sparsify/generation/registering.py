"""Tells transformers the names of sparsify's attention functions, without importing it."""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from typing import Any

_HOME = "transformers.modeling_utils"


def register() -> None:
    """Makes transformers know the names, now or as soon as it is imported."""
    if _HOME in sys.modules:
        _register()
    elif not any(isinstance(finder, _WhenImported) for finder in sys.meta_path):
        sys.meta_path.insert(0, _WhenImported())


def _register() -> None:
    from sparsify import releases

    if not releases.obstacle("transformers"):  # named in a warning already
        # registers itself when it has been imported; it may be the one that imports transformers' registry just now
        importlib.import_module("sparsify.generation.caches.attention")


class _WhenImported(importlib.abc.MetaPathFinder):
    """Registers when transformers' registry is imported; finds nothing by itself."""

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if fullname != _HOME:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: Any) -> None:
                execute(module)
                _register()

            spec.loader.exec_module = exec_module
        return spec
