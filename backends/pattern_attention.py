"""Serves `sparsify::pattern_attention`: columns and diagonals, then attention along them."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from sparsify.backends import dispatch, divided_lists, registration
from sparsify.backends.sparse_attention import in_parts
from sparsify.ops import scratch
from sparsify.ops.pattern_attention import PatternAttentionCall

_select_pattern = dispatch.serve("select_pattern")


def pattern_attention(call: PatternAttentionCall, *, limit: int = scratch.LIST_BYTES) -> tuple[Tensor, Tensor]:
    """The op, of a call that was checked.

    Args:
        limit: bytes of block lists at a time, for tests.
    """
    width = call.key_blocks if call.by_block else call.width  # beside lists a table of what query blocks choose
    each = scratch.list_bytes(call.query_len, call.block_size * width, call.block_size)
    return in_parts(call, _select_pattern, each, limit)


def _serve(*args: Any, **options: Any) -> tuple[Tensor, Tensor]:
    call = PatternAttentionCall.bind(*args, **options)
    call.check()
    return divided_lists.pattern_attention(call) if call.sequence else pattern_attention(call)


registration.register("pattern_attention", _serve)
