"""What each key gets of some queries' attention, by two generated kernels: the softmax sums of every query, keys split among programs, then
each key's weights summed over the queries. The keys are read twice and no matrix of logits is written."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from sparsify.backends.cache.kernels import logit_arguments, logit_values
from sparsify.backends.cache.mass_template import KEY_SUMS, LOGITS, ROW_SUMS
from sparsify.backends.codegen import source
from sparsify.backends.codegen.arguments import Argument, check_head_dims, dot_precision, integers, padded, parameters, pointers
from sparsify.backends.codegen.launch import DTYPES, choose_splits, launch, launching, need, processors, stride_values
from sparsify.backends.codegen.template import header, render
from sparsify.ops.cache import CacheMassCall
from sparsify.ops.limits import cdiv

_WHERE = f"sparsify::{CacheMassCall.NAME}"
# programs of `row_sums` on a multiprocessor that a split aims at
_PROGRAMS = 2


@dataclass(frozen=True)
class MassTiling:
    """Sizes of the tiles.

    rows, keys: of a tile of `row_sums`.
    window: queries of one head in a tile of `key_sums`.
    warps: of both kernels.
    """

    rows: int
    keys: int
    window: int
    warps: int = 4


@dataclass(frozen=True)
class MassSpec:
    """What decides the kernels' text.

    dtype: of queries and keys, as `codegen.launch.DTYPES` names it.
    group: query heads per KV head.
    tiling: sizes of the tiles.
    softcap: whether logits are bounded.
    """

    dtype: str
    head_dim: int
    group: int
    tiling: MassTiling
    softcap: bool = False

    def __post_init__(self):
        check_head_dims(_WHERE, self.head_dim)


def choose_tiling(dtype: str, head_dim: int, group: int, query_len: int) -> MassTiling:
    """All rows of SnapKV's 32 queries and 4 heads in one tile, so that `row_sums` reads keys once."""
    up = lambda size, most: min(most, padded(size))
    if dtype == "fp32":
        small = head_dim <= 64
        return MassTiling(up(group * query_len, 32), 32 if small else 16, up(query_len, 32), 4 if small else 8)
    wide = head_dim > 128
    rows = up(group * query_len, 64 if wide else 128)
    return MassTiling(rows, 64, up(query_len, 64), 8 if rows >= 128 or wide else 4)


@functools.lru_cache(maxsize=512)
def arguments(spec: MassSpec, kernel: str) -> tuple[Argument, ...]:
    """The arguments of "row_sums" or "key_sums", in order."""
    listed = [*pointers(spec.dtype, "query", "keys"), *pointers("i32", "positions", "query_positions")]
    listed += [*integers("key_b", "key_h", "key_n", aligned=True), *integers("kv_heads", "query_len", "key_len")]
    listed += logit_arguments(spec.softcap)
    if kernel == "row_sums":
        return (*listed, *integers("splits"), *integers("split_len", aligned=True), *pointers("fp32", "part_m", "part_l"))
    return (*listed, *pointers("fp32", "lse", "mass"))


def mass_source(spec: MassSpec) -> str:
    """Module text with `row_sums` (grid: splits, row tiles * batch * kv_heads) and `key_sums` (grid: key tiles, batch * kv_heads)."""
    dim = padded(spec.head_dim)
    values = vars(spec) | {
        "context": "tanh_scale, cap_log2" if spec.softcap else "scale",
        "precision": dot_precision(spec.dtype),
        "guard": "" if dim == spec.head_dim else f" & (dims < {spec.head_dim})[None, :]",
        "row_sums_parameters": parameters(arguments(spec, "row_sums")),
        "key_sums_parameters": parameters(arguments(spec, "key_sums")),
    }
    tiling = spec.tiling
    constants = {"GROUP": spec.group, "ROWS": tiling.rows, "KEYS": tiling.keys, "WINDOW": tiling.window, "DIM": dim}
    return "\n\n".join([header("Attention that keys get", constants), *(render(text, values) for text in (LOGITS, ROW_SUMS, KEY_SUMS))])


@functools.lru_cache(maxsize=256)
def _module(spec: MassSpec) -> ModuleType:
    return source.load(mass_source(spec), "mass")


def cache_mass(call: CacheMassCall, *, tiling: MassTiling | None = None, splits: int | None = None) -> Tensor:
    """The op by generated kernels.

    Args:
        tiling, splits: instead of the tables' choice, for tests and tuning.

    Raises:
        UnsupportedError: no kernel takes this call.
        KernelError: a kernel could not be compiled or launched.
    """
    query, keys = call.query, call.keys
    (batch, heads, query_len, head_dim), (_, kv_heads, key_len, _) = query.shape, keys.shape
    served = query.dtype in DTYPES and keys.dtype == query.dtype and keys.stride(-1) == 1 and call.scale > 0 and query_len > 0
    need(served, f"{query_len} {query.dtype} queries, {keys.dtype} keys of strides {keys.stride()}, scale {call.scale}", _WHERE)
    dtype, group, rows = DTYPES[query.dtype], heads // kv_heads, batch * kv_heads
    tiling = tiling or choose_tiling(dtype, head_dim, group, query_len)
    spec = MassSpec(dtype, head_dim, group, tiling, call.softcap > 0)
    tiles = cdiv(group * query_len, tiling.rows)
    count = splits or choose_splits(cdiv(key_len, tiling.keys), rows * tiles, processors(query.device) * _PROGRAMS)
    part = torch.empty(2, rows, group * query_len, count, dtype=torch.float32, device=query.device)
    given: dict[str, Any] = {
        "query": query.contiguous(), "keys": keys, "positions": call.positions.to(torch.int32).contiguous(),
        "query_positions": call.query_positions.to(torch.int32).contiguous(), "kv_heads": kv_heads, "query_len": query_len,
        "key_len": key_len, "splits": count, "split_len": cdiv(key_len, count * tiling.keys) * tiling.keys,
        "part_m": part[0], "part_l": part[1], "mass": torch.empty(batch, heads, key_len, dtype=torch.float32, device=query.device),
        **logit_values(call.scale, call.softcap),
    }  # fmt: skip
    given |= stride_values(key=(keys, "bhn"))
    with launching(query.device, lambda: f"mass kernel ({spec})"):
        module = _module(spec)
        launch(module.row_sums, (count, tiles * rows), arguments(spec, "row_sums"), given, num_warps=tiling.warps, num_stages=3)
        given["lse"] = _lse(*part)
        launch(
            module.key_sums, (cdiv(key_len, tiling.keys), rows), arguments(spec, "key_sums"), given, num_warps=tiling.warps, num_stages=1
        )
    return given["mass"]


def _lse(m: Tensor, l: Tensor) -> Tensor:
    """Base-2 log of each row's sum, from its splits' along the last dimension; -inf for a row that sees nothing."""
    top = m.amax(-1)
    top = top.masked_fill(top == -torch.inf, 0)
    return top + (l * (m - top[..., None]).exp2()).sum(-1).log2()
