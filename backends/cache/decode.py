"""Decode attention over an evicting cache by generated kernels: split-K over the slots (Flash-Decoding, Dao et al. 2023), then a join that
also stores the new token, by a kernel of its own or, where the cache brings tickets, by the last program of each KV head. Nothing is read
back to the host and the grid depends on shapes alone, so CUDA graphs can hold both.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from sparsify.backends.cache.decode_template import COMBINE, FINISH, SPLIT
from sparsify.backends.cache.kernels import (
    DTYPES,
    LOG2E,
    launch_in_turn,
    logit_arguments,
    logit_values,
    partial_sums,
    stride_values,
    turned_queries,
)
from sparsify.backends.codegen import source
from sparsify.backends.codegen.arguments import Argument, padded, parameters
from sparsify.backends.codegen.template import render
from sparsify.errors import UnsupportedError
from sparsify.ops import cache as cache_ops

_WHERE = "sparsify::cache_decode"
# Up to so many stretches the program that joins them holds all in registers, and a launch is saved; long caches feel neither.
_FUSED_STRETCHES = 32
# What so many slots hold is read in about the time that a load of their count takes.
_WHOLE_SLOTS = 8192


@dataclass(frozen=True)
class DecodeTiling:
    """keys: slots per tile. warps, stages: Triton's launch options. programs: thread blocks per multiprocessor that the split aims at."""

    keys: int
    warps: int
    stages: int
    programs: int = 2


@dataclass(frozen=True)
class DecodeSpec:
    """What decides the kernels' text. group: query heads per KV head. padded: tokens may be padding. turning: sinks stand directly before
    the window, so that they are seen by turned queries. grows: no slot is ever
    overwritten. fused: the last program of a KV head joins its stretches. whole: empty slots are
    read, too."""

    dtype: str
    qk_head_dim: int
    v_head_dim: int
    group: int
    tiling: DecodeTiling
    softcap: bool = False
    sink_logits: bool = False
    padded: bool = False
    turning: bool = False
    fused: bool = False
    whole: bool = False
    grows: bool = False

    def __post_init__(self):
        if not 0 < max(self.qk_head_dim, self.v_head_dim) <= 256:
            raise UnsupportedError(f"no decode kernel has head dims {self.qk_head_dim} and {self.v_head_dim}", where=_WHERE)
        if self.group > 128:
            raise UnsupportedError(f"no decode kernel has {self.group} query heads per KV head", where=_WHERE)


def choose_tiling(dtype: str, head_dim: int) -> DecodeTiling:
    """64 slots of 128 dims in 3 stages keep about 100 KB of loads in flight per thread block, which covers the memory's latency."""
    if dtype == "fp32":
        return DecodeTiling(32, 4, 2)
    return DecodeTiling(64, 4, 3) if head_dim <= 128 else DecodeTiling(32, 4, 3)


def arguments(spec: DecodeSpec, kernel: str) -> tuple[Argument, ...]:
    """The arguments of "split" or "combine", in order."""
    pointer = lambda name, type: Argument(name, "*" + type, True)
    data = lambda *names: [pointer(name, spec.dtype) for name in names]
    shared = [] if spec.fused else [pointer("slots", "i32")]
    shared += [pointer("part_m", "fp32"), pointer("part_l", "fp32"), pointer("part_acc", "fp32")]
    strides = lambda *names: [Argument(name, "i32", True) for name in names]
    sizes = [Argument("kv_heads", "i32"), Argument("capacity", "i32", True)]
    logit = logit_arguments(spec.softcap)
    token = strides("query_b", "query_h", "key_b", "key_h", "value_b", "value_h", "out_b", "out_h")
    sink = [pointer("sink_logits", "fp32")] if spec.sink_logits else []
    if kernel == "split":
        listed = [*data("query", "keys", "values"), pointer("positions", "i32"), pointer("counts", "i32"), pointer("seen", "i32"), *shared]
        listed += [*(token if spec.fused else token[:2]), *sizes, Argument("pinned", "i32"), Argument("stretches", "i32"), *logit]
        listed += [Argument("real", "*u8"), Argument("real_b", "i32")] if spec.padded else []
        listed += [*data("turned"), Argument("sinks", "i32")] if spec.turning else []
        if not spec.fused:
            return tuple(listed)
        listed += [*data("key", "value", "out"), pointer("length", "i64"), pointer("tickets", "i32"), *sink]
        return (*listed, Argument("STRETCHES", "constexpr"), Argument("MEMBERS", "constexpr"))
    listed = [*data("query", "key", "value", "keys", "values"), pointer("counts", "i32"), pointer("seen", "i32"), pointer("length", "i64")]
    listed += [*shared, *data("out"), *token, *sizes, Argument("stretches", "i32"), *logit, *sink]
    return (*listed, Argument("STRETCHES", "constexpr"))


