"""Attention as models write it: masks made in the graph, keys and values repeated over the group."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def operands(batch=2, heads=4, kv_heads=2, query_len=8, key_len=None, dim=16, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    key_len = key_len or query_len
    shapes = [(batch, heads, query_len, dim), (batch, kv_heads, key_len, dim), (batch, kv_heads, key_len, dim)]
    return tuple(torch.randn(shape, generator=generator).to(dtype) for shape in shapes)


def repeat(x, groups):
    batch, heads, length, dim = x.shape
    return x[:, :, None].expand(batch, heads, groups, length, dim).reshape(batch, heads * groups, length, dim)


def lowest(x: torch.Tensor) -> float:
    return torch.finfo(x.dtype).min


def scores(query, key):
    """Of attention that is written out, before any mask: [batch, heads, query_len, key_len]."""
    return query @ repeat(key, query.shape[1] // key.shape[1]).mT * 0.25


def attend(scores, value):
    return scores.softmax(-1, dtype=torch.float32).to(value.dtype) @ repeat(value, scores.shape[1] // value.shape[1])


def sdpa(query, key, value, mask):
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)


def causal(query, key, value):
    """A causal mask from two ranges, aligned bottom-right; keys and values repeated."""
    groups = query.shape[1] // key.shape[1]
    rows = torch.arange(query.shape[2]) + (key.shape[2] - query.shape[2])
    mask = torch.arange(key.shape[2])[None, :] <= rows[:, None]
    return F.scaled_dot_product_attention(query, repeat(key, groups), repeat(value, groups), attn_mask=mask[None, None])


def padded(query, key, value, attention_mask):
    """The same with a 2-D padding mask."""
    groups = query.shape[1] // key.shape[1]
    rows = torch.arange(query.shape[2]) + (key.shape[2] - query.shape[2])
    mask = (torch.arange(key.shape[2])[None, :] <= rows[:, None])[None, None] & attention_mask.to(torch.bool)[:, None, None, :]
    return F.scaled_dot_product_attention(query, repeat(key, groups), repeat(value, groups), attn_mask=mask)


def prefix(query, key, value):
    """Causal, but the first four keys are visible to everyone: no clause says that."""
    rows, keys = torch.arange(query.shape[2])[:, None], torch.arange(key.shape[2])[None]
    groups = query.shape[1] // key.shape[1]
    mask = (keys <= rows) | (keys < 4)
    return F.scaled_dot_product_attention(query, repeat(key, groups), repeat(value, groups), attn_mask=mask[None, None])


def full(query, key, value):
    groups = query.shape[1] // key.shape[1]
    return F.scaled_dot_product_attention(query, repeat(key, groups), repeat(value, groups))
