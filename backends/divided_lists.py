"""Attention along block lists over a text that is divided among processes: lists from what a method gathers of all keys, then either the
keys that are visited travel, or the queries that visit some.

KV heads are served a few after the others. While some are selected and attended, the blocks that the next ones visit travel; only those of
the first are waited for.

Where queries travel, each process attends to its own keys for all processes' rows, and the parts are merged by their LSE where the rows
are (as `sparsify.backends.divided` merges those of a ring). Which of both is decided by what the processes say of their lists, so that
all decide alike.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from sparsify.backends import divided_estimate, parts_of_text, registration
from sparsify.backends.divided_estimate import Estimated
from sparsify.backends.divided_pattern import Patterned
from sparsify.backends.parts_of_text import Merged
from sparsify.costs import links
from sparsify.costs.links import Travelling
from sparsify.distributed import exchange, sequence
from sparsify.distributed.exchange import Asked, Blocks, OnHost
from sparsify.distributed.sequence import Division
from sparsify.errors import UnsupportedError
from sparsify.ops import block_lists, scratch, selection
from sparsify.ops.attention import AttentionCall
from sparsify.ops.limits import cdiv
from sparsify.ops.pattern_attention import PatternAttentionCall
from sparsify.ops.patterns import SelectPatternCall
from sparsify.ops.scratch import Part
from sparsify.ops.selection import SelectCall
from sparsify.ops.sparse_attention import SparseAttentionCall

# query blocks of a group's heads that fill a device while the next group's blocks travel
_LEAST_QUERY_BLOCKS = 2048


class Finder(Protocol):
    """Block lists of some heads of a call: what is gathered for them, then the lists of rows."""

    def gather(self) -> None:
        """What they are made from begins to travel."""
        ...

    def lists(self, rows: slice, end: int) -> tuple[SelectCall | SelectPatternCall, Tensor, Tensor]:
        """Of some of this process's rows, which see the keys before `end`: what makes lists, counts and indices."""
        ...

    def drop(self) -> None:
        """No more lists are asked for: gives memory back."""
        ...


ListedCall = SparseAttentionCall | PatternAttentionCall


def sparse_attention(
    call: SparseAttentionCall, *, limit: int = scratch.LIST_BYTES, travels: Travelling | None = None, least: int = _LEAST_QUERY_BLOCKS
) -> tuple[Tensor, Tensor]:
    """`sparsify::sparse_attention` of a call whose operands are this process's part of a divided text.

    Args:
        limit: bytes of block lists at a time, for tests.
        travels: what does, instead of what is cheaper, for tests. The same in all processes.
        least: query blocks of a group of heads, for tests.
    """
    division, flags = _text(call)
    mean = divided_estimate.mean(division, call, flags) if call.estimate.int8 else None
    call = dataclasses.replace(call, sequence="", key_mean=mean)
    return _attention(division, call, flags, Estimated, limit, travels, least)


def pattern_attention(
    call: PatternAttentionCall, *, limit: int = scratch.LIST_BYTES, travels: Travelling | None = None, least: int = _LEAST_QUERY_BLOCKS
) -> tuple[Tensor, Tensor]:
    """`sparsify::pattern_attention` likewise. limit, travels, least: as of `sparse_attention`."""
    if call.by_block:
        raise UnsupportedError("blocks that queries choose of a divided text", where=f"sparsify::{call.NAME}", hint="columns and diagonals")
    division, flags = _text(call)
    return _attention(division, dataclasses.replace(call, sequence=""), flags, Patterned, limit, travels, least)


def _text(call: ListedCall) -> tuple[Division, Tensor | None]:
    """How a call's text is divided, and the flags of all of its keys. Raises UnsupportedError for what is not served."""
    parts_of_text.refuse(call)
    division = sequence.current(call.sequence, call.query.shape[2])
    if not division.aligned:
        what = f"{division.tokens} tokens among {division.shard.size} processes are too few for blocks"
        raise UnsupportedError(what, where=f"sparsify::{call.NAME}", hint="exact methods serve prompts as short")
    return division, parts_of_text.all_flags(division, call)


def _attention(
    division: Division,
    call: ListedCall,
    flags: Tensor | None,
    find: Callable[[Division, Any, Tensor | None], Finder],
    limit: int,
    travels: Travelling | None,
    least: int,
) -> tuple[Tensor, Tensor]:
    output, lse = call.empty_outputs()
    groups: list[_Group] = []
    for part in _parts(division, call, limit, least):
        rows, heads = slice(*part.batch), slice(*part.heads)
        known, some = flags if flags is None or flags.shape[0] == 1 else flags[rows], call.part(part)
        groups.append(_Group(division, some, known, find(division, some, known), output[rows, heads], lse[rows, heads], travels))
    chunks = len(division.spans())
    for number, group in enumerate(groups):
        group.first, group.pieces = number * chunks, len(groups) * chunks
    _in_turns(groups)
    return output, lse


