"""Ops over a text that is divided among the processes of the default group, from operands that every process can make."""

from __future__ import annotations

import dataclasses
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import sparsify.backends  # noqa: F401  (registers kernels)
from sparsify.backends import divided_lists
from sparsify.distributed import exchange, sequence
from sparsify.distributed.sequence import Division
from sparsify.distributed.shards import Shard
from sparsify.ops import streaming
from sparsify.ops.attention import AttentionCall
from sparsify.ops.pattern_attention import PatternAttentionCall
from sparsify.ops.sparse_attention import SparseAttentionCall

HEAD_DIM = 16


def shard() -> Shard:
    group = torch.distributed.group.WORLD
    return Shard(torch.distributed.get_rank(), torch.distributed.get_world_size(), group.group_name)


def operands(
    tokens: int, heads: int, kv_heads: int, padding: tuple[int, ...], seed: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Query, key, value of a text with as many rows as `padding` says, and flags of its keys where a row begins with padding."""
    generator = torch.Generator().manual_seed(seed)
    batch = len(padding)
    query, key, value = (torch.randn(batch, n, tokens, HEAD_DIM, generator=generator) for n in (heads, kv_heads, kv_heads))
    # a slow drift of the keys and a few loud ones, so that blocks differ
    key[:, :, :: max(1, tokens // 7)] *= 3
    flags = (torch.arange(tokens) >= torch.tensor(padding)[:, None]).to(torch.uint8) if any(padding) else None
    return query, key, value, flags


def with_sinks(flags: Tensor | None, sinks: int) -> Tensor | None:
    """The flags as a graph over this text alone makes them."""
    if flags is None or not sinks:
        return flags
    return flags + 2 * ((flags != 0) & (flags.cumsum(-1) <= sinks)).to(flags.dtype)


def call_of(case: dict[str, Any], division: Division | None = None) -> AttentionCall | SparseAttentionCall | PatternAttentionCall:
    """The call of a case, of one process or of a part of the text.

    case: kind, tokens, heads, kv_heads, padding, `widest` for `widest_row`, and options of the call.
    """
    options = {name: value for name, value in case.items() if name != "widest"}
    kind = {"attention": AttentionCall, "sparse": SparseAttentionCall, "pattern": PatternAttentionCall}[options.pop("kind")]
    query, key, value, flags = operands(*(options.pop(name) for name in ("tokens", "heads", "kv_heads", "padding")))
    own = (lambda tensor, dim: tensor) if division is None else division.own
    flags = None if flags is None else with_sinks(own(flags, 1), options.get("sinks", 0))
    operand: dict[str, Any] = {"key_flags": flags, "scale": HEAD_DIM**-0.5}
    if kind is not PatternAttentionCall:
        operand["causal"] = True
    if division is not None:
        operand["sequence"] = division.shard.group
    return kind(own(query, 2), own(key, 2), own(value, 2), **operand, **options)


def widest_row(case: dict[str, Any]) -> Any:
    """A context in which rows of more blocks than the case says have one stage of two."""
    return mock.patch.object(streaming, "WIDEST_ROW", case.get("widest", streaming.WIDEST_ROW))


def parts(
    cases: list[dict[str, Any]], limit: int | None = None, travels: str | None = None, least: int | None = None
) -> list[tuple[Any, ...]]:
    """For each case this process's tokens, output and LSE, and the bytes that it sent, by what they were."""
    given = {name: value for name, value in (("limit", limit), ("travels", travels), ("least", least)) if value is not None}
    found = []
    for case in cases:
        division = Division.of(case["tokens"], shard())
        with sequence.dividing(division), widest_row(case):
            call = call_of(case, division)
            serve = divided_lists.pattern_attention if case["kind"] == "pattern" else divided_lists.sparse_attention
            output, lse = serve(call, **given) if given else call.run()
        found.append((division.spans(), output, lse, division.sent))
    return found


def fetch(tokens: int, block: int, wanted: list[list[tuple[int, int, int]]], batch: int, heads: int) -> tuple[list[Tensor], dict[str, int]]:
    """`exchange.fetched` of a text whose token t of row b and head h is b, h, t; wanted: by process row, head and block."""
    division = Division.of(tokens, shard())
    marks = torch.stack(torch.meshgrid(torch.arange(batch), torch.arange(heads), torch.arange(tokens), indexing="ij"), -1).float()
    needs = torch.zeros(division.shard.size, batch, heads, division.blocks(block), dtype=torch.bool)
    for rank, blocks in enumerate(wanted):
        for row, head, at in blocks:
            needs[rank, row, head, at] = True
    found = exchange.fetched(division, [division.own(marks, 2)], needs, block, "blocks")
    return found, division.sent


def passed_around(tokens: int) -> list[tuple[int, list[float]]]:
    """`exchange.ring` of the tokens' numbers: the processes in the order in which they came, and what came."""
    division = Division.of(tokens, shard())
    own = division.positions("cpu").float()
    return [(rank, part.tolist()) for rank, (part,) in exchange.ring(division, [own], 0, "numbers")]


def whole_of(tokens: int) -> Tensor:
    """`exchange.gathered` of the tokens' numbers."""
    division = Division.of(tokens, shard())
    return exchange.gathered(division, division.positions("cpu")[None].float(), 1, "numbers")


def replaced(call: Any, **fields: Any) -> Any:
    return dataclasses.replace(call, **fields)


def densities(cases: list[dict[str, Any]]) -> list[tuple[list[float], list[tuple[int, int]]]]:
    """For each case what `record_density` collects over this process's rows, and its tokens."""
    from sparsify.api import record_density

    found = []
    for case in cases:
        division = Division.of(case["tokens"], shard())
        with sequence.dividing(division), record_density() as collected:
            call_of(case, division).run()
        found.append((collected, division.spans()))
    return found
