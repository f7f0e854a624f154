"""sparsify: a torch.compile backend for sparse long context.

    model.compile(backend="sparsify")

Submodules load on first use, so that listing torch.compile backends stays cheap.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sparsify import releases
from sparsify.generation import registering

__version__ = "0.1.0"
__distribution__ = releases.DISTRIBUTION

if TYPE_CHECKING:
    from sparsify.api import compile, explain
    from sparsify.generation.caches.sparse_cache import SparseCache
    from sparsify.generation.pack import pack
    from sparsify.generation.retrieve import retrieve
    from sparsify.ops.pages import Clusters, Pages
    from sparsify.planning.plan import Plan

_HOME = {
    "Clusters": "sparsify.ops.pages",
    "compile": "sparsify.api",
    "explain": "sparsify.api",
    "pack": "sparsify.generation.pack",
    "Pages": "sparsify.ops.pages",
    "Plan": "sparsify.planning.plan",
    "SparseCache": "sparsify.generation.caches.sparse_cache",
    "retrieve": "sparsify.generation.retrieve",
}
__all__ = ["Clusters", "Pages", "Plan", "SparseCache", "compile", "explain", "pack", "retrieve"]


def __getattr__(name: str) -> Any:
    import importlib

    if name not in _HOME:
        raise AttributeError(f"module 'sparsify' has no attribute {name!r}")
    if name in ("SparseCache", "pack", "retrieve"):
        releases.require("transformers")
    return getattr(importlib.import_module(_HOME[name]), name)


releases.check()
registering.register()
