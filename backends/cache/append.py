"""Attention of several tokens over an evicting cache by generated kernels: later turns, verified drafts, prompts of `positions="in_cache"`.

Rows of a tile are (query, head of the group) pairs. Few rows over many slots split the slots (Flash-Decoding, Dao et al. 2023); positions
decide what a row sees, so slots may lie in any order. Nothing is read back to the host.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from sparsify.backends.cache import clusters
from sparsify.backends.cache.append_template import COMBINE, FOLD_CODES, FOLD_TILE, SPLIT
from sparsify.backends.cache.codes_template import PIECE, code_values, piece_list
from sparsify.backends.cache.kernels import (
    check_code_dims,
    check_codes,
    logit_arguments,
    logit_values,
    packed_values,
    partial_sums,
    rotated_queries,
)
from sparsify.backends.cache.reference import find_query_positions
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
    LONGEST_WINDOW,
    capability,
    choose_splits,
    launch,
    launching,
    need,
    power_of_two,
    processors,
    stride_values,
)  # fmt: skip
from sparsify.backends.codegen.template import header, render
from sparsify.errors import UnsupportedError
from sparsify.ops import cache as cache_ops
from sparsify.ops.cache import CacheAttentionCall
from sparsify.ops.limits import cdiv
from sparsify.ops.pages import Clusters

_WHERE = f"sparsify::{CacheAttentionCall.NAME}"


@dataclass(frozen=True)
class AppendTiling:
    """How the work is cut.

    rows, keys: of a tile.
    warps, stages: Triton's launch options.
    programs: thread blocks per multiprocessor that a split aims at.
    """

    rows: int
    keys: int
    warps: int
    stages: int
    programs: int = 2


@dataclass(frozen=True)
class AppendSpec:
    """What decides the kernels' text.

    dtype: of all tensors but integers, as `codegen.launch.DTYPES` names it.
    group: query heads per KV head.
    tiling: how the work is cut.
    has_new: the call's own keys are not stored yet.
    single: slots are not split.
    windowed: a window hides keys.
    padded: tokens may be padding.
    rotate_sinks: sinks stand directly before the window, so that rotated queries see them.
    softcap, sink_logits: whether the call has them.
    packed: heads have numbers of slots of their own, side by side.
    codes: "fp8" or "int4" where keys and values of slots are codes; "": they lie as they came.
    """

    dtype: str
    qk_head_dim: int
    v_head_dim: int
    group: int
    tiling: AppendTiling
    has_new: bool = True
    single: bool = True
    windowed: bool = False
    padded: bool = False
    rotate_sinks: bool = False
    softcap: bool = False
    sink_logits: bool = False
    packed: bool = False
    codes: str = ""

    def __post_init__(self):
        check_head_dims(_WHERE, self.qk_head_dim, self.v_head_dim)
        if self.codes:
            check_code_dims(_WHERE, self.codes, self.qk_head_dim, self.v_head_dim)
        if self.rotate_sinks and not self.windowed:
            raise UnsupportedError("rotated sinks without a window", where=_WHERE)


def choose_tiling(
    dtype: str, head_dim: int, rows: int, capability: tuple[int, int] = (9, 0), rotate_sinks: bool = False, codes: str = ""
) -> AppendTiling:
    """`rows` is queries times group. 128 rows of 128 dims just fit into the registers of 8 warps; fp32 products are unrolled, rotated
    queries take a second product, and 4-bit codes become numbers in registers beside the sums."""
    wanted = padded(max(rows, 1))
    if dtype == "fp32":
        return AppendTiling(min(wanted, 32), 32 if head_dim <= 64 else 16, 4 if head_dim <= 64 else 8, 1)
    if head_dim > 128:
        return AppendTiling(min(wanted, 64), 32, 8 if wanted >= 64 else 4, 2)
    if wanted < 128:
        return AppendTiling(wanted, 32 if rotate_sinks or codes == "int4" else 64, 4, 2 if rotate_sinks or codes == "int4" else 3)
    if capability < (9, 0):
        return AppendTiling(64, 64, 8, 2)
    return AppendTiling(128, 32 if rotate_sinks else 64, 8, 2)


@functools.lru_cache(maxsize=512)
def arguments(spec: AppendSpec, kernel: str) -> tuple[Argument, ...]:
    """The arguments of "split" or "combine", in order."""
    data, strides = functools.partial(pointers, spec.dtype), functools.partial(integers, aligned=True)
    parts = [] if spec.single else pointers("fp32", "part_m", "part_l", "part_acc")
    out = [*data("out"), *strides("out_b", "out_h", "out_m")]
    sinks = pointers("fp32", "sink_logits") if spec.sink_logits else []
    sizes = integers("kv_heads", "query_len", "splits")
    if kernel == "combine":
        return (*parts, *out, *sizes, *sinks, *constexprs("SPLITS"))
    listed = pointers("i32", "starts") if spec.packed else []
    if spec.codes:
        kind = "u8" if spec.codes == "fp8" else "i16"
        listed += [
            *data("query"),
            *pointers(kind, "key_codes", "value_codes"),
            *data("key_scales", "value_scales", "recent_keys", "recent_values"),
        ]
        listed += [*pointers("i32", "staged"), *integers("groups")]
    else:
        listed += data("query", "keys", "values")
    listed += pointers("i32", "positions", "seen", "query_positions")
    listed += [*strides("query_b", "query_h", "query_m", "capacity"), *sizes]
    if spec.has_new:
        listed += [*data("new_key", "new_value"), *pointers("i32", "at")]
        listed += strides("key_b", "key_h", "key_n", "value_b", "value_h", "value_n")
    if spec.windowed:
        listed += [*integers("window", "sinks"), *(pointers("i32", "bounds") if spec.has_new else [])]
    listed += data("rotated") if spec.rotate_sinks else []
    listed += logit_arguments(spec.softcap)
    return (*listed, *(out + sinks if spec.single else parts))


def append_source(spec: AppendSpec) -> str:
    """Module text with `split` (grid: tiles * splits, batch * kv_heads) and, unless `single`, `combine` (query_len * group, the same)."""
    qk_dim, v_dim = padded(spec.qk_head_dim), padded(spec.v_head_dim)
    context = ["tanh_scale", "cap_log2"] if spec.softcap else ["scale"]
    values = vars(spec) | {
        "context": ", ".join(context + (["window", "sinks"] if spec.windowed else [])),
        **head_dim_values(spec.dtype, spec.qk_head_dim, spec.v_head_dim),
        **packed_values(spec.packed),
        **_pieces(spec),
        "split_parameters": parameters(arguments(spec, "split")),
        "combine_parameters": parameters(arguments(spec, "combine")),
    }
    tiling, pieces = spec.tiling, values["pieces"]
    constants = {"GROUP": spec.group, "ROWS": tiling.rows, "KEYS": tiling.keys, "QK_DIM": qk_dim, "V_DIM": v_dim, "LOG2E": LOG2E}
    if spec.codes:
        constants |= {"QK_WIDTH": spec.qk_head_dim // len(pieces), "V_WIDTH": spec.v_head_dim // len(pieces)}
    texts = [*([PIECE, FOLD_TILE, FOLD_CODES] if spec.codes else [FOLD_TILE]), SPLIT] + ([] if spec.single else [COMBINE])
    return "\n\n".join([header("Attention of several tokens over a cache", constants), *(render(text, values) for text in texts)])


def _pieces(spec: AppendSpec) -> dict[str, Any]:
    """How a head's channels are cut: 4-bit codes by quarters, everything else not at all."""
    pieces = range(4 if spec.codes == "int4" else 1)
    blocks = lambda name, dim: lambda i: f"({i * dim // len(pieces)} + {name})" if len(pieces) > 1 else name
    cut = {"pieces": pieces, "key_dims": blocks("qk_dims", spec.qk_head_dim), "value_dims": blocks("v_dims", spec.v_head_dim)}
    coded = code_values(spec.codes, spec.dtype, spec.qk_head_dim, spec.v_head_dim) if spec.codes else {}
    return {**coded, **cut, "accs": piece_list("acc", pieces), "qs": piece_list("q", pieces)}


