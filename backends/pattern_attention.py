"""Serves `sparsify::pattern_attention`: columns and diagonals, then attention along them."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from sparsify.backends import dispatch, divided_lists, registration
from sparsify.ops import selection
from sparsify.ops.pattern_attention import PatternAttentionCall

_select_pattern = dispatch.serve("select_pattern")


def pattern_attention(call: PatternAttentionCall) -> tuple[Tensor, Tensor]:
    """The op, of a call that was checked."""
    chosen = call.selection()
    lists = _select_pattern(chosen)
    selection.observed(chosen, *lists)
    return registration.attend(call.attention(*lists))


def _serve(*args: Any, **options: Any) -> tuple[Tensor, Tensor]:
    call = PatternAttentionCall.bind(*args, **options)
    call.check()
    return divided_lists.pattern_attention(call) if call.sequence else pattern_attention(call)


registration.register("pattern_attention", _serve)