def _parts(division: Division, call: ListedCall, limit: int, least: int) -> list[Part]:
    """Groups of heads, in sizes that all processes have in common: as many as memory asks for, and more where each still fills a device."""
    each = scratch.list_bytes(division.chunk * 2, division.tokens, call.block_size)
    blocks = call.batch * call.heads * cdiv(division.chunk * 2, call.block_size)
    wanted = max(1, min(links.MOST_GROUPS, call.kv_heads, blocks // least))
    limit = min(limit, cdiv(call.kv_heads, wanted) * call.group * each) if wanted > 1 and call.batch == 1 else limit
    return list(scratch.parts(call.batch, call.heads, call.kv_heads, each, limit, False))


def _in_turns(groups: list[_Group]) -> None:
    """Every group's steps, so that what a group asked for travels while the group before it attends and the one after it selects.

    The host waits for a group's lists only when the device has attention to do meanwhile.
    """
    groups[0].gather()
    for number, group in enumerate(groups):
        if number + 1 < len(groups):
            groups[number + 1].gather()
        group.select()
        if number:
            groups[number - 1].attend()
        group.send()
    groups[-1].attend()


class _Group:
    """Some heads of a call, which are selected, exchanged and attended together."""

    def __init__(
        self,
        division: Division,
        call: ListedCall,
        flags: Tensor | None,
        finder: Finder,
        output: Tensor,
        lse: Tensor,
        travels: Travelling | None,
    ):
        self.division, self.call, self.flags, self.finder, self.output, self.lse = division, call, flags, finder, output, lse
        # windows are said by position, which rows that travel do not have
        self.travels: Travelling | None = "keys" if any(call.windows) else travels
        self.lists: list[tuple[slice, int, Tensor, Tensor]] = []
        self.first, self.pieces = 0, 1  # its selections among those of the call, for observers
        self._asked: Asked | None = None

    def gather(self) -> None:
        """What lists are made from begins to travel."""
        self.finder.gather()

    def select(self) -> None:
        """Block lists of this process's rows, and what each process will need begins to travel."""
        division, call = self.division, self.call
        read = torch.zeros(call.batch, call.kv_heads, division.blocks(call.block_size), dtype=torch.bool, device=call.device)
        for rows, end in parts_of_text.chunks(division):
            chosen, counts, indices = self.finder.lists(rows, end)
            selection.observed(chosen, counts, indices, len(self.lists) + self.first, self.pieces)
            self.lists.append((rows, end, counts, indices))
            visited = block_lists.visited(counts, indices, chosen.key_blocks)
            read[:, :, : chosen.key_blocks] |= visited.unflatten(1, (call.kv_heads, -1)).any(2)
        self.finder.drop()
        self._blocks = Blocks(division, (call.key, call.value), call.block_size, "keys and values")
        self._read, self._needs = read, exchange.needed(division, read)
        self._asked = self._blocks.ask(self._needs)
        if self.travels is None:
            with exchange.beside(call.device, after=False):
                others = self._needs & ~exchange.owners(division, call.block_size, call.device)[:, None, None]
                self._visited = OnHost(others.flatten(1).sum(1))

    def send(self) -> None:
        """Keys and values travel, or queries, once the device knows what is visited."""
        assert self._asked is not None
        if self.travels is None:
            self.travels = self._cheaper(self._visited.read())
        if self.travels == "keys":
            self._asked.send()
        else:
            self._sending = _Queries(self.division, self.call, self.lists, self.flags)

    def _cheaper(self, visited: Sequence[int]) -> Travelling:
        """By how many blocks of others each process visits: the same numbers, and the same answer, in all processes."""
        call = self.call
        block = call.block_size * (call.key.shape[3] + call.value.shape[3]) * call.key.element_size()
        rows = sum(_rows_abroad(self.division, rank) for rank in range(self.division.shard.size))
        each = links.query_bytes(call.key.shape[3], call.value.shape[3], call.key.element_size())
        return links.travelling(sum(visited) * block, call.batch * call.heads * rows * each)

    def attend(self) -> None:
        """Attention of this process's rows, into the output."""
        assert self._asked is not None
        division, call = self.division, self.call
        if self.travels == "keys":
            self._asked.arrive()
        key, value = self._blocks.whole
        own = exchange.owners(division, call.block_size, call.device)[division.shard.rank]
        for rows, end, counts, indices in self.lists:
            if self.travels == "queries":
                counts, indices = _among(counts, indices, own[: cdiv(end, call.block_size)])
            part = dataclasses.replace(
                call.attention(counts, indices),
                query=call.query[:, :, rows],
                key=key[:, :, :end],
                value=value[:, :, :end],
                key_flags=None if self.flags is None else self.flags[:, :end],
            )
            parts_of_text.attend_into(part, self.output, self.lse, rows)
        if self.travels == "queries":
            self._sending.merge(self.output, self.lse)
        self.lists.clear()
        del self._blocks, self._asked  # their memory serves the next group


def _among(counts: Tensor, indices: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """Block lists of the listed blocks that are among `columns`, bool [key_blocks]."""
    return block_lists.from_dense(block_lists.to_dense(counts, indices, len(columns)) & columns)


def _rows_abroad(division: Division, rank: int) -> int:
    """How many rows a process sends where queries travel: of each chunk to everyone who has an earlier one."""
    return sum((last - first) * len(_before(division, rank, first)) for first, last in division.spans(rank))


def _before(division: Division, rank: int, first: int) -> list[int]:
    """The other processes with a chunk before the token `first`."""
    others = (other for other in range(division.shard.size) if other != rank)
    return [other for other in others if division.spans(other) and division.spans(other)[0][0] < first]


class _Queries:
    """This process's queries under way to the keys that they visit, and others' rows that are attended here meanwhile."""

    def __init__(self, division: Division, call: ListedCall, lists: list[tuple[slice, int, Tensor, Tensor]], flags: Tensor | None):
        self.division, self.call, self.flags = division, call, flags
        size, me = division.shard.size, division.shard.rank
        owners = exchange.owners(division, call.block_size, call.device)
        queries: list[list[Tensor]] = [[] for _ in range(size)]
        tables: list[list[Tensor]] = [[] for _ in range(size)]
        self.away: list[list[slice]] = [[] for _ in range(size)]  # by process the rows that go there
        for (rows, end, counts, indices), (first, _) in zip(lists, division.spans(), strict=True):
            table = block_lists.to_dense(counts, indices, cdiv(end, call.block_size))
            for rank in _before(division, me, first):
                columns = owners[rank].nonzero()[:, 0]
                seen = torch.nn.functional.pad(table, (0, owners.shape[1] - table.shape[-1]))[..., columns]
                queries[rank].append(call.query[:, :, rows].flatten())
                tables[rank].append(seen.to(torch.uint8).flatten())
                self.away[rank].append(rows)
        # what comes: by process its chunks that see some of this one's, rows of each
        self.here = [
            [last - first for first, last in division.spans(rank) if rank != me and me in _before(division, rank, first)]
            for rank in range(size)
        ]
        blocks = int(owners[me].sum())
        per_row, per_block = call.batch * call.heads * call.query.shape[3], call.batch * call.heads * blocks
        joined = lambda parts, like: [torch.cat(one) if one else like.new_empty(0) for one in parts]
        self._queries = exchange.swapped(
            division, joined(queries, call.query), [sum(one) * per_row for one in self.here], "queries and what they found"
        )
        some = call.query.new_empty(0, dtype=torch.uint8)
        self._tables = exchange.swapped(
            division,
            joined(tables, some),
            [sum(cdiv(n, call.block_size) for n in one) * per_block for one in self.here],
            "which blocks",
        )
        self._blocks = blocks

    def merge(self, output: Tensor, lse: Tensor) -> None:
        """Attends for the others, and adds what they found for this process's rows."""
        call, division = self.call, self.division
        heads = (call.batch, call.heads)
        outputs, sums = [], []
        for queries, tables, sizes in zip(self._queries(), self._tables(), self.here, strict=True):
            found = [self._attended(*one) for one in self._split(queries, tables, sizes)]
            outputs.append(torch.cat([one.flatten() for one, _ in found]) if found else output.new_empty(0))
            sums.append(torch.cat([one.flatten() for _, one in found]) if found else lse.new_empty(0))
        rows = [sum(one.stop - one.start for one in away) * call.batch * call.heads for away in self.away]
        width = call.value.shape[3]
        came = exchange.swapped(division, outputs, [n * width for n in rows], "queries and what they found")
        came_sums = exchange.swapped(division, sums, rows, "queries and what they found")
        total = Merged(output, lse)
        for away, found, logs in zip(self.away, came(), came_sums(), strict=True):
            at = 0
            for one in away:
                count = one.stop - one.start
                begin, end = at * call.batch * call.heads, (at + count) * call.batch * call.heads
                part = found[begin * width : end * width].view(*heads, count, width)
                total.add(one, part, logs[begin:end].view(*heads, count))
                at += count
        total.finish()

    def _split(self, queries: Tensor, tables: Tensor, sizes: list[int]) -> list[tuple[Tensor, Tensor]]:
        """A process's chunks: queries [batch, heads, rows, head_dim] and bool tables [batch, heads, query blocks, own blocks]."""
        call, found = self.call, []
        at, at_table = 0, 0
        for rows in sizes:
            blocks = cdiv(rows, call.block_size)
            count, places = call.batch * call.heads * rows * call.query.shape[3], call.batch * call.heads * blocks * self._blocks
            some = queries[at : at + count].view(call.batch, call.heads, rows, -1)
            table = tables[at_table : at_table + places].view(call.batch, call.heads, blocks, self._blocks)
            found.append((some, table != 0))
            at, at_table = at + count, at_table + places
        return found

    def _attended(self, query: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
        """Others' rows over this process's keys, of which they see all that are listed."""
        call = self.call
        counts, indices = block_lists.from_dense(table)
        part: AttentionCall = call.attention(counts, indices)
        flags = call.key_flags
        return registration.attend(dataclasses.replace(part, query=query, causal=False, key_flags=flags))
