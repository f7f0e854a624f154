"""Registers what serves the cache ops: generated kernels or the reference, decided at every call; stores are the reference's everywhere."""

from __future__ import annotations

from torch import Tensor

from sparsify import cache_ops
from sparsify.backends import launch, reference_cache

# op -> module of its kernels; the function is named as the op
_KERNELS = {
    "cache_attention": "sparsify.backends.triton_append",
    "cache_decode": "sparsify.backends.triton_decode",
    "cache_mass": "sparsify.backends.triton_mass",
}

launch.register("cache_store", reference_cache.cache_store)
launch.register("cache_length", Tensor.clone)
for _op, _module in _KERNELS.items():
    launch.offer(_op, triton=(_module, _op), reference=(reference_cache.__name__, _op))

__all__ = ["cache_ops"]
