"""Writes rows that see no key on a GPU, by kernels that are generated for the call and do next to nothing where there is no such row.

Nothing is read back from the device, so that a CUDA graph can hold the call.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from sparsify.backends.attention.empty_rows import unseen
from sparsify.backends.attention.empty_rows_template import SUMS, WRITE
from sparsify.backends.codegen import source
from sparsify.backends.codegen.arguments import (
    Argument,
    check_head_dims,
    dot_precision,
    floats,
    integers,
    padded,
    parameters,
    pointers,
    present,
)
from sparsify.backends.codegen.launch import DTYPES, LONGEST_WINDOW, batch_stride, broadcast_stride, launch, launching, need, stride_values
from sparsify.backends.codegen.template import header, render
from sparsify.ops.attention import AttentionCall
from sparsify.ops.limits import cdiv

_WHERE = "sparsify::attention"
_ROWS, _MOST_SPLITS = 64, 64
_WARPS = 4


@dataclass(frozen=True)
class EmptyRowsSpec:
    """What decides the kernels' text. group: query heads per KV head.

    form: "nan", "mean", or "weighted" by a bias; the clauses below serve the last alone.
    """

    dtype: str
    head_dim: int
    group: int
    form: str
    causal: bool = False
    windowed: bool = False
    key_flags: bool = False
    segments: bool = False
    has_start: bool = False
    hidden: bool = False

    def __post_init__(self):
        check_head_dims(_WHERE, self.head_dim)

    @property
    def rows(self) -> int:
        """Of a tile of `write`."""
        return 16 if self.form == "weighted" else _ROWS

    @property
    def keys(self) -> int:
        """Of a tile of values."""
        return 32 if padded(self.head_dim) > 128 or self.dtype == "fp32" else 64


@functools.lru_cache(maxsize=512)
def arguments(spec: EmptyRowsSpec, kernel: str) -> tuple[Argument, ...]:
    """The arguments of "sums" or "write", in order."""
    values = [*pointers(spec.dtype, "value"), *integers("value_b", "value_h", "value_n", aligned=True)]
    parts = [*pointers("fp32", "parts"), *integers("splits")]
    if kernel == "sums":
        sizes = [*integers("kv_heads", "key_len"), *integers("split_len", aligned=True)]
        return (*values, *pointers("i8", "wanted"), *parts, *sizes)
    listed = [*pointers(spec.dtype, "out"), *integers("out_b", "out_h", "out_m", aligned=True), *pointers("i8", "empty")]
    listed += integers("heads", "query_len", "key_len")
    if spec.form == "nan":
        return tuple(listed)
    if spec.form == "mean":
        return (*listed, *parts)
    clauses = present(
        (spec.hidden, [*pointers("fp32", "hidden_bias"), *integers("hidden_b", "hidden_h", "hidden_m")]),
        (spec.has_start, pointers("i64", "query_start")),
        (spec.windowed, integers("window")),
        (spec.windowed and not spec.key_flags, integers("sinks")),
        (spec.key_flags, [*pointers("u8", "key_flags"), *integers("flags_b")]),
        (spec.segments, [*pointers("i32", "segments"), *integers("segments_b")]),
    )
    return (*listed, *values, *pointers("fp32", "bias"), *integers("bias_b", "bias_h", "bias_m"), *floats("lowest"), *clauses)


def empty_rows_source(spec: EmptyRowsSpec) -> str:
    """Module text with `write` (grid: row tiles, batch * query_heads) and, for "mean", `sums` (grid: splits, batch * kv_heads)."""
    dim = padded(spec.head_dim)
    kernels = ("sums", "write") if spec.form == "mean" else ("write",)
    values = vars(spec) | {
        "precision": dot_precision(spec.dtype),
        "guard": "" if dim == spec.head_dim else f" & (dims < {spec.head_dim})[None, :]",
        **{f"{kernel}_parameters": parameters(arguments(spec, kernel)) for kernel in kernels},
    }
    constants = {"GROUP": spec.group, "ROWS": spec.rows, "KEYS": spec.keys, "DIM": dim}
    texts = {"sums": SUMS, "write": WRITE}
    return "\n\n".join([header("Rows that see no key", constants), *(render(texts[kernel], values) for kernel in kernels)])


@functools.lru_cache(maxsize=256)
def _module(spec: EmptyRowsSpec) -> ModuleType:
    return source.load(empty_rows_source(spec), "empty_rows")


def fill(output: Tensor, lse: Tensor, call: AttentionCall) -> None:
    """`backends.attention.empty_rows.fill` by generated kernels.

    Raises:
        UnsupportedError: no kernel takes this call.
        KernelError: a kernel could not be compiled or launched.
    """
    query, value, empty_rows = call.query, call.value, call.empty_rows
    if empty_rows == "zero" or output.numel() == 0 or call.key.shape[2] == 0:
        return
    (batch, heads, query_len, head_dim), (kv_heads, key_len) = output.shape, value.shape[1:3]
    biased = call.bias is not None
    served = value.dtype in DTYPES and output.stride(-1) == 1 and not (biased and len({*call.windows}) > 1)
    need(served and empty_rows != "fused", f"{empty_rows} rows of {value.dtype} values, windows {call.windows[:4]}", _WHERE)
    spec = EmptyRowsSpec(DTYPES[value.dtype], head_dim, call.group, "weighted" if biased else empty_rows)
    empty = unseen(lse, call).contiguous()
    value = value if value.stride(-1) == 1 else value.contiguous()
    splits = min(_MOST_SPLITS, cdiv(key_len, 4 * spec.keys))
    given: dict[str, Any] = {
        "value": value, "out": output, "empty": empty.view(torch.int8), "heads": heads, "kv_heads": kv_heads, "query_len": query_len,
        "key_len": key_len, "splits": splits, "lowest": call.lowest if empty_rows == "mean" else -torch.inf,
        **stride_values(value=(value, "bhn"), out=(output, "bhm")),
    }  # fmt: skip
    if call.bias is not None:
        spec, more = _weighted(spec, call, call.bias)
        given |= more
    elif empty_rows == "mean":
        given["wanted"] = empty.view(batch * kv_heads, -1).any(-1).view(torch.int8)
        given["parts"] = torch.empty(batch * kv_heads, splits, padded(head_dim), dtype=torch.float32, device=value.device)
        given["split_len"] = cdiv(key_len, splits * spec.keys) * spec.keys
    with launching(query.device, lambda: f"rows without keys ({spec})"):
        module = _module(spec)
        if spec.form == "mean":
            launch(module.sums, (splits, batch * kv_heads), arguments(spec, "sums"), given, num_warps=_WARPS, num_stages=1)
        grid = (cdiv(query_len, spec.rows), batch * heads)
        launch(module.write, grid, arguments(spec, "write"), given, num_warps=_WARPS, num_stages=1)


def _weighted(spec: EmptyRowsSpec, call: AttentionCall, bias: Tensor) -> tuple[EmptyRowsSpec, dict[str, Any]]:
    """The spec with the call's clauses, and their values."""
    windows, flags, segments, start = call.windows, call.key_flags, call.segments, call.query_start
    found = replace(
        spec, causal=call.causal, windowed=call.windowed, key_flags=flags is not None, segments=segments is not None,
        has_start=start is not None, hidden=call.hidden_bias is not None,
    )  # fmt: skip
    steps = lambda name, tensor: {f"{name}_{axis}": broadcast_stride(tensor, dim) for dim, axis in enumerate("bhm")}
    bias = bias.float().contiguous()
    given: dict[str, Any] = {"bias": bias, **steps("bias", bias)}
    if call.hidden_bias is not None:
        hidden = call.hidden_bias.float().contiguous()
        given |= {"hidden_bias": hidden, **steps("hidden", hidden)}
    if start is not None:
        given["query_start"] = start.to(call.query.device, torch.int64)
    if call.windowed:
        given |= {"window": min(windows[0], LONGEST_WINDOW), "sinks": call.sinks}
    if flags is not None:
        flags = flags.to(torch.uint8).contiguous()
        given |= {"key_flags": flags, "flags_b": batch_stride(flags)}
    if segments is not None:
        segments = segments.to(torch.int32).contiguous()
        given |= {"segments": segments, "segments_b": batch_stride(segments)}
    return found, given
