"""Registers what serves the ops: implementations from the dispatch table, and what is done around them on every device."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sparsify.backends import dispatch, patterned_heads
from sparsify.errors import KernelError
from sparsify.ops import block_lists, feed_forward, gradients, selection
from sparsify.ops.attention import AttentionCall
from sparsify.ops.cache import CacheAttentionCall, CacheBoundsCall, CacheDecodeCall, CacheMassCall, CacheStoreCall
from sparsify.ops.call import OpCall
from sparsify.ops.farthest import FarthestFirstCall
from sparsify.ops.library import library
from sparsify.ops.linear import LinearCall
from sparsify.ops.patterns import SelectPatternCall
from sparsify.ops.reselection import CacheObserveCall, CacheReselectCall
from sparsify.ops.selection import SelectCall
from sparsify.ops.sums import SmallSumCall

log = logging.getLogger(__name__)


# what serves each op once it was registered, by the op's name
SERVED: dict[str, Callable[..., Any]] = {}


def register(op: str, kernel: Callable[..., Any]) -> None:
    """Makes a function serve an op on CPU and CUDA devices, outside of the caller's autocast: that would round the products within it."""

    @functools.wraps(kernel)
    def call(*args: Any, **options: Any) -> Any:
        gradients.refuse(op, args, options)
        with torch._C._DisableAutocast():
            return kernel(*args, **options)

    SERVED[op] = call
    for device in ("CPU", "CUDA"):
        library.impl(op, call, device)


def _served(op: str) -> Callable[..., Any]:
    """`dispatch.serve` with every keyword of the op's schema: the dispatcher leaves out those that have their default."""
    schema = getattr(torch.ops.sparsify, op).default._schema.arguments
    defaults = {a.name: a.default_value for a in schema if a.kwarg_only and a.has_default_value()}
    serve = dispatch.serve(op)
    return lambda *args, **given: serve(*args, **{**defaults, **given})


def _bound(call: type[OpCall]) -> Callable[..., Any]:
    """`dispatch.serve` with the record of each call."""
    serve = dispatch.serve(call.NAME)
    return lambda *args, **options: serve(call.bind(*args, **options))


_attention, _fill_empty_rows = dispatch.serve("attention"), dispatch.serve("empty_rows")


def attend(call: AttentionCall, *, into: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
    """Attention of a call that was checked, and after it what rows that see no key hold.

    Args:
        into: output and LSE to fill instead of new ones.
    """
    output, lse = _attention(call, into=into)
    if call.empty_rows != "zero":
        _fill_empty_rows(output, lse, call)
    return output, lse


@functools.cache
def _warn_dense() -> None:
    log.warning("select_blocks ran out of memory: every block is visited, so attention is dense (strict = true raises instead)")


def select(call: SelectCall) -> tuple[Tensor, Tensor]:
    """Block lists of a call that was checked. Where there is no memory for an estimate, attention stays dense: right, and slower."""
    try:
        return patterned_heads.select_blocks(call.served)
    except (RuntimeError, MemoryError, KernelError) as error:
        if dispatch.is_strict() or not dispatch.out_of_memory(error):
            raise
    # here the error's frames, and what they hold on the device, are gone
    _warn_dense()
    return every_block(call)


_prepare_keys = dispatch.serve("prepare_keys")


def prepare_keys(call: SelectCall) -> tuple[Tensor, Tensor | None]:
    """The operands `prepared_keys` and `prepared_scales` of a selection from the keys of this call, whose estimate is prepared."""
    return _prepare_keys(call)


def every_block(call: SelectCall) -> tuple[Tensor, Tensor]:
    """Block lists that leave out nothing but what causality does; the attention op applies the other clauses."""
    counts, indices = call.empty_lists()
    indices.copy_(torch.arange(indices.shape[-1], dtype=indices.dtype, device=indices.device))
    if not call.causal:
        return counts.fill_(indices.shape[-1]), indices
    sizes = call.query_len, call.key_len, call.start, call.block_size
    return counts.copy_(block_lists.causal_blocks(*sizes, device=call.device)), indices


def _checked(record: type[OpCall], serve: Callable[[Any], Any]) -> Callable[..., Any]:
    """A function of a record as one of the op's arguments, which are checked."""

    def checked(*args: Any, **options: Any) -> Any:
        call = record.bind(*args, **options)
        call.check()
        return serve(call)

    return checked


def _listed(serve: Callable[[Any], tuple[Tensor, Tensor]]) -> Callable[[Any], tuple[Tensor, Tensor]]:
    """What makes block lists, and after it who observes them."""

    def listed(call: Any) -> tuple[Tensor, Tensor]:
        lists = serve(call)
        selection.observed(call, *lists)
        return lists

    return listed


def _observed(ffn: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., tuple[Tensor, Tensor]]:
    """Feed-forward blocks, and after each who observes them."""

    @functools.wraps(ffn)
    def call(residual: Tensor, input: Tensor, remaining: Tensor, *args: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        out, after = ffn(residual, input, remaining, *args, **options)
        for observer in feed_forward.observers():
            observer(remaining, after)
        return out, after

    return call


register("select_blocks", _checked(SelectCall, _listed(select)))
register("select_pattern", _checked(SelectPatternCall, _listed(dispatch.serve("select_pattern"))))
register("linear", _checked(LinearCall, dispatch.serve("linear")))
register("farthest_first", _checked(FarthestFirstCall, dispatch.serve("farthest_first")))
register("small_sum", _checked(SmallSumCall, dispatch.serve("small_sum")))
register("ffn", _observed(_served("ffn")))
for _op in ("ffn_parts", "ffn_start", "ffn_prompt", "cache_length"):
    register(_op, _served(_op))
_CACHE = (CacheStoreCall, CacheAttentionCall, CacheDecodeCall, CacheBoundsCall, CacheMassCall, CacheReselectCall, CacheObserveCall)
for _record in _CACHE:
    register(_record.NAME, _bound(_record))
