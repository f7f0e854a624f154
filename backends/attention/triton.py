"""Runs `sparsify::attention` by a kernel that is generated for the call."""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from sparsify.backends.attention.triton_source import (
    AttentionSpec,
    AttentionTiling,
    arguments,
    attention_source,
    bounded,
    choose_tiling,
    join_arguments,
    programs,
)
from sparsify.backends.cache.kernels import partial_sums
from sparsify.backends.codegen import source
from sparsify.backends.codegen.launch import (
    DTYPES,
    LOG2E,
    LONGEST_WINDOW,
    batch_stride,
    capability,
    choose_splits,
    launch,
    launching,
    on_device,
    power_of_two,
    processors,
    stride_values,
)  # fmt: skip
from sparsify.errors import UnsupportedError
from sparsify.ops.attention import AttentionCall
from sparsify.ops.limits import cdiv
from sparsify.releases import triton_release

_WHERE = "sparsify::attention"
# a call with at most this many (query, head of a group) rows shares one tile among the heads of a group
_PACKED_QUERIES, _PACKED_ROWS = 16, 128
# fewer keys than this are not worth a second launch; tiles of so many keys are shared out
_LEAST_SPLIT_KEYS, _SPLIT_TILE = 1024, 64
# the op's arguments that the kernel knows; a call with another one is not served
_SERVES = {
    "key_flags", "segments", "query_start", "block_counts", "block_indices", "sink_logits", "alibi_slopes", "key_bias", "windows", "sinks",
    "softcap", "block_size",
}  # fmt: skip