def decode_source(spec: DecodeSpec) -> str:
    """Module text with `split` (grid: stretches, batch * kv_heads) and, unless `fused`, `combine` (grid: group, batch * kv_heads)."""
    qk_dim, v_dim = padded(spec.qk_head_dim), padded(spec.v_head_dim)
    qk_whole, v_whole = qk_dim == spec.qk_head_dim, v_dim == spec.v_head_dim
    values = vars(spec) | {
        "precision": ', input_precision="ieee"' if spec.dtype == "fp32" else "",
        "qk_guard": "" if qk_whole else f" & (qk_dims < {spec.qk_head_dim})[None, :]",
        "v_guard": "" if v_whole else f" & (v_dims < {spec.v_head_dim})[None, :]",
        "qk_mask": "" if qk_whole else f", mask=qk_dims < {spec.qk_head_dim}, other=0.0",
        "v_mask": "" if v_whole else f", mask=v_dims < {spec.v_head_dim}, other=0.0",
        "qk_store": "" if qk_whole else f", mask=qk_dims < {spec.qk_head_dim}",
        "v_store": "" if v_whole else f", mask=v_dims < {spec.v_head_dim}",
        "v_guard3": "" if v_whole else f" & (v_dims < {spec.v_head_dim})[None, None, :]",
        "finish_context": ", ".join(
            (["tanh_scale", "cap_log2"] if spec.softcap else ["scale"])
            + (["real", "real_b"] if spec.padded else [])
            + (["sink_logits"] if spec.sink_logits else [])
            + (["count"] if spec.grows else [])
        ),
        "split_parameters": parameters(arguments(spec, "split")),
        "combine_parameters": parameters(arguments(spec, "combine")),
    }
    constants = {"GROUP": spec.group, "ROWS": padded(spec.group), "KEYS": spec.tiling.keys, "QK_DIM": qk_dim, "V_DIM": v_dim}
    lines = [f"{name} = tl.constexpr({value})" for name, value in constants.items()] + [f"LOG2E = tl.constexpr({LOG2E!r})"]
    header = '"""Generated by sparsify: decode attention."""\n\nimport triton\nimport triton.language as tl\n\n' + "\n".join(lines) + "\n"
    texts = [FINISH, SPLIT] if spec.fused else [SPLIT, COMBINE]
    return "\n\n".join([header, *(render(text, values) for text in texts)])


