"""`sparsify::attention` on CPUs, by a C++ kernel that visits listed blocks alone: every clause of the op, in fp32.

One text serves every call, since clauses are looked at where they cost nothing beside a tile's products: it is compiled once a machine.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparsify.backends.attention import cpp_text, one_row, reference
from sparsify.backends.codegen import cpp
from sparsify.backends.codegen.launch import need
from sparsify.ops.attention import AttentionCall
from sparsify.ops.limits import cdiv

_WHERE = "sparsify::attention"
_SERVED = (
    "key_flags", "segments", "query_start", "block_counts", "block_indices", "sink_logits", "alibi_slopes", "bias", "scale", "causal",
    "windows", "sinks", "softcap", "block_size",
)  # fmt: skip
# fewer scores, or fewer rows, the reference computes as fast
LEAST_SCORES, LEAST_ROWS = 1 << 20, 16


def attention(call: AttentionCall, *, into: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
    """The op by the kernel; small calls by the reference, one row over keys in one piece by `one_row`.

    Args:
        into: output and LSE to fill instead of new ones.

    Raises:
        UnsupportedError: the kernel does not take this call.
        KernelError: the kernel could not be compiled, or memory ran out.
    """
    (batch, heads, query_len, _), key_len = call.query.shape, call.key.shape[2]
    small = query_len < LEAST_ROWS or batch * heads * query_len * key_len < LEAST_SCORES
    if small or call.query.numel() == 0 or call.value.numel() == 0:
        return one_row.attention(call, into=into) or reference.attention(call, into=into)
    return launch(call, into=into)


def launch(call: AttentionCall, *, into: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
    """The op by the kernel whatever its size, but for empty operands; as `attention` otherwise."""
    need(not (beyond := call.beyond(_SERVED)), ", ".join(beyond), _WHERE)
    need(call.query.dtype in (torch.float32, torch.bfloat16, torch.float16), f"{call.query.dtype} operands", _WHERE)
    # hidden keys' values are multiplied by 0, which leaves what is not finite
    need(bool(call.value.isfinite().all()), "values that are not finite", _WHERE)
    output, lse = into or call.empty_outputs()
    direct = output.dtype == torch.float32 and output.stride(-1) == 1 and lse.stride(-1) == 1
    found, found_lse = (output, lse) if direct else (torch.empty(output.shape, dtype=torch.float32), torch.empty(lse.shape))
    cpp.call(cpp_text.TEXT, "sparsify_attention", cpp_text.FIELDS, _values(call, found, found_lse))
    if not direct:
        output.copy_(found)
        lse.copy_(found_lse)
    return output, lse


def _values(call: AttentionCall, output: Tensor, lse: Tensor) -> dict[str, Any]:
    """The struct's fields by name."""
    query, key, value = (_rows(x) for x in (call.query, call.key, call.value))
    (batch, heads, query_len, head_dim), (kv_heads, key_len) = query.shape, key.shape[1:3]
    values: dict[str, Any] = {"query": query, "key": key, "value": value, "output": output, "lse": lse}
    for name in ("query", "key", "value", "output"):
        values |= {f"{name}_{letter}": stride for letter, stride in zip("bhn", values[name].stride(), strict=False)}
    flags = None if call.key_flags is None else call.key_flags.to(torch.uint8).contiguous()
    segments = None if call.segments is None else call.segments.long().contiguous()
    slopes = None if call.alibi_slopes is None else call.alibi_slopes.float().contiguous()
    bias = None if call.bias is None else call.bias.float().contiguous()
    windows = call.windows if len(call.windows) == heads else call.windows * heads
    counts, indices = call.block_counts, call.block_indices
    by_row = lambda x: 0 if x is None or x.shape[0] == 1 else x.stride(0)
    return values | {
        "lse_b": lse.stride(0),
        "lse_h": lse.stride(1),
        "batch": batch,
        "heads": heads,
        "kv_heads": kv_heads,
        "query_len": query_len,
        "key_len": key_len,
        "head_dim": head_dim,
        "v_head_dim": value.shape[-1],
        "start": reference.Mask.from_call(call).start,
        "causal": call.causal,
        "sinks": call.sinks,
        "block_size": call.block_size,
        "query_blocks": cdiv(query_len, call.block_size),
        "listed": 0 if indices is None else indices.shape[-1],
        "threads": torch.get_num_threads(),
        "windows": torch.tensor(windows) if call.windowed else None,
        "flags": flags,
        "flags_b": by_row(flags),
        "segments": segments,
        "segments_b": by_row(segments),
        "counts": None if counts is None else counts.int().contiguous(),
        "indices": None if indices is None else indices.int().contiguous(),
        "sink_logits": None if call.sink_logits is None else call.sink_logits.float().contiguous(),
        "slopes": slopes,
        "slopes_b": by_row(slopes),
        "bias": bias,
        "bias_b": by_row(bias),
        "bias_h": 0 if bias is None or bias.shape[1] == 1 else bias.stride(1),
        "bias_n": 0 if bias is None or bias.shape[2] == 1 else bias.stride(2),
        "scale": call.scale,
        "softcap": call.softcap,
    }


def _rows(tensor: Tensor) -> Tensor:
    """fp32, rows in one piece."""
    tensor = tensor.float()
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()