@functools.lru_cache(maxsize=256)
def _module(spec: AppendSpec) -> ModuleType:
    return source.load(append_source(spec), "append")


def cache_attention(call: CacheAttentionCall, *, tiling: AppendTiling | None = None, splits: int | None = None) -> Tensor:
    """The op by generated kernels.

    Args:
        tiling, splits: instead of the tables' choice, for tests and tuning.

    Raises:
        UnsupportedError: no kernel takes this call.
        KernelError: a kernel could not be compiled or launched.
    """
    if isinstance(call.pages, Clusters) and call.new_key is not None:
        return clusters.cache_attention(call, functools.partial(cache_attention, tiling=tiling, splits=splits))
    _check(call)
    query, new_key, new_value = call.query, call.new_key, call.new_value
    (batch, heads, query_len, qk_head_dim), (_, kv_heads, capacity, _) = query.shape, call.keys.shape
    v_head_dim, group, dtype = cache_ops.v_head_dim(call), heads // kv_heads, DTYPES[query.dtype]
    rotate_sinks = call.inverse_frequencies is not None
    if tiling is None:
        tiling = choose_tiling(dtype, max(qk_head_dim, v_head_dim), query_len * group, capability(query.device), rotate_sinks, call.codes)
    tiles, rows = cdiv(query_len * group, tiling.rows), batch * kv_heads
    count = splits or choose_splits(cdiv(capacity, tiling.keys), rows * tiles, processors(query.device) * tiling.programs)
    has_new = new_key is not None
    spec = AppendSpec(
        dtype, qk_head_dim, v_head_dim, group, tiling, has_new, count == 1, call.window > 0, call.is_token is not None and has_new,
        rotate_sinks, call.softcap > 0, call.sink_logits is not None, call.starts is not None, call.codes,
    )  # fmt: skip
    query_positions = find_query_positions(call).to(torch.int32).contiguous()
    out = cache_ops.empty_output(call)
    given: dict[str, Any] = {
        **vars(call), "query_positions": query_positions, "out": out, "kv_heads": kv_heads, "capacity": capacity, "query_len": query_len,
        "splits": count, "window": min(call.window, LONGEST_WINDOW), "SPLITS": max(2, power_of_two(count)),
        **logit_values(call.scale, call.softcap),
    }  # fmt: skip
    if call.key_scales is not None:
        codes = [t if call.codes == "fp8" else t.view(torch.int16) for t in (call.keys, call.values)]
        given |= {"key_codes": codes[0], "value_codes": codes[1], "groups": call.key_scales.shape[2]}
    given |= stride_values(query=(query, "bhm"), out=(out, "bhm"))
    if new_key is not None and new_value is not None:
        given["at"] = query_positions if call.is_token is None else query_positions.masked_fill(~call.is_token, -1)
        given |= stride_values(key=(new_key, "bhn"), value=(new_value, "bhn"))
        if call.window:
            given["bounds"] = _bounds(query_positions, tiles, tiling.rows, group, given["window"], call.sinks)
    if call.sink_logits is not None:
        given["sink_logits"] = call.sink_logits.float().contiguous()
    if call.inverse_frequencies is not None:
        given["rotated"] = rotated_queries(query, query_positions, call.sinks, call.window, call.inverse_frequencies)
    if count > 1:
        given |= partial_sums(rows * query_len * group * count, v_head_dim, query.device)
    with launching(query.device, lambda: f"append kernel ({spec})"):
        module = _module(spec)
        launch(module.split, (tiles * count, rows), arguments(spec, "split"), given, num_warps=tiling.warps, num_stages=tiling.stages)
        if not spec.single:
            launch(module.combine, (query_len * group, rows), arguments(spec, "combine"), given, num_warps=4)
    return out


