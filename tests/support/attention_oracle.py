"""The attention op, written once more so plainly that it is right by looking: fp64, one head, one row at a time."""

from __future__ import annotations

import math

import torch


def attention_exact(
    query,
    key,
    value,
    *,
    key_flags=None,
    segments=None,
    query_start=None,
    block_counts=None,
    block_indices=None,
    sink_logits=None,
    alibi_slopes=None,
    key_bias=None,
    scale,
    causal=True,
    windows=(),
    sinks=0,
    softcap=0.0,
    block_size=128,
    **_,
):
    """Output and LSE in fp64; arguments as `sparsify.ops.attention` defines them."""
    batch, heads, query_len, _dim = query.shape
    group, key_len = heads // key.shape[1], key.shape[2]
    start = key_len - query_len if query_start is None else int(query_start)
    query, key, value = query.double(), key.double(), value.double()
    output = torch.zeros(batch, heads, query_len, value.shape[-1], dtype=torch.float64)
    lse = torch.full((batch, heads, query_len), -torch.inf, dtype=torch.float64)

    def sees(b, h, q, k):
        if causal and k > q + start:
            return False
        flags = int(key_flags[b, k]) if key_flags is not None else None
        if not (flags is None or flags & 1):
            return False
        window = 0 if not windows else windows[h] if len(windows) > 1 else windows[0]
        sink = k < sinks if flags is None else flags & 2
        if window > 0 and k <= q + start - window and not sink:
            return False
        if segments is not None and not (0 <= q + start < key_len and segments[b, k] == segments[b, q + start]):
            return False
        if block_counts is None:
            return True
        listed = block_indices[b, h, q // block_size, : int(block_counts[b, h, q // block_size])]
        return k // block_size in listed.tolist()

    for b in range(batch):
        for h in range(heads):
            for q in range(query_len):
                keys = [k for k in range(key_len) if sees(b, h, q, k)]
                if not keys:
                    continue
                logits = key[b, h // group, keys] @ query[b, h, q] * scale
                if softcap > 0:
                    logits = softcap * torch.tanh(logits / softcap)
                if alibi_slopes is not None:
                    logits = logits + alibi_slopes[b, h].double() * torch.tensor(keys, dtype=torch.float64)
                if key_bias is not None:
                    logits = logits + key_bias[min(b, len(key_bias) - 1), min(h, key_bias.shape[1] - 1), keys].double()
                every = logits if sink_logits is None else torch.cat([logits, sink_logits[h : h + 1].double()])
                lse[b, h, q] = torch.logsumexp(every, 0)
                output[b, h, q] = torch.exp(logits - lse[b, h, q]) @ value[b, h // group, keys]
    return output, lse


def tolerance(dtype) -> float:
    """Bound on the absolute error of outputs that are averages of values around one."""
    return {torch.float64: 1e-12, torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]


def default_scale(head_dim: int) -> float:
    return 1 / math.sqrt(head_dim)
