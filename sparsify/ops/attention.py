"""The narrow waist: the custom ops that passes emit and backends lower. Schemas and fake kernels only; kernels register from
`sparsify.backends`.

One attention op carries everything that methods may combine on a site. For query row q of head h of batch row b, with
start = query_start (key_len - query_len when None), key k is visible when all of these hold:

    causal                k <= q + start
    windows[h] = w > 0    k > q + start - w, or k is a sink
    key_flags             bit 0 of key_flags[b, k] is set
    segments              segments[b, k] == segments[b, q + start]
    block lists           k // block_size is among block_indices[b, h, q // block_size, :block_counts[b, h, q // block_size]]

A sink is a key with bit 1 of key_flags set; without key_flags, a key k < sinks. `windows` is empty (none), one number for all
heads, or one per query head (0 = none for that head). A row without a visible key has LSE -inf and holds what `empty_rows` says:

    zero    0, as scaled_dot_product_attention gives it for a boolean mask
    nan     NaN, as the softmax of -inf alone
    mean    the average of all keys' values: `lowest`, the finite number that hides, swallows every score beside it

With "nan" or "mean" and key_bias, rows whose visible keys all have a bias that hides (LSE below SUNK) are among them: they hold the average
that is weighted by the softmax of key_bias over visible keys and of lowest + hidden_bias (-inf for "nan") over the others.

Rows that only block lists leave without a key hold 0 in any case.

    logit = softcap(scale · q·k) + alibi_slopes[b, h] · k + key_bias[b, h, k];  softcap(x) = c · tanh(x / c) when softcap = c > 0

A batch of 1 broadcasts in key_flags, segments, alibi_slopes, key_bias and hidden_bias, and one head in the last two.

`sink_logits[h]` joins the softmax's denominator (and the LSE) with no value.

`select_blocks` makes block lists for it. `sparse_attention` is both in one call, for lists that are too large to exist at once: it serves
some heads after the others (`sparsify.ops.scratch`), with the same results.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from sparsify.ops import gradients

# Inductor and AOTAutograd cache compiled graphs by op name and constants, not by kernel source: raise this when semantics change.
VERSION = 2

# a log of a sum of exponentials below this is made of numbers that hide, not of scores
SUNK = -1e30

NAMESPACE = "sparsify"
library = torch.library.Library(NAMESPACE, "DEF")

library.define(
    "attention(Tensor query, Tensor key, Tensor value, *, Tensor? key_flags=None, Tensor? segments=None, Tensor? query_start=None, "
    "Tensor? block_counts=None, Tensor? block_indices=None, Tensor? sink_logits=None, Tensor? alibi_slopes=None, "
    "Tensor? key_bias=None, Tensor? hidden_bias=None, float scale, bool causal, int[] windows, int sinks, float softcap, int block_size, "
    'bool seq_major, int version, str empty_rows="zero", float lowest=0.0) -> (Tensor, Tensor)',
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order),
)
library.define(
    "select_blocks(Tensor query, Tensor key, *, Tensor? key_flags=None, Tensor? segments=None, Tensor? query_start=None, "
    "float scale, bool causal, int[] windows, str pool, int stride, int block_size, float[] threshold, float density, "
    "int version) -> (Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order),
)
library.define(
    "sparse_attention(Tensor query, Tensor key, Tensor value, *, Tensor? key_flags=None, Tensor? segments=None, "
    "Tensor? query_start=None, float scale, bool causal, int[] windows, str pool, int stride, int block_size, float[] threshold, "
    'float density, bool seq_major, int version, str empty_rows="zero", float lowest=0.0) -> (Tensor, Tensor)',
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order),
)


def _attention_fake(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    key_flags: Tensor | None = None,
    segments: Tensor | None = None,
    query_start: Tensor | None = None,
    block_counts: Tensor | None = None,
    block_indices: Tensor | None = None,
    sink_logits: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    key_bias: Tensor | None = None,
    hidden_bias: Tensor | None = None,
    scale: float,
    causal: bool,
    windows: list[int],
    sinks: int,
    softcap: float,
    block_size: int,
    seq_major: bool,
    version: int,
    empty_rows: str = "zero",
    lowest: float = 0.0,
) -> tuple[Tensor, Tensor]:
    return empty_output(query, value, seq_major), query.new_empty(query.shape[:3], dtype=torch.float32)


def empty_output(query: Tensor, value: Tensor, seq_major: bool) -> Tensor:
    """[batch, query_heads, query_len, v_head_dim]; with seq_major the transpose of a contiguous [batch, query_len, heads, dim]."""
    batch, heads, query_len, _ = query.shape
    if seq_major:
        return query.new_empty(batch, query_len, heads, value.shape[-1]).transpose(1, 2)
    return query.new_empty(batch, heads, query_len, value.shape[-1])


def _select_blocks_fake(
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
) -> tuple[Tensor, Tensor]:
    return empty_block_lists(query, key, block_size)


def _sparse_attention_fake(query: Tensor, key: Tensor, value: Tensor, *, seq_major: bool, **options: Any) -> tuple[Tensor, Tensor]:
    return empty_output(query, value, seq_major), query.new_empty(query.shape[:3], dtype=torch.float32)


def empty_block_lists(query: Tensor, key: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """Counts int32 [batch, query_heads, query_blocks] and rising indices int16 [batch, query_heads, query_blocks, key_blocks].

    int16 holds 32767 blocks, 4 million keys at block 128, in half the memory of int32.
    """
    batch, heads, query_len, _ = query.shape
    query_blocks = (query_len + block_size - 1) // block_size
    key_blocks = (key.shape[2] + block_size - 1) // block_size
    counts = query.new_empty(batch, heads, query_blocks, dtype=torch.int32)
    return counts, query.new_empty(batch, heads, query_blocks, key_blocks, dtype=torch.int16)


def traced(op: str, fake: Callable[..., Any]) -> None:
    """Says how an op is traced. Tracing refuses what running does: derivatives, and transforms of torch.func."""

    def call(*args: Any, **options: Any) -> Any:
        gradients.refuse(op, args, options)
        return fake(*args, **options)

    torch.library.register_fake(f"{NAMESPACE}::{op}", call, lib=library)
    gradients.refuse_transforms(op, library)


traced("attention", _attention_fake)
traced("select_blocks", _select_blocks_fake)
traced("sparse_attention", _sparse_attention_fake)

attention = torch.ops.sparsify.attention.default
select_blocks = torch.ops.sparsify.select_blocks.default
sparse_attention = torch.ops.sparsify.sparse_attention.default

_observers: contextvars.ContextVar[tuple[Callable[..., None], ...]] = contextvars.ContextVar("sparsify_select_observers", default=())


@contextlib.contextmanager
def observing(observer: Callable[..., None]) -> Iterator[None]:
    """Calls `observer(query, key, counts, indices, **keywords of select_blocks)` after each block selection of this block and thread.

    Reading the block lists costs a device synchronisation, so nobody observes unless a tool asks.
    """
    token = _observers.set((*_observers.get(), observer))
    try:
        yield
    finally:
        _observers.reset(token)


def select_observers() -> tuple[Callable[..., None], ...]:
    """Who observes block selections here."""
    return _observers.get()


def observed_selection(select: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., tuple[Tensor, Tensor]]:
    """Wraps a kernel of `select_blocks` so that observers see what it chose."""

    @functools.wraps(select)
    def wrapped(query: Tensor, key: Tensor, **call: Any) -> tuple[Tensor, Tensor]:
        counts, indices = select(query, key, **call)
        for observer in select_observers():
            observer(query, key, counts, indices, **call)
        return counts, indices

    return wrapped
