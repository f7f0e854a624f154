"""Attention over a text that is divided among processes (`sparsify.distributed.sequence`): what one process would compute for its rows.

Plain causal attention goes around a ring: keys and values of one process after the other, each part merged with what is there by its
LSE while the next one travels. Where a window or block lists say which keys are read, those blocks alone travel, and attention is then
computed once. Block lists are made from the estimate's cells of all keys, which are gathered first.

The parts of a softmax over disjoint keys, output o and LSE l each, make up the whole: l = log(e^l1 + e^l2) and
o = e^(l1 - l) o1 + e^(l2 - l) o2.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from sparsify.backends import registration
from sparsify.distributed import exchange, sequence
from sparsify.distributed.sequence import Division
from sparsify.errors import UnsupportedError
from sparsify.ops import block_lists, scratch, selection
from sparsify.ops.attention import AttentionCall
from sparsify.ops.limits import cdiv
from sparsify.ops.selection import SelectCall
from sparsify.ops.sparse_attention import SparseAttentionCall


def attention(call: AttentionCall) -> tuple[Tensor, Tensor]:
    """`sparsify::attention` of a call whose operands are this process's part of a divided text."""
    refuse(call)
    division = sequence.current(call.sequence, call.query.shape[2])
    call = dataclasses.replace(call, sequence="")
    if call.windowed or call.key_flags is not None:
        return _with_windows(division, call)
    return _around_the_ring(division, call)


def refuse(call: AttentionCall | SparseAttentionCall) -> None:
    """Raises UnsupportedError for what is not served."""
    given = {
        "attention that is not causal": not call.causal,
        "queries that begin elsewhere than their keys": call.query_start is not None or call.query.shape[2] != call.key.shape[2],
        "packed documents": call.segments is not None,
        "rows without a key that hold something else than 0": call.empty_rows not in ("zero", "fused"),
    }
    if isinstance(call, AttentionCall):
        given["block lists of one process"] = call.listed
        given["a bias, or ALiBi"] = call.bias is not None or call.alibi_slopes is not None
    for what, holds in given.items():
        if holds:
            raise UnsupportedError(f"{what} over a text that is divided among processes", where=f"sparsify::{call.NAME}")


def _around_the_ring(division: Division, call: AttentionCall) -> tuple[Tensor, Tensor]:
    output, lse = call.empty_outputs()
    own, at = division.spans(), 0
    for first, last in own:  # keys of this process before a chunk's end are those up to it
        at += last - first
        rows = slice(at - (last - first), at)
        part = dataclasses.replace(call, query=call.query[:, :, rows], key=call.key[:, :, :at], value=call.value[:, :, :at])
        _attend_into(part, output, lse, rows)
    if division.shard.size == 1:
        return output, lse
    total = _Merged(output, lse)
    for rank, (key, value) in exchange.ring(division, (call.key, call.value), 2, "keys and values"):
        if rank == division.shard.rank:
            continue
        for rows, seen in _later(own, division.spans(rank)):
            free = dataclasses.replace(call, causal=False, sink_logits=None)
            part = dataclasses.replace(free, query=call.query[:, :, rows], key=key[:, :, :seen], value=value[:, :, :seen])
            total.add(rows, *registration.attend(part))
    return total.finish()


def _later(rows: list[tuple[int, int]], keys: list[tuple[int, int]]) -> Iterator[tuple[slice, int]]:
    """Rows that see another process's first keys, and how many of these: chunks are before or after each other as a whole. Neighbouring
    rows that see as many are one."""
    found: list[tuple[int, int, int]] = []
    at = 0
    for first, last in rows:
        seen = sum(end - begin for begin, end in keys if begin < first)
        if seen and found and found[-1][1] == at and found[-1][2] == seen:
            found[-1] = found[-1][0], at + last - first, seen
        elif seen:
            found.append((at, at + last - first, seen))
        at += last - first
    for begin, end, seen in found:
        yield slice(begin, end), seen


def _attend_into(part: AttentionCall, output: Tensor, lse: Tensor, rows: slice) -> None:
    """Attention of some rows, written where they are in the whole output and LSE."""
    found = lse.new_empty(*part.query.shape[:3])  # kernels fill one without gaps
    registration.attend(part, into=(output[:, :, rows], found))
    lse[:, :, rows] = found


