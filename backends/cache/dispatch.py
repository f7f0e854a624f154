"""Registers what serves the cache ops: generated kernels or the reference, decided at every call; stores are the reference's everywhere."""

from __future__ import annotations

from torch import Tensor

from sparsify.backends import dispatch
from sparsify.backends.cache import reference as reference_cache
from sparsify.ops import cache as cache_ops

# op -> module of its kernels; the function is named as the op
_KERNELS = {
    "cache_attention": "sparsify.backends.cache.append",
    "cache_decode": "sparsify.backends.cache.decode",
    "cache_mass": "sparsify.backends.cache.mass",
}

dispatch.register("cache_store", reference_cache.cache_store)
dispatch.register("cache_length", Tensor.clone)
for _op, _module in _KERNELS.items():
    dispatch.offer(_op, triton=(_module, _op), reference=(reference_cache.__name__, _op))

__all__ = ["cache_ops"]
