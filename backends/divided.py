"""Attention over a text that is divided among processes (`sparsify.distributed.sequence`): what one process would compute for its rows.

Plain causal attention goes around a ring: keys and values of one process after the other, each part merged with what is there by its
LSE while the next one travels. Where a window says which keys are read, those blocks alone travel, and attention is then computed once.
`sparsify.backends.divided_lists` has attention along block lists.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from sparsify.backends import parts_of_text, registration
from sparsify.backends.parts_of_text import Merged
from sparsify.distributed import exchange, sequence
from sparsify.distributed.sequence import Division
from sparsify.ops.attention import AttentionCall
from sparsify.ops.limits import cdiv


def attention(call: AttentionCall) -> tuple[Tensor, Tensor]:
    """`sparsify::attention` of a call whose operands are this process's part of a divided text."""
    parts_of_text.refuse(call)
    division = sequence.current(call.sequence, call.query.shape[2])
    call = dataclasses.replace(call, sequence="")
    if call.windowed or call.key_flags is not None:
        return _with_windows(division, call)
    return _around_the_ring(division, call)


def _around_the_ring(division: Division, call: AttentionCall) -> tuple[Tensor, Tensor]:
    output, lse = call.empty_outputs()
    total = Merged(output, lse)
    # the next process's part is on its way while one is attended: this one's own first
    for rank, (key, value) in exchange.ring(division, (call.key, call.value), 2, "keys and values"):
        if rank == division.shard.rank:
            _attend_own(division, call, output, lse)
            continue
        for rows, seen in _later(division.spans(), division.spans(rank)):
            free = dataclasses.replace(call, causal=False, sink_logits=None)
            part = dataclasses.replace(free, query=call.query[:, :, rows], key=key[:, :, :seen], value=value[:, :, :seen])
            total.add(rows, *registration.attend(part))
    return total.finish()


def _attend_own(division: Division, call: AttentionCall, output: Tensor, lse: Tensor) -> None:
    """Attention of this process's rows to its own keys: those before a chunk's end are those up to it."""
    for rows, _ in parts_of_text.chunks(division):
        own = slice(0, rows.stop)
        part = dataclasses.replace(call, query=call.query[:, :, rows], key=call.key[:, :, own], value=call.value[:, :, own])
        parts_of_text.attend_into(part, output, lse, rows)


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


def _with_windows(division: Division, call: AttentionCall) -> tuple[Tensor, Tensor]:
    """Of other processes' keys the sinks and those in a window travel; all of them for heads without one."""
    block = sequence.BLOCK if division.aligned else 1
    flags = parts_of_text.all_flags(division, call)
    needs = _in_windows(division, call, flags, block)
    key, value = exchange.fetched(division, (call.key, call.value), needs, block, "keys and values")
    output, lse = call.empty_outputs()
    for rows, end in parts_of_text.chunks(division):
        part = dataclasses.replace(
            call,
            query=call.query[:, :, rows],
            key=key[:, :, :end],
            value=value[:, :, :end],
            key_flags=None if flags is None else flags[:, :end],
        )
        parts_of_text.attend_into(part, output, lse, rows)
    return output, lse


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


def _serve(*args: Any, **options: Any) -> tuple[Tensor, Tensor]:
    call = AttentionCall.bind(*args, **options)
    call.check()
    return attention(call) if call.sequence else registration.attend(call)


registration.register("attention", _serve)