class _Merged:
    """Attention to some keys, to which attention to others is added, in fp32 until the end."""

    def __init__(self, output: Tensor, lse: Tensor):
        self.output, self.lse = output, lse
        self.sum: Tensor | None = None

    def add(self, rows: slice, output: Tensor, lse: Tensor) -> None:
        if self.sum is None:
            self.sum = self.output.float()
        before = self.lse[:, :, rows]
        after = torch.logaddexp(before, lse)
        whole = after.masked_fill(after == -torch.inf, 0)
        kept, added = (before - whole).exp_()[..., None], (lse - whole).exp_()[..., None]
        part = self.sum[:, :, rows]
        part.mul_(kept).addcmul_(output.float(), added)
        self.lse[:, :, rows] = after

    def finish(self) -> tuple[Tensor, Tensor]:
        if self.sum is not None:
            self.output.copy_(self.sum)
        return self.output, self.lse


def _with_windows(division: Division, call: AttentionCall) -> tuple[Tensor, Tensor]:
    """Of other processes' keys the sinks and those in a window travel; all of them for heads without one."""
    block = sequence.BLOCK if division.aligned else 1
    flags = _all_flags(division, call)
    needs = _in_windows(division, call, flags, block)
    key, value = exchange.fetched(division, (call.key, call.value), needs, block, "keys and values")
    output, lse = call.empty_outputs()
    for rows, end in _chunks(division):
        part = dataclasses.replace(
            call,
            query=call.query[:, :, rows],
            key=key[:, :, :end],
            value=value[:, :, :end],
            key_flags=None if flags is None else flags[:, :end],
        )
        _attend_into(part, output, lse, rows)
    return output, lse


def _chunks(division: Division) -> Iterator[tuple[slice, int]]:
    """This process's rows, a chunk after the other, and where the keys end that they see."""
    at = 0
    for first, last in division.spans():
        yield slice(at, at + last - first), last
        at += last - first


def _all_flags(division: Division, call: Any) -> Tensor | None:
    """The flags of all keys, sinks marked anew: by its own tokens a process does not know which of the text's are first."""
    if call.key_flags is None:
        return None
    flags = exchange.gathered(division, call.key_flags, 1, "padding") & 1
    if call.sinks:
        flags = flags + 2 * ((flags != 0) & (flags.cumsum(-1) <= call.sinks)).to(flags.dtype)
    return flags.contiguous()


