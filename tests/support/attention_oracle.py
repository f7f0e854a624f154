"""The attention op, written once more so plainly that it is right by looking: fp64, one head, one row at a time."""

from __future__ import annotations

import math

import torch


def attention_exact(call):
    """Output and LSE of an `AttentionCall` in fp64."""
    query, key, value = call.query.double(), call.key.double(), call.value.double()
    windows, segments, slopes, bias = call.windows, call.segments, call.alibi_slopes, call.bias
    batch, heads, query_len, _dim = query.shape
    group, key_len = heads // key.shape[1], key.shape[2]
    start = key_len - query_len if call.query_start is None else int(call.query_start)
    output = torch.zeros(batch, heads, query_len, value.shape[-1], dtype=torch.float64)
    lse = torch.full((batch, heads, query_len), -torch.inf, dtype=torch.float64)

    def sees(b, h, q, k):
        if call.causal and k > q + start:
            return False
        flags = int(call.key_flags[b, k]) if call.key_flags is not None else None
        if not (flags is None or flags & 1):
            return False
        window = 0 if not windows else windows[h] if len(windows) > 1 else windows[0]
        sink = k < call.sinks if flags is None else flags & 2
        if window > 0 and k <= q + start - window and not sink:
            return False
        if segments is not None and not (0 <= q + start < key_len and segments[b, k] == segments[b, q + start]):
            return False
        if call.block_counts is None:
            return True
        block = q // call.block_size
        listed = call.block_indices[b, h, block, : int(call.block_counts[b, h, block])]
        return k // call.block_size in listed.tolist()

    for b in range(batch):
        for h in range(heads):
            for q in range(query_len):
                keys = [k for k in range(key_len) if sees(b, h, q, k)]
                if not keys:
                    continue
                logits = key[b, h // group, keys] @ query[b, h, q] * call.scale
                if call.softcap > 0:
                    logits = call.softcap * torch.tanh(logits / call.softcap)
                if slopes is not None:
                    logits = logits + slopes[b, h].double() * torch.tensor(keys, dtype=torch.float64)
                if bias is not None:
                    logits = logits + bias[min(b, len(bias) - 1), min(h, bias.shape[1] - 1), min(q, bias.shape[2] - 1), keys].double()
                every = logits if call.sink_logits is None else torch.cat([logits, call.sink_logits[h : h + 1].double()])
                lse[b, h, q] = torch.logsumexp(every, 0)
                output[b, h, q] = torch.exp(logits - lse[b, h, q]) @ value[b, h // group, keys]
    return output, lse


def tolerance(dtype, call=None) -> float:
    """Bound on the absolute error of outputs that are averages of values around one.

    call: whose logits ALiBi makes as large as a slope times a distance, in fp32 known to 2^-23 of that in each of two ways to compute them.
    """
    farther = 0.0
    if call is not None and call.alibi_slopes is not None:
        farther = float(call.alibi_slopes.max()) * (call.query.shape[2] + call.key.shape[2]) * 2**-22
    return farther + {torch.float64: 1e-12, torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]


def default_scale(head_dim: int) -> float:
    return 1 / math.sqrt(head_dim)
