"""What the kernels of `sparsify::select_blocks` share: checked operands, sizes in cells and blocks, masks summed up per cell and block.

A cell is `stride` consecutive tokens. Key cell j starts at key j·stride; query cell i starts at query row i·span, where span is the
stride, or a multiple of it when only every second query cell is scored. Nothing here synchronises with the device.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparsify.errors import UnsupportedError
from sparsify.ops.estimate import VARIANTS, merged

_WHERE = "sparsify::select_blocks"
_FAR = (1 << 31) - 1
# longer than any prompt, and far from where int32 ends
_LONGEST_WINDOW = 1 << 30
_POOLS = "sum or max, then any of +half, +group, +pair or +quad, +int8"


@dataclass(frozen=True)
class Pool:
    """How the estimate is made: the op's `pool` string, `sum` or `max` with any of the suffixes of `_POOLS`.

    reduce: over a query block's cells. half: score every second query cell only. group: one estimate per KV head, from the mean of
    its query heads. merged: so many neighbouring tokens' mean stands for them all, of queries and of keys. int8: cells are rounded to
    8 bits, each with a scale of its own, keys after their mean is taken away.
    """

    reduce: str
    half: bool = False
    group: bool = False
    merged: int = 1
    int8: bool = False

    @classmethod
    def parse(cls, text: str) -> Pool:
        reduce, *suffixes = text.split("+")
        if reduce not in ("sum", "max") or len(set(suffixes)) != len(suffixes) or not set(suffixes) <= set(VARIANTS):
            raise UnsupportedError(f"unknown pool {text!r}", where=_WHERE, hint=_POOLS)
        if {"pair", "quad"} <= set(suffixes):
            raise UnsupportedError(f"pool {text!r} merges tokens twice", where=_WHERE, hint=_POOLS)
        return cls(reduce, "half" in suffixes, "group" in suffixes, merged(suffixes), "int8" in suffixes)


@dataclass(frozen=True)
class Selection:
    """One call of `sparsify.ops.attention.select_blocks`, checked. `windows` and `threshold` are empty, one, or one per query head."""

    query: Tensor
    key: Tensor
    key_flags: Tensor | None
    segments: Tensor | None
    query_start: Tensor | None
    scale: float
    causal: bool
    windows: tuple[int, ...]
    pool: Pool
    stride: int
    block: int
    threshold: tuple[float, ...]
    density: float

    @property
    def batch(self) -> int:
        return self.query.shape[0]

    @property
    def heads(self) -> int:
        return self.query.shape[1]

    @property
    def kv_heads(self) -> int:
        return self.key.shape[1]

    @property
    def group(self) -> int:
        """Query heads per KV head."""
        return self.heads // self.kv_heads

    @property
    def query_len(self) -> int:
        return self.query.shape[2]

    @property
    def key_len(self) -> int:
        return self.key.shape[2]

    @property
    def span(self) -> int:
        """Query rows from one scored query cell to the next."""
        return self.stride * (2 if self.pool.half else 1)

    @property
    def steps(self) -> int:
        """Products of tokens, or of neighbours' means, in one score."""
        return self.stride // self.pool.merged

    @property
    def query_cells(self) -> int:
        return -(-self.query_len // self.span)

    @property
    def key_cells(self) -> int:
        return -(-self.key_len // self.stride)

    @property
    def query_blocks(self) -> int:
        return -(-self.query_len // self.block)

    @property
    def key_blocks(self) -> int:
        return -(-self.key_len // self.block)

    @property
    def start(self) -> int | Tensor:
        """Key position of query row 0: a number, or a tensor of no dimensions when it is known at run time only."""
        if self.query_start is None:
            return self.key_len - self.query_len
        return self.query_start.reshape(())

    @property
    def empty(self) -> bool:
        return 0 in (self.batch, self.heads, self.query_len, self.key_len)


def describe(
    query: Tensor,
    key: Tensor,
    *,
    key_flags: Tensor | None = None,
    segments: Tensor | None = None,
    query_start: Tensor | None = None,
    scale: float,
    causal: bool,
    windows: list[int],
    pool: str,
    stride: int,
    block_size: int,
    threshold: list[float],
    density: float,
    version: int,
) -> Selection:
    """Checks the op's operands.

    Raises:
        UnsupportedError: what is wrong and what would do.
    """
    heads, kv_heads = query.shape[1], key.shape[1]
    span = stride * (2 if Pool.parse(pool).half else 1)

    def need(holds: bool, what: str, hint: str = "") -> None:
        if not holds:
            raise UnsupportedError(what, where=_WHERE, hint=hint)

    need(query.is_floating_point() and query.dtype == key.dtype, f"query is {query.dtype}, key {key.dtype}", "one floating-point dtype")
    need(
        query.shape[0] == key.shape[0] and query.shape[3] == key.shape[3], f"query {tuple(query.shape)} does not fit key {tuple(key.shape)}"
    )
    need(kv_heads > 0 and heads % kv_heads == 0, f"{heads} query heads are no multiple of {kv_heads} KV heads")
    need(stride in (4, 8, 16), f"stride {stride}", "4, 8 or 16")
    need(block_size in (32, 64, 128) and block_size % span == 0, f"block size {block_size} for stride {stride}", "64 or 128")
    need(len(windows) in (0, 1, heads), f"{len(windows)} windows for {heads} query heads", "none, one, or one per query head")
    need(len(threshold) in (1, heads) or density > 0, f"{len(threshold)} thresholds for {heads} query heads", "one, or one per query head")
    need(all(t >= 0 for t in threshold), f"threshold {threshold}", "0 or more")
    need(0 <= density <= 1, f"density {density}", "0 (use the threshold) to 1")
    need(-(-key.shape[2] // block_size) <= 32767, f"{key.shape[2]} keys at block size {block_size}", "at most 32767 blocks: int16 indices")
    for name, operand in (("key_flags", key_flags), ("segments", segments)):
        fits = operand is None or (operand.dim() == 2 and operand.shape[0] in (1, query.shape[0]) and operand.shape[1] == key.shape[2])
        need(fits, f"{name} {tuple(operand.shape) if operand is not None else ''}", f"[batch or 1, {key.shape[2]}]")
    need(query_start is None or query_start.numel() == 1, "query_start has more than one element")
    windows = () if not any(w > 0 for w in windows) else tuple(min(max(w, 0), _LONGEST_WINDOW) for w in windows)
    return Selection(
        query,
        key,
        key_flags,
        segments,
        query_start,
        scale,
        causal,
        windows,
        Pool.parse(pool),
        stride,
        block_size,
        tuple(threshold),
        density,
    )


def real_keys(call: Selection) -> Tensor | None:
    """Bool [batch or 1, key_len]: keys that take part. None: all. A cache's slots past the last query row never do."""
    real = None if call.key_flags is None else call.key_flags & 1 != 0
    if call.causal and call.query_start is not None:
        written = (torch.arange(call.key_len, device=call.key.device) < call.start + call.query_len)[None]
        real = written if real is None else real & written
    return real


def real_queries(call: Selection) -> Tensor | None:
    """Bool [batch or 1, query_len]: rows that are not padding, so whose own key is visible. Rows outside of the keys are real."""
    if call.key_flags is None:
        return None
    own, inside = own_key(call)
    return (call.key_flags[:, own] & 1 != 0) | ~inside


def keys_mean(call: Selection, keys: Tensor, real: Tensor | None) -> Tensor:
    """Mean of the keys that take part, fp32 [batch, kv_heads, head_dim]; 0 where it is not finite.

    keys: [batch, kv_heads, tokens, head_dim], 0 where a key does not take part. real: as `real_keys`, of these batch rows.
    Taking any one vector from all keys moves all logits of a row alike, so that it never changes the softmax, only what rounding loses.
    """
    count = call.key_len if real is None else real.sum(1).clamp(min=1)[:, None, None]
    return (keys.sum(2, dtype=torch.float32) / count).nan_to_num(0.0, 0.0, 0.0).contiguous()


def own_key(call: Selection) -> tuple[Tensor, Tensor]:
    """Key position of every query row, clamped to the keys, and whether it lies inside: [query_len] each."""
    position = torch.arange(call.query_len, device=call.query.device) + call.start
    return position.clamp(0, call.key_len - 1), (position >= 0) & (position < call.key_len)


def grouped(values: Tensor, size: int, used: int, fill: int | bool) -> Tensor:
    """[rows, n] to [rows, ceil(n / size), used]: the first `used` of every `size` entries; missing ones are `fill`."""
    missing = -values.shape[1] % size
    values = torch.nn.functional.pad(values, (0, missing), value=fill)
    return values.unflatten(1, (-1, size))[..., :used]


def key_bits(call: Selection, size: int) -> Tensor | None:
    """uint8 [batch or 1, ceil(key_len / size)]: bit 0: a group of keys has a real one, bit 1: it has a sink. None without key_flags."""
    if call.key_flags is None:
        return None
    real = real_keys(call)
    sink = real & (call.key_flags & 2 != 0)
    return (
        grouped(real, size, size, False).any(-1).to(torch.uint8) + 2 * grouped(sink, size, size, False).any(-1).to(torch.uint8)
    ).contiguous()


def query_bits(call: Selection) -> Tensor | None:
    """uint8 [batch or 1, query_cells]: 1 when a scored cell has a real row. None without key_flags."""
    real = real_queries(call)
    return None if real is None else grouped(real, call.span, call.stride, False).any(-1).to(torch.uint8).contiguous()


def sink_block(call: Selection) -> Tensor | None:
    """int32 [batch or 1]: the block of the first visible key, key_blocks without any. None: block 0."""
    if call.key_flags is None:
        return None
    real = real_keys(call)
    first = real.to(torch.uint8).argmax(-1) // call.block
    return torch.where(real.any(-1), first, call.key_blocks).to(torch.int32)


def key_segments(call: Selection, size: int) -> tuple[Tensor, Tensor] | None:
    """Lowest and highest segment of the real keys of each group: int32 [batch or 1, ceil(key_len / size)]; an empty range without any."""
    return None if call.segments is None else _ranges(call.segments, real_keys(call), size, size)


def query_segments(call: Selection, size: int, used: int) -> tuple[Tensor, Tensor] | None:
    """The same for each group of query rows, whose segment is their own key's; a row outside of the keys may match anything."""
    if call.segments is None:
        return None
    own, inside = own_key(call)
    low, high = _ranges(call.segments[:, own], real_queries(call), size, used)
    outside = grouped(~inside[None], size, used, False).any(-1)
    # one short of the ends, where the empty ranges are
    return low.masked_fill(outside, 1 - _FAR), high.masked_fill(outside, _FAR - 1)


def _ranges(segments: Tensor, real: Tensor | None, size: int, used: int) -> tuple[Tensor, Tensor]:
    # int32 halves the kernels' registers; clamping keeps order, so ranges that overlap still do
    segments = segments.long().clamp(1 - _FAR, _FAR - 1).to(torch.int32)
    low = segments if real is None else segments.where(real, _FAR)
    high = segments if real is None else segments.where(real, -_FAR)
    return grouped(low, size, used, _FAR).amin(-1).contiguous(), grouped(high, size, used, -_FAR).amax(-1).contiguous()