def _in_windows(division: Division, call: AttentionCall, flags: Tensor | None, block: int) -> Tensor:
    """Which blocks each process's rows may see, bool [processes, batch, KV heads, blocks]."""
    batch, kv_heads, device = call.query.shape[0], call.key.shape[1], call.query.device
    blocks = division.blocks(block)
    windows = call.windows or (0,)
    by_head = (windows * call.query.shape[1] if len(windows) == 1 else windows)[: call.query.shape[1]]
    groups = [by_head[g * call.group : (g + 1) * call.group] for g in range(kv_heads)]
    widest = [0 if 0 in group else max(group) for group in groups]  # 0: all keys
    needs = torch.zeros(division.shard.size, batch, kv_heads, blocks, dtype=torch.bool)
    for rank in range(division.shard.size):
        for first, last in division.spans(rank):
            for g, window in enumerate(widest):
                begin = 0 if window == 0 else max(0, first + 1 - window)
                needs[rank, :, g, begin // block : cdiv(last, block)] = True
    if call.sinks and flags is None:
        needs[..., : cdiv(min(call.sinks, division.tokens), block)] = True
    if flags is None:
        return needs
    padded = torch.nn.functional.pad(flags, (0, -flags.shape[1] % block)).unflatten(1, (-1, block))
    sinks = (padded & 2 != 0).any(-1)[None, :, None]
    return (needs.to(device) | sinks) & (padded & 1 != 0).any(-1)[None, :, None]


def sparse_attention(call: SparseAttentionCall, *, limit: int = scratch.LIST_BYTES) -> tuple[Tensor, Tensor]:
    """`sparsify::sparse_attention` of a call whose operands are this process's part of a divided text.

    Args:
        limit: bytes of block lists at a time, for tests.
    """
    refuse(call)
    division = sequence.current(call.sequence, call.query.shape[2])
    if not division.aligned:
        what = f"{division.tokens} tokens among {division.shard.size} processes are too few for blocks"
        raise UnsupportedError(what, where="sparsify::sparse_attention", hint="exact methods serve prompts as short")
    call = dataclasses.replace(call, sequence="")
    flags = _all_flags(division, call)
    output, lse = call.empty_outputs()
    # sizes that all processes have in common, so that they make the same parts
    each = scratch.list_bytes(division.chunk * 2, division.tokens, call.block_size)
    for part in scratch.parts(call.batch, call.heads, call.kv_heads, each, limit, False):
        rows, heads = slice(*part.batch), slice(*part.heads)
        some = call.part(part)
        known = flags if flags is None or flags.shape[0] == 1 else flags[rows]
        _select_and_attend(division, some, known, output[rows, heads], lse[rows, heads])
    return output, lse


def _select_and_attend(division: Division, call: SparseAttentionCall, flags: Tensor | None, output: Tensor, lse: Tensor) -> None:
    cells = _cells(division, call)
    mean = _mean(cells, flags) if call.estimate.int8 else None
    lists: list[tuple[slice, int, Tensor, Tensor]] = []
    blocks = division.blocks(call.block_size)
    read = torch.zeros(call.batch, call.kv_heads, blocks, dtype=torch.bool, device=call.device)
    for rows, end in _chunks(division):
        chosen = dataclasses.replace(
            SelectCall(**call.common(SelectCall)),
            query=call.query[:, :, rows],
            key=cells[:, :, :end],
            key_flags=None if flags is None else flags[:, :end],
            key_mean=mean,
        )
        counts, indices = registration.select(chosen)
        for observer in selection.observers():
            observer(chosen, counts, indices)
        lists.append((rows, end, counts, indices))
        visited = block_lists.to_dense(counts, indices, chosen.key_blocks).any(2)
        read[:, :, : chosen.key_blocks] |= visited.unflatten(1, (call.kv_heads, -1)).any(2)
    del cells
    needs = _needs(division, read)
    key, value = exchange.fetched(division, (call.key, call.value), needs, call.block_size, "keys and values")
    for rows, end, counts, indices in lists:
        part = dataclasses.replace(
            call.attention(counts, indices),
            query=call.query[:, :, rows],
            key=key[:, :, :end],
            value=value[:, :, :end],
            key_flags=None if flags is None else flags[:, :end],
        )
        _attend_into(part, output, lse, rows)


def _mean(cells: Tensor, flags: Tensor | None) -> Tensor:
    """The mean of all keys that are not hidden, fp32 [batch, kv_heads, head_dim], from their cells; 0 where it is not finite."""
    if flags is None:
        return cells.sum(2, dtype=torch.float32).div_(cells.shape[2]).nan_to_num_(0.0, 0.0, 0.0)
    real = (flags & 1 != 0).expand(cells.shape[0], -1)
    total = cells.masked_fill(~real[:, None, :, None], 0).sum(2, dtype=torch.float32)
    return total.div_(real.sum(1).clamp(min=1)[:, None, None]).nan_to_num_(0.0, 0.0, 0.0)


def _needs(division: Division, read: Tensor) -> Tensor:
    """Which blocks each process reads, bool [processes, ...], from what this one does."""
    every = [torch.empty_like(read, dtype=torch.uint8) for _ in range(division.shard.size)]
    mine = read.to(torch.uint8)
    division.note("which blocks", mine, division.shard.size - 1)
    torch.distributed.all_gather(every, mine, group=division.group)
    return torch.stack(every) != 0


def _cells(division: Division, call: SparseAttentionCall) -> Tensor:
    """What the estimate makes of all keys, as keys: means of neighbours travel where it multiplies those, and stand for each of them.

    Where keys are hidden, all keys travel: the mean of a hidden key and its neighbour is not one of two equal keys.
    """
    merge = call.estimate.merge
    if merge == 1 or call.key_flags is not None:
        return exchange.gathered(division, call.key, 2, "the estimate's cells")
    pieces, at = [], 0
    whole, rest = division.tokens // merge * merge, division.tokens % merge
    for first, last in division.spans():
        piece = call.key[:, :, at : at + min(last, whole) - first]
        pieces.append(piece.unflatten(2, (piece.shape[2] // merge, merge)).float().mean(3).to(piece.dtype))
        at += last - first
    means = dataclasses.replace(division, tokens=division.tokens // merge, chunk=division.chunk // merge, sent=division.sent)
    found = exchange.gathered(means, torch.cat(pieces, 2), 2, "the estimate's cells").repeat_interleave(merge, 2)
    if not rest:
        return found
    # the last tokens, fewer than are merged
    tail = call.key.new_zeros(*call.key.shape[:2], rest, call.key.shape[3])
    if division.spans() and division.spans()[-1][1] == division.tokens:
        tail = call.key[:, :, -rest:].contiguous()
    owner = next(rank for rank in range(division.shard.size) if any(last == division.tokens for _, last in division.spans(rank)))
    members = torch.distributed.get_process_group_ranks(division.group)
    torch.distributed.broadcast(tail, members[owner], group=division.group)
    return torch.cat((found, tail), 2)


def _serve(*args: Any, **options: Any) -> tuple[Tensor, Tensor]:
    call = AttentionCall.bind(*args, **options)
    call.check()
    return attention(call) if call.sequence else registration.attend(call)


registration.register("attention", _serve)