def _bounds(query_positions: Tensor, tiles: int, rows: int, group: int, window: int, sinks: int) -> Tensor:
    """Int32 [batch, tiles, 2]: the first of the call's keys in the window of any row of a tile, and one past the last sink before it.

    `query_positions` [batch, query_len] never falls along a row, padding included; a key that is no padding stands at its own.
    """
    lowest = query_positions[:, torch.arange(tiles, device=query_positions.device) * rows // group]
    start = torch.searchsorted(query_positions, (lowest - window).contiguous(), right=True)
    sinks_end = torch.searchsorted(query_positions, torch.full_like(query_positions[:, :1], sinks))
    return torch.stack((start, torch.minimum(start, sinks_end)), -1).to(torch.int32)


def _check(call: CacheAttentionCall) -> None:
    query, keys, values = call.query, call.keys, call.values
    need(call.pages is None, "pages are read by the kernels of one token that is not stored yet", _WHERE)
    given = [t for t in (query, call.new_key, call.new_value) if t is not None]
    if call.codes:
        check_codes(call, _WHERE)
    else:
        given += [keys, values]
    need(all(t.dtype == query.dtype for t in given) and query.dtype in DTYPES, f"dtypes {[str(t.dtype) for t in given]}", _WHERE)
    need(keys.is_contiguous() and values.is_contiguous(), "the cache's buffers are not contiguous", _WHERE)
    need(all(t.stride(-1) == 1 for t in given), "strided head dimensions", _WHERE)
    need(query.shape[1] % keys.shape[1] == 0, f"{query.shape[1]} query heads are no multiple of {keys.shape[1]} KV heads", _WHERE)
    need(query.shape[2] > 0 and call.scale > 0, f"{query.shape[2]} queries, scale {call.scale}", _WHERE)
