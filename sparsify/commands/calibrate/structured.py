"""Queries and keys with the structure that sparse attention lives on: what is chosen by thresholds is a share of the blocks."""

from __future__ import annotations

import torch
from torch import Tensor

SEGMENT = 64  # tokens that share a topic
RANK = 32  # dimensions that topics live in
CENTRES = 64  # clusters of topics
SPREAD = 2.45  # size of a topic's part of a query and of a key; two of them give logits with a standard deviation near 3
SINK_TOKENS, SINK_SIZE = 16, 11.0
LOCAL = 0.65  # how much of a segment's own key topic its queries look for


def structured(
    length: int,
    *,
    heads: int = 32,
    kv_heads: int = 8,
    dim: int = 128,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cuda",
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Query [1, heads, length, dim], key and value [1, kv_heads, length, dim].

    Each segment of tokens has a low-rank topic near one of a head's cluster centres, and topics stay for a few segments. Queries look for
    a topic of their own, partly shared within a GQA group, for the topic around them (local), and for the first tokens (sink). Keys carry
    a constant offset in every channel, which no softmax sees, and noise. Heads differ in sharpness.
    """
    generator = torch.Generator(device).manual_seed(seed)
    normal = lambda *shape: torch.randn(*shape, device=device, generator=generator)
    segments = -(-length // SEGMENT)
    group = heads // kv_heads
    query = torch.empty(1, heads, length, dim, dtype=dtype, device=device)
    key, value = (torch.empty(1, kv_heads, length, dim, dtype=dtype, device=device) for _ in range(2))
    by_token = lambda topics: topics.repeat_interleave(SEGMENT, 0)[:length]
    rank = min(RANK, dim - 1)
    for g in range(kv_heads):
        basis = torch.linalg.qr(normal(dim, rank + 1)).Q.T
        centres = normal(CENTRES, rank)
        cluster = torch.randint(CENTRES, (-(-segments // 4),), device=device, generator=generator).repeat_interleave(4)[:segments]
        topics = 0.8 * centres[cluster] + 0.6 * normal(segments, rank)
        keys = by_token(SPREAD * topics @ basis[:-1]) + normal(length, dim) + 2 * normal(dim)
        keys[:SINK_TOKENS] += SINK_SIZE * basis[-1]
        key[0, g], value[0, g] = keys.to(dtype), normal(length, dim).to(dtype)
        shared = normal(segments, rank)
        for i in range(group):
            wanted = 0.6 * shared + 0.4 * normal(segments, rank) + LOCAL * topics
            sharpness = SPREAD * (0.85 + 0.3 * i / max(1, group - 1))
            query[0, g * group + i] = (by_token(sharpness * wanted @ basis[:-1]) + normal(length, dim) + SINK_SIZE * basis[-1]).to(dtype)
    return query, key, value
