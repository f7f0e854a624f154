"""Block lists: which key blocks each query block of each head visits, as counts and rising indices.

counts: int32 [..., query_blocks]. indices: int16 or wider [..., query_blocks, key_blocks], or as many as some list has; entries at and
past the count are unspecified. `...` is usually [batch, query_heads].
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import torch
from torch import Tensor

from sparsify.errors import VerifyError
from sparsify.ops.limits import cdiv


class Listing(Protocol):
    """A call that makes block lists: what they are of. start: key position of query row 0."""

    @property
    def query_len(self) -> int: ...
    @property
    def key_len(self) -> int: ...
    @property
    def start(self) -> int | Tensor: ...
    @property
    def block_size(self) -> int: ...
    @property
    def causal(self) -> bool: ...


# entries of lists that are looked at together: their positions take 8 bytes each
_AT_ONCE = 1 << 25


def to_dense(counts: Tensor, indices: Tensor, key_blocks: int) -> Tensor:
    """Block lists as a table.

    Args:
        counts, indices: block lists.
        key_blocks: columns of the table.

    Returns:
        Bool [..., query_blocks, key_blocks]: True where a key block is listed.
    """
    listed = torch.arange(indices.shape[-1], device=counts.device) < counts[..., None]
    table = torch.zeros(*counts.shape, key_blocks + 1, dtype=torch.bool, device=counts.device)
    # entries past the count all go to one column that is dropped
    table.scatter_(-1, torch.where(listed, indices.long(), key_blocks), True)
    return table[..., :key_blocks]


def visited(counts: Tensor, indices: Tensor, key_blocks: int) -> Tensor:
    """Which key blocks some query block lists: bool [..., key_blocks], of lists [..., query_blocks]."""
    found = torch.zeros(*counts.shape[:-1], key_blocks + 1, dtype=torch.bool, device=counts.device)
    step = max(1, _AT_ONCE // max(1, counts[..., :1].numel() * indices.shape[-1]))
    place = torch.arange(indices.shape[-1], device=counts.device)
    for first in range(0, counts.shape[-1], step):
        some = slice(first, first + step)
        # entries past the count all go to one column that is dropped
        at = torch.where(place < counts[..., some, None], indices[..., some, :].long(), key_blocks)
        found.scatter_(-1, at.flatten(-2), True)
    return found[..., :key_blocks]


def from_dense(keep: Tensor) -> tuple[Tensor, Tensor]:
    """Block lists of a table.

    Args:
        keep: bool [..., query_blocks, key_blocks].

    Returns:
        counts: int32 [..., query_blocks].
        indices: int16 [..., query_blocks, key_blocks]; entries past the count are the blocks not kept, so in range.
    """
    order = keep.logical_not().to(torch.uint8).sort(dim=-1, stable=True).indices
    return keep.sum(-1, dtype=torch.int32), order.to(torch.int16)


def last_positions(query_len: int, start: int | Tensor, block_size: int, *, device: torch.device | str = "cpu") -> Tensor:
    """Key position of the last row of every query block, int64 [query_blocks]."""
    blocks = cdiv(query_len, block_size)
    last = (torch.arange(blocks, device=device) + 1) * block_size
    return last.clamp(max=query_len) - 1 + start


def causal_blocks(query_len: int, key_len: int, start: int | Tensor, block_size: int, *, device: torch.device | str = "cpu") -> Tensor:
    """How many key blocks some row of each query block may see under causality: int64 [query_blocks].

    start: key position of query row 0, `key_len - query_len` in a plain prefill.
    """
    key_blocks = cdiv(key_len, block_size)
    last = last_positions(query_len, start, block_size, device=device)
    return (torch.div(last, block_size, rounding_mode="floor") + 1).clamp(0, key_blocks)


def density(counts: Tensor, query_len: int, key_len: int, start: int, block_size: int, *, causal: bool = True) -> tuple[Tensor, float]:
    """Share of the causally possible blocks that is listed.

    Returns:
        fp64 [...] per leading index of `counts` (batch row and head), and their mean. 0 where nothing is possible.
    """
    possible = causal_blocks(query_len, key_len, start, block_size, device=counts.device)
    if not causal:
        possible = torch.full_like(possible, cdiv(key_len, block_size))
    per_head = counts.sum(-1).double() / possible.sum().clamp(min=1)
    return per_head, float(per_head.mean()) if per_head.numel() else 0.0


def mean_density(pieces: Iterable[tuple[float, float]]) -> float:
    """The density of a selection that was made in pieces, of each piece's density and how many blocks it could list; 0 without any."""
    found = list(pieces)
    return sum(density * blocks for density, blocks in found) / max(1.0, sum(blocks for _, blocks in found))


def possible_blocks(call: Listing) -> int:
    """How many blocks one head of a call could list. Reads where its rows begin: synchronises where that is on the device."""
    if not call.causal:
        return cdiv(call.query_len, call.block_size) * cdiv(call.key_len, call.block_size)
    return int(causal_blocks(call.query_len, call.key_len, int(call.start), call.block_size).sum())


def call_density(call: Listing, counts: Tensor) -> float:
    """Mean density of one call's lists. Reads a device tensor: synchronises."""
    return density(counts, call.query_len, call.key_len, int(call.start), call.block_size, causal=call.causal)[1]


def check(counts: Tensor, indices: Tensor, query_len: int, key_len: int, start: int, block_size: int, *, causal: bool = True) -> None:
    """Checks block lists: counts in range, indices rising and in range, no block that causality excludes. Synchronises.

    Raises:
        VerifyError: says which of these fails and where first.
    """
    key_blocks = cdiv(key_len, block_size)
    query_blocks = cdiv(query_len, block_size)
    if counts.shape[-1] != query_blocks or indices.shape != (*counts.shape, key_blocks):
        raise VerifyError(f"block lists {tuple(counts.shape)}, {tuple(indices.shape)} do not fit {query_blocks} x {key_blocks} blocks")
    _refuse((counts < 0) | (counts > key_blocks), "a count is out of range")
    listed = torch.arange(key_blocks, device=counts.device) < counts[..., None]
    _refuse(((indices < 0) | (indices >= key_blocks)) & listed, "an index is out of range")
    _refuse((indices[..., 1:] <= indices[..., :-1]) & listed[..., 1:], "indices do not rise")
    if causal:
        limit = causal_blocks(query_len, key_len, start, block_size, device=counts.device)
        _refuse((indices >= limit[:, None]) & listed, "a block is listed that no row of its query block may see")


def _refuse(wrong: Tensor, what: str) -> None:
    if bool(wrong.any()):
        raise VerifyError(what, where=f"block lists at {[int(index) for index in wrong.nonzero()[0]]}")
