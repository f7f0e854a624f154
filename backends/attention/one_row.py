"""`sparsify::attention` of one query row on a CPU whose keys lie in one piece: a step over a cache, in five operations.

The reference asks of every key, and of every slot of a cache, whether the row sees it and whether its values are finite. A CPU can be
asked where the visible keys begin and end, and whether some between are hidden, and computes with those alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparsify.backends.attention.reference import Mask
from sparsify.ops.attention import AttentionCall

# clauses without which the visible keys are a range, and their weights a plain softmax
_SERVED = ("key_flags", "query_start", "scale", "causal", "windows", "block_size")


def attention(call: AttentionCall, *, into: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor] | None:
    """The op, written nowhere but into its outputs; None where this does not serve the call.

    Args:
        into: output and LSE to fill instead of new ones.
    """
    query, key, value = call.query, call.key, call.value
    (batch, heads, query_len, _), kv_heads = query.shape, key.shape[1]
    if query_len != 1 or call.beyond(_SERVED) or query.dtype != torch.float32 or query.numel() == 0 or value.numel() == 0:
        return None
    windowed = any(window > 0 for window in call.windows)
    if windowed and (call.key_flags is not None or len(set(call.windows)) > 1):
        return None  # sinks outside of the window, or a range for each head
    begin, end = Mask.from_call(call).key_range(0, 0)
    if begin >= end:
        return None
    hidden = None if call.key_flags is None else call.key_flags[:, begin:end] & 1 == 0
    grouped = query.reshape(batch, kv_heads, heads // kv_heads, -1)  # the heads of a group are rows over the same keys
    logits = grouped @ key[:, :, begin:end].transpose(-1, -2) * call.scale
    if hidden is not None and bool(hidden.any()):
        logits.masked_fill_(hidden[:, None, None], -torch.inf)
    sums = logits.logsumexp(-1, keepdim=True)
    found = (logits - sums).exp() @ value[:, :, begin:end]
    if not bool(found.sum().isfinite()):
        # a row without a visible key, scores or values that are not finite, sums beyond float32: the reference says what becomes of them
        return None
    output, lse = into or call.empty_outputs()
    output.copy_(found.reshape(batch, heads, 1, -1))
    lse.copy_(sums.reshape(batch, heads, 1))
    return output, lse