def stretches(capacity: int, rows: int, processors: int, tiling: DecodeTiling) -> int:
    """How many stretches the filled slots of each of `rows` KV heads are cut into: one wave of thread blocks when the cache is full."""
    tiles = -(-capacity // tiling.keys)
    wanted = max(1, min(tiles, processors * tiling.programs // rows, 128))
    return -(-tiles // -(-tiles // wanted))


@functools.lru_cache(maxsize=256)
def _module(spec: DecodeSpec) -> ModuleType:
    return source.load(decode_source(spec), "decode")


@functools.cache
def processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def cache_decode(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
    counts: Tensor,
    seen: Tensor,
    length: Tensor,
    *,
    real: Tensor | None = None,
    sink_logits: Tensor | None = None,
    inverse_frequencies: Tensor | None = None,
    pinned: int,
    scale: float,
    softcap: float,
    window: int,
    sinks: int,
    version: int,
    tickets: Tensor | None = None,
    tiling: DecodeTiling | None = None,
) -> Tensor:
    """The op by generated kernels; see `sparsify.ops.cache`.

    Raises:
        UnsupportedError: no kernel takes this call.
        KernelError: a kernel could not be compiled or launched.
    """
    _check(query, key, value, keys, values, pinned, scale)
    heads, qk_head_dim = query.shape[1], query.shape[3]
    kv_heads, capacity, v_head_dim = keys.shape[1], keys.shape[2], values.shape[3]
    dtype = DTYPES[query.dtype]
    tiling = tiling or choose_tiling(dtype, max(qk_head_dim, v_head_dim))
    turning = inverse_frequencies is not None
    rows, grows = query.shape[0] * kv_heads, pinned == cache_ops.NEVER_OVERWRITTEN
    count = stretches(capacity, rows, processors(query.device), tiling)
    spec = DecodeSpec(
        dtype, qk_head_dim, v_head_dim, heads // kv_heads, tiling, softcap > 0, sink_logits is not None, real is not None, turning,
        tickets is not None and count <= _FUSED_STRETCHES, capacity <= _WHOLE_SLOTS and not grows, grows,
    )  # fmt: skip
    out = cache_ops.empty_output(query, values)
    given: dict[str, Any] = {
        "query": query,
        "key": key,
        "value": value,
        "keys": keys,
        "values": values,
        "positions": positions,
        "counts": counts,
        "seen": seen,
        "length": length,
        "out": out,
        "tickets": tickets,
        "kv_heads": kv_heads,
        "capacity": capacity,
        "pinned": pinned,
        "stretches": count,
        "sinks": sinks,
        "STRETCHES": (up := max(2, 1 << (count - 1).bit_length())),
        # partial sums of so many heads are registers of the joining program at a time
        "MEMBERS": max(1, min(1 << (spec.group - 1).bit_length(), 16384 // (up << max(4, (v_head_dim - 1).bit_length())))),
    }
    given |= partial_sums(rows * spec.group * count, v_head_dim, query.device) | logit_values(scale, softcap)
    if not spec.fused:
        given["slots"] = torch.empty(rows, dtype=torch.int32, device=query.device)
    given |= stride_values(query=(query, "bh"), key=(key, "bh"), value=(value, "bh"), out=(out, "bh"))
    if sink_logits is not None:
        given["sink_logits"] = sink_logits.float().contiguous()
    if real is not None:
        given |= {"real": real.view(torch.uint8), "real_b": real.stride(0)}
    if turning:
        at = seen if real is None else seen - 1 + real[:, 0].to(seen.dtype)
        given["turned"] = turned_queries(query, at[:, None], sinks, window, inverse_frequencies)
    split = ("split", (count, rows), {"num_warps": tiling.warps, "num_stages": tiling.stages})
    combine = ("combine", (spec.group, rows), {"num_warps": 4})
    kernels = (split,) if spec.fused else (split, combine)
    launch_in_turn(f"decode kernel ({spec})", query, lambda: _module(spec), functools.partial(arguments, spec), given, *kernels)
    return out


def _check(query: Tensor, key: Tensor, value: Tensor, keys: Tensor, values: Tensor, pinned: int, scale: float) -> None:
    def need(holds: bool, what: str) -> None:
        if not holds:
            raise UnsupportedError(what, where=_WHERE, hint="the reference serves it")

    need(query.shape[2] == key.shape[2] == value.shape[2] == 1, f"{query.shape[2]} queries, decode has one")
    need(query.dtype in DTYPES and query.dtype == keys.dtype == values.dtype == key.dtype, f"dtypes {query.dtype} and {keys.dtype}")
    need(keys.is_contiguous() and values.is_contiguous(), "the cache's buffers are not contiguous")
    need(all(t.stride(-1) == 1 for t in (query, key, value)), "strided head dimensions")
    need(query.shape[1] % keys.shape[1] == 0, f"{query.shape[1]} query heads are no multiple of {keys.shape[1]} KV heads")
    need(-1 <= pinned < keys.shape[2] and scale > 0, f"{pinned} pinned slots of {keys.shape[2]}, scale {scale}")
