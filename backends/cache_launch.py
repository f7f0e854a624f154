"""Which implementation serves a cache op, decided at every call: the generated decode kernel or the reference."""

from __future__ import annotations

import functools
import logging

from torch import Tensor

from sparsify import cache_ops
from sparsify.backends import launch, reference_cache
from sparsify.errors import KernelError, UnsupportedError

log = logging.getLogger(__name__)


@functools.cache
def _warn_once(reason: str) -> None:
    log.warning("cache_decode runs the slow reference: %s", reason)


def cache_decode(query: Tensor, *args: Tensor, **options) -> Tensor:
    kind, _ = launch.available(query.device)
    if kind == "triton":
        from sparsify.backends import triton_decode

        try:
            return triton_decode.cache_decode(query, *args, **options)
        except (UnsupportedError, KernelError) as error:
            if isinstance(error, KernelError) and not launch.recovers(error):
                raise
            _warn_once(str(error))
    return reference_cache.cache_decode(query, *args, **options)


for _name, _function in (
    ("cache_store", reference_cache.cache_store),
    ("cache_attention", reference_cache.cache_attention),
    ("cache_decode", cache_decode),
    ("cache_length", Tensor.clone),
):
    launch.register(_name, _function)

__all__ = ["cache_ops"]