def triton_attention(
    call: AttentionCall, *, tiling: AttentionTiling | None = None, splits: int | None = None, into: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """The op by a generated kernel.

    Args:
        tiling: instead of the table's choice, for tests and tuning.
        splits: parts of the keys that programs of their own compute, for calls with few queries; None: as many as fill the device.
        into: output and LSE to fill instead of new ones; the LSE contiguous.

    Raises:
        UnsupportedError: no kernel takes this call.
        KernelError: the kernel could not be compiled or launched.
    """
    query, key = call.query, call.key
    output, lse = into or call.empty_outputs()
    if output.numel() == 0 or key.shape[2] == 0:
        return output.zero_(), lse.fill_(-torch.inf)
    splits = _splits(call) if splits is None else splits
    spec = _spec(call, tiling, splits > 1)
    values = _values(spec, call, output, lse)
    rows, group_rows = query.shape[0] * key.shape[1], query.shape[2] * spec.group
    if spec.split_keys:
        values |= partial_sums(rows * group_rows * splits, call.value.shape[-1], query.device)
        values |= {"splits": splits, "SPLITS": max(2, power_of_two(splits))}
    grid = (programs(spec, query.shape[0], key.shape[1], query.shape[2]) * splits,)
    with launching(query.device, lambda: f"attention kernel ({spec.describe()}; {spec.tiling})"):
        module = _module(spec)
        kernel = module.split if spec.split_keys else module.attention
        launch(kernel, grid, arguments(spec), values, num_warps=spec.tiling.warps, num_stages=spec.tiling.stages)
        if spec.split_keys:
            launch(module.join, (group_rows, rows), join_arguments(spec), values, num_warps=4)
    return output, lse


def _packed(call: AttentionCall) -> bool:
    """Whether a call has so few queries that the heads of a group share a tile."""
    query_len = call.query.shape[2]
    return not call.listed and query_len <= _PACKED_QUERIES and query_len * call.group <= _PACKED_ROWS


def _splits(call: AttentionCall) -> int:
    """Parts of the keys that fill the device once, from shapes alone, so that a CUDA graph serves whatever length is read on the device."""
    batch, kv_heads, key_len, _ = call.key.shape
    if not _packed(call) or key_len < _LEAST_SPLIT_KEYS:
        return 1
    tiles, rows, at_once = cdiv(key_len, _SPLIT_TILE), batch * kv_heads, 2 * processors(call.query.device)
    # the join is compiled for a power of two: 33 would cost twice the registers, and a kernel more as a cache grows
    return choose_splits(tiles, rows, at_once, 32 if at_once // rows < 40 else 128)


def _spec(call: AttentionCall, tiling: AttentionTiling | None, split: bool = False) -> AttentionSpec:
    """The kernel that a call needs; clauses that change nothing for it are left out."""
    if others := call.beyond(_SERVES):
        raise UnsupportedError(f"no attention kernel takes {', '.join(others)}", where=_WHERE, hint="the reference does")
    query, (query_len, qk_head_dim), v_head_dim = call.query, call.query.shape[2:], call.value.shape[-1]
    device = query.device
    if query.dtype not in DTYPES or call.scale <= 0:
        raise UnsupportedError(f"no attention kernel takes {query.dtype} with scale {call.scale}", where=_WHERE, hint="the reference does")
    dtype = DTYPES[query.dtype]
    packed = _packed(call)
    flags, start = call.key_flags is not None, call.query_start is not None
    segments = call.segments is not None
    if tiling is None:
        blocks, rows = call.block_size * call.listed, query_len * call.group * packed
        tiling = _tiling(
            dtype, qk_head_dim, v_head_dim, capability(device), block_size=blocks, packed_rows=rows, segments=segments, split=split
        )
    window = "none" if not call.windowed else "one" if len(set(call.windows)) == 1 else "per_head"
    counted = "count" if call.sinks > 0 else "none"
    return AttentionSpec(
        dtype=dtype,
        qk_head_dim=qk_head_dim,
        v_head_dim=v_head_dim,
        group=call.group,
        tiling=tiling,
        # the last row sees every key when it stands on the last one
        causal=call.causal and (query_len > 1 or start),
        window=window,
        sinks="none" if not call.windowed else "flags" if flags else counted,
        key_flags=flags,
        segments=segments,
        has_start=start,
        block_lists=call.listed,
        block_size=call.block_size if call.listed else 0,
        softcap=call.softcap > 0,
        alibi=call.alibi_slopes is not None,
        key_bias=call.key_bias is not None,
        sink_logits=call.sink_logits is not None,
        packed=packed,
        split_keys=split,
        uniform=split and query_len == 1 and window != "per_head",
    )


_tiling = functools.cache(choose_tiling)


def _values(spec: AttentionSpec, call: AttentionCall, output: Tensor, lse: Tensor) -> dict[str, Any]:
    """Kernel arguments by name."""
    query, key, value = (tensor if tensor.stride(-1) == 1 else tensor.contiguous() for tensor in (call.query, call.key, call.value))
    values: dict[str, Any] = {"query": query, "key": key, "value": value, "out": output, "lse": lse}
    values |= stride_values(query=(query, "bhm"), key=(key, "bhn"), value=(value, "bhn"), out=(output, "bhm"))
    values |= {"kv_heads": key.shape[1], "query_len": query.shape[2], "key_len": key.shape[2], "scale": call.scale * LOG2E}
    if spec.softcap:
        values |= {"tanh_scale": 2 * LOG2E * call.scale / call.softcap, "cap_log2": call.softcap * LOG2E}
    if call.query_start is not None:
        values["query_start"] = call.query_start.to(query.device, torch.int64)
    if spec.window != "none":
        windows = tuple(min(window, LONGEST_WINDOW) for window in call.windows)
        values |= {"window": windows[0], "sinks": call.sinks}
        if spec.window == "per_head":
            values["windows"] = on_device(windows, query.device)
    if call.key_flags is not None:
        flags = call.key_flags.to(torch.uint8).contiguous()
        values |= {"key_flags": flags, "flags_b": batch_stride(flags)}
        values |= {"flag_bounds": _flag_bounds(flags, query.shape[0])} if bounded(spec) else {}
    if call.segments is not None:
        segments = call.segments.to(torch.int32).contiguous()
        values |= {"segments": segments, "segments_b": batch_stride(segments)}
    if call.block_counts is not None and call.block_indices is not None:
        lists = query.shape[:2]
        counts = call.block_counts.to(torch.int32).expand(*lists, -1).contiguous()
        indices = call.block_indices.to(torch.int16).expand(*lists, -1, -1).contiguous()
        values |= {"block_counts": counts, "block_indices": indices, "list_len": indices.shape[-1]}
    if call.alibi_slopes is not None:
        slopes = call.alibi_slopes.to(torch.float32).contiguous()
        values |= {"alibi_slopes": slopes, "alibi_b": batch_stride(slopes)}
    if call.key_bias is not None:
        bias = call.key_bias.to(torch.float32).contiguous()
        values |= {"key_bias": bias, "bias_b": batch_stride(bias), "bias_h": 0 if bias.shape[1] == 1 else bias.stride(1)}
    if call.sink_logits is not None:
        values["sink_logits"] = call.sink_logits.to(torch.float32).contiguous()
    return values


def _flag_bounds(flags: Tensor, batch: int) -> Tensor:
    """int32 [batch, 4]: first real key, one past the last, first sink, one past the last; empty ranges are (key_len, 0)."""
    key = torch.arange(flags.shape[1], dtype=torch.int32, device=flags.device)
    bounds = []
    for bits in (1, 3):
        present = flags & bits == bits
        bounds += [torch.where(present, key, flags.shape[1]).amin(-1), torch.where(present, key + 1, 0).amax(-1)]
    return torch.stack(bounds, -1).to(torch.int32).expand(batch, 4).contiguous()


@functools.lru_cache(maxsize=1024)
def _module(spec: AttentionSpec) -> ModuleType:
    return source.load(attention_source(spec, triton_release()), "attention")
