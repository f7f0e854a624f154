"""Pages of keys by generated kernels: their bounds, and which of them a token reads (Quest, arXiv 2406.10774). How many those are is known
on the device alone, so that CUDA graphs can hold it.
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from sparsify.backends.cache.codes_template import KEYS_AT, code_values
from sparsify.backends.cache.kernels import check_code_dims, check_fp8
from sparsify.backends.cache.pages_template import BOUNDS, CHOOSE, ORDERED, SCORE, SCORE_CLUSTERS
from sparsify.backends.codegen import source
from sparsify.backends.codegen.arguments import (
    Argument,
    check_head_dims,
    dot_precision,
    integers,
    padded,
    parameters,
    pointers,
    present,
)
from sparsify.backends.codegen.launch import DTYPES, launch, launching, need, stride_values
from sparsify.backends.codegen.template import header, render
from sparsify.ops import cache as cache_ops
from sparsify.ops.cache import CacheBoundsCall, CacheDecodeCall
from sparsify.ops.limits import cdiv
from sparsify.ops.pages import GROUP as CLUSTERS
from sparsify.ops.pages import Clusters, Pages
from sparsify.ops.quantised import GROUP

# pages whose scores one program of `choose` holds in registers; it reads more of them again for every bit
_HELD = 16384


@dataclass(frozen=True)
class BoundsSpec:
    """What decides the text of `bounds_of`.

    dtype: of keys and bounds, as `codegen.launch.DTYPES` names it.
    size: slots of a page.
    since: slots below a number of the row's have not changed.
    codes: "fp8" or "int4" where keys are codes; "": they lie as they came.
    """

    dtype: str
    head_dim: int
    size: int
    since: bool
    codes: str = ""

    def __post_init__(self):
        check_head_dims("sparsify::cache_bounds", self.head_dim)
        if self.codes:
            check_code_dims("sparsify::cache_bounds", self.codes, self.head_dim)

    @property
    def tile(self) -> int:
        """Pages of a program, whose least and largest numbers are registers."""
        return 16 if padded(self.head_dim) <= 128 else 8


@dataclass(frozen=True)
class PagesSpec:
    """What decides the text of `score` and `choose`.

    dtype: of queries, keys and bounds.
    group: query heads per KV head.
    size: slots of a page.
    lanes: scores that a program of `choose` holds at once.
    single: those are all of them.
    counted: a number of pages is read, no share.
    padded: tokens may be padding.
    grows: slot n holds token n.
    coded: keys are codes, but for those of some slots.
    clusters: pages of a prefix are clusters, which count by the means of their keys.
    reach: those of some groups of clusters are looked at, not all.
    limits: `choose` also tells the score of the last page that is taken.
    """

    dtype: str
    head_dim: int
    group: int
    size: int
    lanes: int
    single: bool
    counted: bool = False
    padded: bool = False
    grows: bool = False
    coded: bool = False
    clusters: bool = False
    reach: bool = False
    limits: bool = False

    def __post_init__(self):
        check_head_dims("sparsify::cache_decode", self.head_dim)

    @property
    def tile(self) -> int:
        """Pages of a program of `score`."""
        return 16 if self.dtype == "fp32" or self.head_dim > 128 else 64


@functools.lru_cache(maxsize=256)
def bounds_arguments(spec: BoundsSpec) -> tuple[Argument, ...]:
    """The arguments of `bounds_of`, in order."""
    listed = [*pointers("u8" if spec.codes else spec.dtype, "keys"), *pointers(spec.dtype, "bounds"), *pointers("i32", "positions")]
    if spec.codes:
        listed += [*pointers(spec.dtype, "key_scales", "recent_keys"), *pointers("i32", "staged"), *integers("groups")]
    return (*listed, *present((spec.since, pointers("i32", "since"))), *integers("capacity", aligned=True), *integers("pages"))


@functools.lru_cache(maxsize=256)
def arguments(spec: PagesSpec, kernel: str) -> tuple[Argument, ...]:
    """The arguments of "score", "choose", "score_groups" or "score_clusters", in order."""
    scores = pointers("fp32", "scores")
    if kernel == "choose":
        limits = present((spec.limits, pointers("i32", "limits")))
        return (*scores, *pointers("i32", "listed", "chosen"), *integers("pages", "most", "number"), *limits)
    if spec.clusters:
        groups = [*pointers("fp32", "group_scores"), *integers("groups")]
        listed = [*pointers(spec.dtype, "query", "bounds"), *pointers("i32", "prepared")]
        listed += [*integers("query_b", "query_h", aligned=True), *integers("kv_heads", "pages", "first_page")]
        if kernel == "score_groups":
            return (*listed, *groups)
        listed += [*pointers("i32", "counts"), *integers("capacity", aligned=True), *scores]
        listed += present((spec.reach, [*groups, *pointers("i32", "limits")]))
        return (*listed, *present((spec.padded, [Argument("is_token", "*u8"), *integers("is_token_b")])))
    listed = [*pointers(spec.dtype, "query", "bounds"), *pointers("i32", "positions", "counts", "seen"), *scores]
    listed += [*integers("query_b", "query_h", aligned=True), *integers("kv_heads"), *integers("capacity", aligned=True)]
    listed += integers("pinned", "pages", "always_sinks", "recent")
    listed += pointers("i32", "staged") if spec.coded else []
    return (*listed, *present((spec.padded, [Argument("is_token", "*u8"), *integers("is_token_b")])))


def bounds_source(spec: BoundsSpec) -> str:
    """Module text with `bounds_of` (grid: tiles of pages, batch * kv_heads)."""
    dim = padded(spec.head_dim)
    values = vars(spec) | {"guard": _guard(spec.head_dim), "parameters": parameters(bounds_arguments(spec))}
    if spec.codes:
        values |= code_values(spec.codes, spec.dtype, spec.head_dim, spec.head_dim) | {"qk_head_dim": spec.head_dim}
    constants = {"SIZE": spec.size, "PAGES": spec.tile, "DIM": dim}
    texts = [*([KEYS_AT] if spec.codes else []), BOUNDS]
    return "\n\n".join([header("Bounds of pages of keys", constants), *(render(text, values) for text in texts)])


def pages_source(spec: PagesSpec) -> str:
    """Module text with `choose` (grid: batch * kv_heads) and `score` (grid: tiles of pages, batch * kv_heads), or of clusters
    `score_groups` (grid: tiles of groups, batch * kv_heads) and `score_clusters` (as `score`)."""
    values = vars(spec) | {
        "guard": _guard(spec.head_dim),
        "precision": dot_precision(spec.dtype),
        "score_parameters": parameters(arguments(spec, "score_clusters" if spec.clusters else "score")),
        "groups_parameters": parameters(arguments(spec, "score_groups")) if spec.clusters else "",
        "choose_parameters": parameters(arguments(spec, "choose")),
    }
    constants = {"GROUP": spec.group, "ROWS": padded(spec.group), "SIZE": spec.size, "PAGES": spec.tile, "DIM": padded(spec.head_dim)}
    constants |= {"LANES": spec.lanes} | ({"CLUSTERS": CLUSTERS} if spec.clusters else {})
    texts = (ORDERED, SCORE_CLUSTERS if spec.clusters else SCORE, CHOOSE)
    return "\n\n".join([header("Pages of keys that one token reads", constants), *(render(text, values) for text in texts)])


def _guard(head_dim: int) -> str:
    return "" if padded(head_dim) == head_dim else f" & (dims < {head_dim})[None, :]"


@functools.lru_cache(maxsize=256)
def _bounds_module(spec: BoundsSpec) -> ModuleType:
    return source.load(bounds_source(spec), "bounds")


@functools.lru_cache(maxsize=256)
def _module(spec: PagesSpec) -> ModuleType:
    return source.load(pages_source(spec), "pages")


def cache_bounds(call: CacheBoundsCall) -> None:
    """The op by a generated kernel.

    Raises:
        UnsupportedError: no kernel takes this call.
        KernelError: the kernel could not be compiled or launched.
    """
    keys, bounds = call.keys, call.bounds
    where = f"sparsify::{CacheBoundsCall.NAME}"
    buffers, stored_as = [keys, bounds, call.positions], keys.dtype
    if call.key_scales is not None and call.recent_keys is not None and call.staged is not None:
        check_fp8(call.codes, keys.device, where)
        buffers, stored_as = [*buffers, call.key_scales, call.recent_keys, call.staged], call.recent_keys.dtype
        need(call.key_scales.dtype == stored_as, f"scales in {call.key_scales.dtype} beside {stored_as}", where)
    need(stored_as in DTYPES and bounds.dtype == stored_as, f"dtypes {stored_as} and {bounds.dtype}", where)
    need(all(t.is_contiguous() for t in buffers), "the cache's buffers are not contiguous", where)
    batch, kv_heads, capacity, _ = keys.shape
    spec = BoundsSpec(DTYPES[stored_as], bounds.shape[4], call.size, call.since is not None, call.codes)
    given = {**vars(call), "capacity": capacity, "pages": bounds.shape[2]}
    if call.key_scales is not None:
        given["groups"] = call.key_scales.shape[2]
    with launching(keys.device, lambda: f"bounds of pages ({spec})"):
        grid = (cdiv(bounds.shape[2], spec.tile), batch * kv_heads)
        launch(_bounds_module(spec).bounds_of, grid, bounds_arguments(spec), given, num_warps=4, num_stages=2)


def choose(call: CacheDecodeCall, pages: Pages) -> tuple[Tensor, Tensor]:
    """The pages that a token reads, which is counted as stored and is not yet.

    Args:
        call: checked, with bounds.

    Returns:
        int32 [batch * kv_heads, at most `pages.most`], in order of place; int32 [batch * kv_heads]: how many of them there are.
    """
    query, bounds, is_token = call.query, call.bounds, call.is_token
    assert bounds is not None, "bounds are given with pages"
    (batch, heads, _, head_dim), total, grows = query.shape, bounds.shape[2], call.pinned == cache_ops.NEVER_OVERWRITTEN
    rows, single = batch * call.kv_heads, total <= _HELD
    lanes = min(_HELD, max(64, padded(total))) if single else _HELD
    spec = PagesSpec(
        DTYPES[query.dtype], head_dim, heads // call.kv_heads, pages.size, lanes, single, pages.count > 0, is_token is not None, grows,
        bool(call.codes),
    )  # fmt: skip
    most = pages.most(call.capacity, call.sinks, grows, GROUP if call.codes else 0)
    make = functools.partial(torch.empty, device=query.device)
    listed, chosen = make(rows, most, dtype=torch.int32), make(rows, dtype=torch.int32)
    given = {
        **vars(call), "scores": make(rows, total, dtype=torch.float32), "listed": listed, "chosen": chosen, "kv_heads": call.kv_heads,
        "capacity": call.capacity, "pages": total, "most": most, "number": pages.count or pages.parts,
        "always_sinks": max(pages.sinks, call.sinks), "recent": pages.recent, **stride_values(query=(query, "bh")),
    }  # fmt: skip
    if is_token is not None:
        given |= {"is_token": is_token.view(torch.uint8), "is_token_b": is_token.stride(0)}
    if isinstance(pages, Clusters):
        return _choose_clusters(dataclasses.replace(spec, clusters=True, reach=pages.reach > 0), pages, given)
    with launching(query.device, lambda: f"pages kernel ({spec})"):
        module = _module(spec)
        launch(module.score, (cdiv(total, spec.tile), rows), arguments(spec, "score"), given, num_warps=4, num_stages=1)
        launch(module.choose, (rows,), arguments(spec, "choose"), given, num_warps=min(16, max(4, lanes // 256)), num_stages=1)
    return listed, chosen


def _choose_clusters(spec: PagesSpec, pages: Clusters, given: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """As `choose`. given: its arguments of kernels."""
    device, total, rows, looked_at = given["query"].device, given["pages"], len(given["chosen"]), pages.groups
    given = {**given, "first_page": pages.first}
    with launching(device, lambda: f"clusters kernel ({spec})"):
        module = _module(spec)
        if looked_at is not None:
            groups = cdiv(total, CLUSTERS)
            single = groups <= _HELD
            lanes = min(_HELD, max(64, padded(groups))) if single else _HELD
            of_groups = dataclasses.replace(spec, lanes=lanes, single=single, limits=True)
            make = functools.partial(torch.empty, device=device)
            given |= {"group_scores": make(rows, groups, dtype=torch.float32), "groups": groups, "limits": make(rows, dtype=torch.int32)}
            own = given | {"scores": given["group_scores"], "pages": groups, "most": groups, "number": looked_at.count or looked_at.parts}
            own |= {"listed": make(rows, groups, dtype=torch.int32), "chosen": make(rows, dtype=torch.int32)}
            launch(module.score_groups, (cdiv(groups, spec.tile), rows), arguments(spec, "score_groups"), given, num_warps=4, num_stages=1)
            launch(_module(of_groups).choose, (rows,), arguments(of_groups, "choose"), own, num_warps=4, num_stages=1)
        launch(module.score_clusters, (cdiv(total, spec.tile), rows), arguments(spec, "score_clusters"), given, num_warps=4, num_stages=1)
        launch(module.choose, (rows,), arguments(spec, "choose"), given, num_warps=8 if spec.lanes > 1024 else 4, num_stages=1)
    return given["listed"], given["chosen"]
