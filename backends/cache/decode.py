"""Decode attention over an evicting cache by generated kernels: split-K over the slots (Flash-Decoding, Dao et al. 2023), then a join that
also stores the new token, by a kernel of its own or, where the cache brings tickets, by the last program of each KV head. Nothing is read
back to the host and the grid depends on shapes alone, so CUDA graphs can hold both.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from sparsify.backends.cache import pages as page_kernels
from sparsify.backends.cache import quantised
from sparsify.backends.cache.decode_template import COMBINE, FINISH, RENEW_BOUNDS, SPLIT
from sparsify.backends.cache.kernels import logit_arguments, logit_values, packed_values, partial_sums, rotated_queries
from sparsify.backends.codegen import source
from sparsify.backends.codegen.arguments import (
    Argument,
    check_head_dims,
    constexprs,
    head_dim_values,
    integers,
    padded,
    parameters,
    pointers,
)
from sparsify.backends.codegen.launch import (
    DTYPES,
    LOG2E,
    choose_splits,
    launch,
    launching,
    need,
    overlaps,
    power_of_two,
    processors,
    stride_values,
)  # fmt: skip
from sparsify.backends.codegen.template import header, render
from sparsify.errors import UnsupportedError
from sparsify.ops import cache as cache_ops
from sparsify.ops.cache import CacheDecodeCall
from sparsify.ops.limits import cdiv

_WHERE = f"sparsify::{CacheDecodeCall.NAME}"
# Up to so many splits the program that joins them holds all in registers, and a launch is saved; long caches feel neither.
_FUSED_SPLITS = 32
# So many listed tiles of a program are as well served by fewer on their way: what comes before the first product is shorter.
_FEW_TILES = 4
# What so many slots hold is read in about the time that a load of their count takes.
_WHOLE_SLOTS = 8192


@dataclass(frozen=True)
class DecodeTiling:
    """How the work is cut.

    keys: slots per tile.
    warps, stages: Triton's launch options.
    programs: thread blocks per multiprocessor that a split aims at.
    """

    keys: int
    warps: int
    stages: int
    programs: int = 2


@dataclass(frozen=True)
class DecodeSpec:
    """What decides the kernels' text.

    dtype: of all tensors but integers, as `codegen.launch.DTYPES` names it.
    group: query heads per KV head.
    tiling: how the work is cut.
    softcap, sink_logits: whether the call has them.
    padded: tokens may be padding.
    rotate_sinks: sinks stand directly before the window, so that they are seen by rotated queries.
    fused: the last program of a KV head joins its splits.
    whole: empty slots are read, too.
    grows: no slot is ever overwritten.
    packed: heads have numbers of slots of their own, side by side.
    page: slots of the pages that are read along a list; 0: all slots are.
    early: with pages, programs begin before those of the kernel that lists them have ended (programmatic dependent launch).
    """

    dtype: str
    qk_head_dim: int
    v_head_dim: int
    group: int
    tiling: DecodeTiling
    softcap: bool = False
    sink_logits: bool = False
    padded: bool = False
    rotate_sinks: bool = False
    fused: bool = False
    whole: bool = False
    grows: bool = False
    page: int = 0
    packed: bool = False
    early: bool = False

    def __post_init__(self):
        check_head_dims(_WHERE, self.qk_head_dim, self.v_head_dim)
        if self.group > 128:
            raise UnsupportedError(f"no decode kernel has {self.group} query heads per KV head", where=_WHERE)


def choose_tiling(dtype: str, head_dim: int, listed: bool = False) -> DecodeTiling:
    """64 slots of 128 dims in 3 stages keep about 100 KB of loads in flight per thread block, which covers the memory's latency.

    Args:
        listed: slots are found along a list, which is one more load that the others wait for: Triton spends every second stage on it.
    """
    if dtype == "fp32":
        return DecodeTiling(32, 4, 3 if listed else 2)
    return DecodeTiling(64 if head_dim <= 128 else 32, 4, 7 if listed else 3)


@functools.lru_cache(maxsize=512)
def arguments(spec: DecodeSpec, kernel: str) -> tuple[Argument, ...]:
    """The arguments of "split" or "combine", in order."""
    data = functools.partial(pointers, spec.dtype)
    shared = [*([] if spec.fused else pointers("i32", "slots")), *pointers("fp32", "part_m", "part_l", "part_acc")]
    sizes = [*integers("kv_heads"), *integers("capacity", aligned=True)]
    logit = logit_arguments(spec.softcap)
    token = integers("query_b", "query_h", "key_b", "key_h", "value_b", "value_h", "out_b", "out_h", aligned=True)
    sink = pointers("fp32", "sink_logits") if spec.sink_logits else []
    heads = pointers("i32", "starts") if spec.packed else []
    paged = [*data("bounds"), *integers("pages")] if spec.page else []
    if kernel == "split":
        listed = [*heads, *data("query", "keys", "values"), *pointers("i32", "positions", "counts", "seen"), *shared]
        listed += [*(token if spec.fused else token[:2]), *sizes, *integers("pinned", "splits"), *logit]
        listed += [Argument("is_token", "*u8"), *integers("is_token_b")] if spec.padded else []
        listed += [*data("rotated"), *integers("sinks")] if spec.rotate_sinks else []
        listed += [*pointers("i32", "listed", "chosen"), *integers("most")] if spec.page else []
        if not spec.fused:
            return tuple(listed)
        listed += [*data("key", "value", "out"), *pointers("i64", "length"), *pointers("i32", "tickets"), *sink, *paged]
        return (*listed, *constexprs("SPLITS", "MEMBERS"))
    listed = [*data("query", "key", "value", "keys", "values"), *pointers("i32", "counts", "seen"), *pointers("i64", "length")]
    return (*heads, *listed, *shared, *data("out"), *token, *sizes, *integers("splits"), *logit, *sink, *paged, *constexprs("SPLITS"))


def decode_source(spec: DecodeSpec) -> str:
    """Module text with `split` (grid: splits, batch * kv_heads) and, unless `fused`, `combine` (grid: group, batch * kv_heads)."""
    qk_dim, v_dim = padded(spec.qk_head_dim), padded(spec.v_head_dim)
    qk_whole, v_whole = qk_dim == spec.qk_head_dim, v_dim == spec.v_head_dim
    values = vars(spec) | {
        "codes": "",
        **head_dim_values(spec.dtype, spec.qk_head_dim, spec.v_head_dim),
        "qk_mask": "" if qk_whole else f", mask=qk_dims < {spec.qk_head_dim}, other=0.0",
        "v_mask": "" if v_whole else f", mask=v_dims < {spec.v_head_dim}, other=0.0",
        "qk_store": "" if qk_whole else f", mask=qk_dims < {spec.qk_head_dim}",
        "v_guard3": "" if v_whole else f" & (v_dims < {spec.v_head_dim})[None, None, :]",
        "finish_context": ", ".join(
            (["tanh_scale", "cap_log2"] if spec.softcap else ["scale"])
            + (["is_token", "is_token_b"] if spec.padded else [])
            + (["sink_logits"] if spec.sink_logits else [])
            + (["bounds", "pages"] if spec.page else [])
            + (["starts"] if spec.packed else [])
        ),
        **packed_values(spec.packed),
        "split_parameters": parameters(arguments(spec, "split")),
        "combine_parameters": parameters(arguments(spec, "combine")),
    }
    constants = {"GROUP": spec.group, "ROWS": padded(spec.group), "KEYS": spec.tiling.keys, "QK_DIM": qk_dim, "V_DIM": v_dim}
    constants |= {"LOG2E": LOG2E} | ({"PAGE": spec.page} if spec.page else {})
    texts = [*([RENEW_BOUNDS] if spec.page else []), *([FINISH, SPLIT] if spec.fused else [SPLIT, COMBINE])]
    return "\n\n".join([header("Attention of one token over a cache", constants), *(render(text, values) for text in texts)])


@functools.lru_cache(maxsize=256)
def _module(spec: DecodeSpec) -> ModuleType:
    return source.load(decode_source(spec), "decode")


def cache_decode(call: CacheDecodeCall, *, tiling: DecodeTiling | None = None) -> Tensor:
    """The op by generated kernels.

    Args:
        tiling: instead of the table's choice, for tests and tuning.

    Raises:
        UnsupportedError: no kernel takes this call.
        KernelError: a kernel could not be compiled or launched.
    """
    if call.codes:
        return quantised.cache_decode(call)
    _check(call)
    query, is_token, tickets = call.query, call.is_token, call.tickets
    (batch, heads, _, qk_head_dim), kv_heads, capacity, v_head_dim = query.shape, call.kv_heads, call.capacity, call.values.shape[3]
    dtype = DTYPES[query.dtype]
    tiling = tiling or choose_tiling(dtype, max(qk_head_dim, v_head_dim), call.pages is not None)
    rows, grows, pages = batch * kv_heads, call.pinned == cache_ops.NEVER_OVERWRITTEN, call.pages
    read = capacity if pages is None else min(capacity, pages.most(capacity, call.sinks, in_order=True) * pages.size)
    tiles, programs = cdiv(read, tiling.keys), processors(query.device) * tiling.programs
    count = choose_splits(tiles, rows, programs)
    if tickets is not None and _FUSED_SPLITS < count <= _FUSED_SPLITS * 5 // 4:  # a launch saved is worth a few idle processors
        count = choose_splits(tiles, rows, programs, _FUSED_SPLITS)
    if pages is not None and tiles <= _FEW_TILES * count:
        tiling = replace(tiling, stages=min(tiling.stages, 5))
    spec = DecodeSpec(
        dtype, qk_head_dim, v_head_dim, heads // kv_heads, tiling, call.softcap > 0, call.sink_logits is not None, is_token is not None,
        call.inverse_frequencies is not None, tickets is not None and count <= _FUSED_SPLITS,
        capacity <= _WHOLE_SLOTS and not grows and pages is None, grows, 0 if pages is None else pages.size,
        call.starts is not None, pages is not None and overlaps(query.device),
    )  # fmt: skip
    out, partials = cache_ops.empty_output(call), max(2, power_of_two(count))
    given: dict[str, Any] = {
        **vars(call), "out": out, "kv_heads": kv_heads, "capacity": capacity, "splits": count, "SPLITS": partials,
        # partial sums of so many heads are registers of the joining program at a time
        "MEMBERS": max(1, min(power_of_two(spec.group), 16384 // (partials * padded(v_head_dim)))),
        **logit_values(call.scale, call.softcap),
    }  # fmt: skip
    given |= partial_sums(rows * spec.group * count, v_head_dim, query.device)
    if not spec.fused:
        given["slots"] = torch.empty(rows, dtype=torch.int32, device=query.device)
    given |= stride_values(query=(query, "bh"), key=(call.key, "bh"), value=(call.value, "bh"), out=(out, "bh"))
    if call.sink_logits is not None:
        given["sink_logits"] = call.sink_logits.float().contiguous()
    if is_token is not None:
        given |= {"is_token": is_token.view(torch.uint8), "is_token_b": is_token.stride(0)}
    if call.inverse_frequencies is not None:
        at = call.seen if is_token is None else call.seen - 1 + is_token[:, 0].to(call.seen.dtype)
        given["rotated"] = rotated_queries(query, at[:, None], call.sinks, call.window, call.inverse_frequencies)
    if pages is not None and call.bounds is not None:
        listed, chosen = page_kernels.choose(call, pages)
        given |= {"listed": listed, "chosen": chosen, "most": listed.shape[1], "pages": call.bounds.shape[2]}
    with launching(query.device, lambda: f"decode kernel ({spec})"):
        module = _module(spec)
        options = {"num_warps": tiling.warps, "num_stages": tiling.stages, **({"launch_pdl": True} if spec.early else {})}
        launch(module.split, (count, rows), arguments(spec, "split"), given, **options)
        if not spec.fused:
            launch(module.combine, (spec.group, rows), arguments(spec, "combine"), given, num_warps=4)
    return out


def _check(call: CacheDecodeCall) -> None:
    query, key, value, keys, values = call.query, call.key, call.value, call.keys, call.values
    need(query.shape[2] == key.shape[2] == value.shape[2] == 1, f"{query.shape[2]} queries, decode has one", _WHERE)
    need(query.dtype in DTYPES and query.dtype == keys.dtype == values.dtype == key.dtype, f"dtypes {query.dtype} and {keys.dtype}", _WHERE)
    buffers = [keys, values, *([] if call.bounds is None else [call.bounds])]
    need(
        all(t.is_contiguous() and t.dtype == keys.dtype for t in buffers),
        "the cache's buffers are not contiguous, or of two dtypes",
        _WHERE,
    )
    need(all(t.stride(-1) == 1 for t in (query, key, value)), "strided head dimensions", _WHERE)
    need(query.shape[1] % keys.shape[1] == 0, f"{query.shape[1]} query heads are no multiple of {keys.shape[1]} KV heads", _WHERE)
    need(
        call.starts is None or (call.pinned == cache_ops.NEVER_OVERWRITTEN and call.pages is None),
        "slots by head that are overwritten",
        _WHERE,
    )
    need(-1 <= call.pinned < call.capacity and call.scale > 0, f"{call.pinned} pinned slots of {call.capacity}, scale {call.scale}", _WHERE)
