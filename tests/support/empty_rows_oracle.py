"""Calls of the attention op some of whose rows see no key, and what written-out attention gives for them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sparsify.ops.attention import AttentionCall

LOWEST = torch.finfo(torch.float32).min


@dataclass
class Call:
    """The op's call, and which keys its mask lets be seen."""

    op: AttentionCall
    seen: Tensor = field(repr=False)

    def to(self, device: str) -> Call:
        return Call(self.op.map_tensors(lambda x: x.to(device)), self.seen.to(device))

    def written_out(self) -> Tensor:
        """In float32, which is where scores are lost beside the lowest number."""
        op = self.op.in_dtype(torch.float32)
        x = op.query @ op.key.repeat_interleave(op.group, 1).mT * op.scale
        x = x if op.bias is None else x + op.bias.float()
        number = op.lowest if op.empty_rows == "mean" else -torch.inf
        if op.hidden_bias is not None or op.bias is None:
            x = x + torch.where(self.seen, 0.0, number)
        else:
            x = torch.where(self.seen, x, number)
        weights = x.softmax(-1) if op.empty_rows != "zero" else x.softmax(-1).nan_to_num(0.0)
        return weights @ op.value.repeat_interleave(op.group, 1)


def make(
    form: str, *, batch=2, heads=4, kv_heads=2, query_len=9, key_len=14, dim=16, dtype=torch.float32, causal=True, window=0, sinks=0,
    padding=True, documents=False, start=False, bias="", rows=False, seed=0,
) -> Call:  # fmt: skip
    """bias: "added" to hidden scores too, or replaced where the mask "fills"; it hides some keys by the lowest number, others by -inf.
    rows: each row has a bias of its own."""
    generator = torch.Generator().manual_seed(seed)
    random = lambda *shape: torch.randn(shape, generator=generator)
    tensors = random(batch, heads, query_len, dim), random(batch, kv_heads, key_len, dim), random(batch, kv_heads, key_len, dim)
    begin = -3 if start else key_len - query_len
    position, at = torch.arange(query_len)[:, None] + begin, torch.arange(key_len)[None]
    seen = torch.ones(batch, 1, query_len, key_len, dtype=torch.bool)
    options: dict[str, Any] = {"causal": causal, "windows": (window,) if window else (), "sinks": sinks}
    if causal:
        seen = seen & (at <= position)
    if window:
        seen = seen & ((at > position - window) | (at < sinks))
    if padding:
        first = torch.randint(2, key_len, (batch,), generator=generator)
        first[-1] = key_len if batch > 1 else first[-1]
        flags = (at >= first[:, None]) & (torch.rand(batch, key_len, generator=generator) > 0.3)
        options["key_flags"] = flags.to(torch.uint8) + 2 * (at < sinks).to(torch.uint8)
        seen = seen & flags[:, None, None]
    if documents:
        segments = (torch.rand(batch, key_len, generator=generator) > 0.6).cumsum(-1).to(torch.int32) % 3
        options["segments"] = segments
        inside = (position >= 0) & (position < key_len)
        own = segments[:, position[:, 0].clamp(0, key_len - 1)]
        seen = seen & (own[:, :, None] == segments[:, None])[:, None] & inside
    if start:
        options["query_start"] = torch.tensor(begin)
    if bias:
        shape = batch, heads, query_len if rows else 1, key_len
        drawn = torch.rand(shape, generator=generator)
        added = torch.where(drawn < 0.5, LOWEST, torch.where(drawn < 0.6, -torch.inf, random(*shape)))
        added[0, 0] = LOWEST
        added[0, 1] = -torch.inf
        options["bias"] = added
        options["hidden_bias"] = added if bias == "added" else None
    if form == "mean":
        options["lowest"] = LOWEST
    op = AttentionCall(*(x.to(dtype) for x in tensors), scale=0.4, seq_major=True, empty_rows=form, **options)
    return Call(op, seen.expand(batch, heads, -1, -1))


CALLS = {
    "padding": {},
    "one query": {"query_len": 1},
    "head dim 24, one head": {"dim": 24, "heads": 2, "kv_heads": 2},
    "window": {"window": 3},
    "not causal": {"causal": False},
    "documents": {"documents": True, "query_len": 14},
    "documents, not causal": {"documents": True, "causal": False},
    "before the first key": {"start": True, "padding": False},
    "bfloat16": {"dtype": torch.bfloat16},
    "float16": {"dtype": torch.float16},
}
BIASED = {
    "added bias": {"bias": "added"},
    "filled bias": {"bias": "filled"},
    "bias without padding": {"bias": "added", "padding": False},
    "bias, window and documents": {"bias": "filled", "window": 5, "documents": True, "start": True},
    "bias, window, sinks": {"bias": "added", "window": 2, "sinks": 2, "causal": False},
    "added bias per row": {"bias": "added", "rows": True},
    "filled bias per row, window": {"bias": "filled", "rows": True, "window": 5, "start": True},
    "bias, bfloat16": {"bias": "added", "dtype": torch.bfloat16, "dim": 24},
}
