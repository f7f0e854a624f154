"""How a cache holds keys and values in 8 or 4 bits (KIVI, arXiv 2402.02750).

Keys are quantised by channel, with one scale for GROUP neighbouring slots, values by token. The tokens that were stored one at a time since
their group of slots began lie in `recent_keys` and `recent_values` as they came; a full group is quantised before the next token is stored.

    fp8    code * scale, E4M3 codes (OCP 8-bit floating point), scales that are powers of two
    int4   code * scale + least, codes 0 to 15: of bytes 2j and 2j + 1, as one number of 16 bits, the lowest four bits are channel j, those
           above j + d / 4, j + d / 2 and j + 3 d / 4, for d channels

With `starts` (`sparsify.ops.cache`) groups are counted from each head's first slot, those of head h begin at starts[h] // GROUP + h of the
row's, taken as one sequence.

With pages, tokens that lie as they came are always read. Bounds are those of keys as they are read.

Buffers of a layer, all on one device:

    keys, values                uint8 [batch, kv_heads, capacity, head_dim], int4: [..., head_dim / 2]
    key_scales                  [batch, kv_heads, groups, 1 or 2, head_dim]  scale, and for int4 the least number
    value_scales                [batch, kv_heads, capacity, 1 or 2]          likewise
    recent_keys, recent_values  [batch, kv_heads, GROUP, head_dim]           slot s at s mod GROUP
    staged                      int32 [batch, kv_heads, 2]                   the first slot that lies there and the one after the last
"""

from __future__ import annotations

from typing import Literal

import torch

from sparsify.ops.limits import cdiv

Codes = Literal["", "fp8", "int4"]
# slots that share the scales of their keys
GROUP = 64
# the largest number of E4M3
FP8_LARGEST = 448.0
# exponents of scales, as bits have them: what every 16-bit dtype holds
LEAST_EXPONENT, LARGEST_EXPONENT = 127 - 14, 127 + 15
# scales of 4-bit codes, likewise
LEAST_STEP, LARGEST_STEP = 2.0**-24, 2.0**15


def packed(head_dim: int, codes: str) -> int:
    """Bytes of a token's codes."""
    return head_dim // 2 if codes == "int4" else head_dim


def words(head_dim: int, codes: str) -> bool:
    """Whether a token's codes fill whole words of 16 bits."""
    return head_dim % (4 if codes == "int4" else 2) == 0


def parts(codes: str) -> int:
    """Numbers that turn a code into a value."""
    return 2 if codes == "int4" else 1


def groups(slots: int) -> int:
    return cdiv(slots, GROUP)


def packed_groups(slots: int) -> int:
    """Groups that a KV head has on the mean, where heads have `slots` on the mean: each may begin one that it does not fill."""
    return groups(slots) + 1


def token_bytes(head_dim: int, v_head_dim: int, codes: str, dtype: torch.dtype) -> float:
    """Bytes of one token's keys and values of a head, scales included."""
    if not codes:
        return (head_dim + v_head_dim) * dtype.itemsize
    scales = parts(codes) * dtype.itemsize * (head_dim / GROUP + 1)
    return packed(head_dim, codes) + packed(v_head_dim, codes) + scales
