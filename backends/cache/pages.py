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
from sparsify.backends.cache.pages_template import BOUNDS, CHOOSE, SCORE
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
    unspecialised,
)
from sparsify.backends.codegen.launch import DTYPES, launch, launching, need, overlaps, stride_values
from sparsify.backends.codegen.template import header, render
from sparsify.ops import cache as cache_ops
from sparsify.ops.cache import CacheBoundsCall, CacheDecodeCall
from sparsify.ops.limits import cdiv
from sparsify.ops.pages import GROUP as CLUSTERS
from sparsify.ops.pages import Clusters, Pages
from sparsify.ops.quantised import GROUP

# Scores lie in pieces of so many lanes, one for each thread. A program holds up to the last number of pieces in registers; more it
# reads again for every count. Few numbers of pieces, so that few kernels are compiled: capacities are often a little more than a power
# of two.
_LANES = 256
_PIECES = (1, 2, 3, 5, 6, 10, 12, 18, 20, 24, 34, 36, 40, 48, 64)
_CHOOSING_WARPS = 8


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
class PagesTiling:
    """How scoring is cut.

    pages, warps: of a program.
    """

    pages: int
    warps: int


@dataclass(frozen=True)
class PagesSpec:
    """What decides the text of `score` and `choose`.

    dtype: of queries, keys and bounds.
    group: query heads per KV head.
    size: slots of a page.
    tiling: how scoring is cut.
    kind: what is listed, by what: pages by "bounds" of their keys, "groups" of clusters or "clusters" by the means of theirs.
    lanes, pieces: of a piece of scores; pieces that a program holds at once.
    single: those are all of them.
    counted: a number of pages is read, no share.
    padded: tokens may be padding.
    grows: slot n holds token n.
    coded: keys are codes, but for those of some slots.
    early: programs of `choose`, and of what reads the list, begin before those of the kernel before have ended, and wait for that.
    reach: pieces in which scores of groups of clusters lie, of which some are looked at; 0: all clusters are.
    """

    dtype: str
    head_dim: int
    group: int
    size: int
    tiling: PagesTiling
    kind: str
    lanes: int
    pieces: int
    single: bool
    counted: bool = False
    padded: bool = False
    grows: bool = False
    coded: bool = False
    reach: int = 0
    early: bool = False

    def __post_init__(self):
        check_head_dims("sparsify::cache_decode", self.head_dim)

    @property
    def listed(self) -> str:
        """The argument that says of how many scores some are listed."""
        return "groups" if self.kind == "groups" else "pages"


def choose_tiling(dtype: str, head_dim: int) -> PagesTiling:
    """Bounds of a program fill half of its registers. More warps share more pages no better: scoring took a fifth longer with 8."""
    return PagesTiling(16, 4) if dtype == "fp32" or head_dim > 128 else PagesTiling(64, 4)


def held(scores: int) -> tuple[int, bool]:
    """Pieces of scores that a program of `choose` holds at once, and whether those are all of them."""
    pieces = cdiv(scores, _LANES)
    return next((some for some in _PIECES if some >= pieces), _PIECES[-1]), pieces <= _PIECES[-1]


@functools.lru_cache(maxsize=256)
def bounds_arguments(spec: BoundsSpec) -> tuple[Argument, ...]:
    """The arguments of `bounds_of`, in order."""
    listed = [*pointers("u8" if spec.codes else spec.dtype, "keys"), *pointers(spec.dtype, "bounds"), *pointers("i32", "positions")]
    if spec.codes:
        listed += [*pointers(spec.dtype, "key_scales", "recent_keys"), *pointers("i32", "staged"), *integers("groups")]
    return (*listed, *present((spec.since, pointers("i32", "since"))), *integers("capacity", aligned=True), *integers("pages"))


@functools.lru_cache(maxsize=256)
def arguments(spec: PagesSpec, kernel: str) -> tuple[Argument, ...]:
    """The arguments of "score" or "choose", in order."""
    clusters = spec.kind != "bounds"
    # a row's stride is any number to the compiler, so that its layouts have one lane a thread
    scores = [*pointers("fp32", "scores"), *integers("span", specialised=False)]
    picked = [*pointers("i32", "listed", "chosen"), *integers("most", "number")]
    picked += present((spec.kind == "groups", pointers("fp32", "limits")))
    if kernel == "choose":
        return (*scores, *integers(spec.listed), *picked)
    listed = [*pointers(spec.dtype, "query", "bounds"), *scores]
    listed += [*integers("query_b", "query_h", aligned=True), *integers("kv_heads", "pages")]
    listed += present((clusters, [*pointers("i32", "prepared"), *integers("first_page")]))
    if spec.kind == "groups":
        listed += integers("groups")
    else:
        listed += [*pointers("i32", "counts"), *integers("capacity", aligned=True)]
        listed += present((spec.padded, [Argument("is_token", "*u8"), *integers("is_token_b")]))
        listed += present((not clusters, [*pointers("i32", "positions", "seen"), *integers("pinned", "always_sinks", "recent")]))
        listed += present((not clusters and spec.coded, pointers("i32", "staged")))
        listed += present((spec.reach > 0, [*pointers("fp32", "group_scores", "limits"), *integers("group_span")]))
    return tuple(listed)


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
    """Module text with `score` (grid: tiles of pages, batch * kv_heads) and `choose` (grid: batch * kv_heads)."""
    whole = 1 << spec.pieces.bit_length() - 1
    sizes = {0: whole} | ({whole: spec.pieces - whole} if spec.pieces > whole else {})
    values = vars(spec) | {
        "guard": _guard(spec.head_dim),
        "precision": dot_precision(spec.dtype),
        "listed": spec.listed,
        "lane_of": _lane_of,
        "unspecialised": unspecialised(arguments(spec, "score")),
        # tensors have sizes of powers of two
        "begins": list(sizes),
        "sizes": sizes,
        "score_parameters": parameters(arguments(spec, "score")),
        "choose_parameters": parameters(arguments(spec, "choose")),
    }
    constants = {"GROUP": spec.group, "ROWS": padded(spec.group), "DIM": padded(spec.head_dim)}
    constants |= {
        "SIZE": spec.size,
        "PAGES": spec.tiling.pages,
        "LANES": spec.lanes,
        "PIECES": spec.pieces,
        "SPAN": spec.lanes * spec.pieces,
    }
    constants |= {"CLUSTERS": CLUSTERS} if spec.kind != "bounds" else {}
    texts = (SCORE, CHOOSE)
    return "\n\n".join([header("Pages of keys that one token reads", constants), *(render(text, values) for text in texts)])


def _lane_of(name: str, pieces: int, lanes: int) -> str:
    """Where the score of the page `name` lies in its row: so many neighbours as there are pieces are in one lane."""
    if pieces == 1:
        return name
    span = lanes * pieces
    return f"({name} // {span} * {span} + {name} % {pieces} * {lanes} + {name} % {span} // {pieces})"


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


def choose(call: CacheDecodeCall, pages: Pages, *, tiling: PagesTiling | None = None) -> tuple[Tensor, Tensor]:
    """The pages that a token reads, which is counted as stored and is not yet.

    Args:
        call: checked, with bounds.
        tiling: instead of the table's choice, for tests and tuning.

    Returns:
        int32 [batch * kv_heads, at most `pages.most`], in order of place; int32 [batch * kv_heads]: how many of them there are.
    """
    query, bounds, is_token = call.query, call.bounds, call.is_token
    assert bounds is not None, "bounds are given with pages"
    (batch, heads, _, head_dim), total, grows = query.shape, bounds.shape[2], call.pinned == cache_ops.NEVER_OVERWRITTEN
    rows, dtype = batch * call.kv_heads, DTYPES[query.dtype]
    most = pages.most(call.capacity, call.sinks, grows, GROUP if call.codes else 0)
    pieces, single = held(total)
    spec = PagesSpec(
        dtype, head_dim, heads // call.kv_heads, pages.size, tiling or choose_tiling(dtype, head_dim), "bounds", _LANES, pieces, single,
        counted=pages.count > 0, padded=is_token is not None, grows=grows, coded=bool(call.codes), early=overlaps(query.device),
    )  # fmt: skip
    given = {
        **vars(call), "kv_heads": call.kv_heads, "capacity": call.capacity, "pages": total,
        "always_sinks": max(pages.sinks, call.sinks), "recent": pages.recent, **stride_values(query=(query, "bh")),
    }  # fmt: skip
    if is_token is not None:
        given |= {"is_token": is_token.view(torch.uint8), "is_token_b": is_token.stride(0)}
    with launching(query.device, lambda: f"pages kernel ({spec})"):
        if isinstance(pages, Clusters):
            spec, given = dataclasses.replace(spec, kind="clusters"), given | {"first_page": pages.first}
            if pages.groups is not None:
                groups = cdiv(total, CLUSTERS)
                of_groups = dataclasses.replace(spec, kind="groups", **dict(zip(("pieces", "single"), held(groups))))
                given |= {"groups": groups, "limits": torch.empty(rows, dtype=torch.float32, device=query.device)}
                own = _list(of_groups, given, rows, groups, groups, pages.groups)
                given |= {"group_scores": own["scores"], "group_span": own["span"]}
                spec = dataclasses.replace(spec, reach=of_groups.pieces)
        found = _list(spec, given, rows, total, most, pages)
    return found["listed"], found["chosen"]


def _list(spec: PagesSpec, given: dict[str, Any], rows: int, scores: int, most: int, pages: Pages) -> dict[str, Any]:
    """Launches what scores, and lists the best.

    given: arguments of kernels.
    scores: of a row.
    most: of them that are listed.

    Returns:
        the arguments, with those of what was found: scores, listed, chosen.
    """
    make = functools.partial(torch.empty, device=given["query"].device)
    span = cdiv(scores, spec.lanes * spec.pieces) * spec.lanes * spec.pieces
    found = given | {"scores": make(rows, span, dtype=torch.float32), "span": span, "most": most, "number": pages.count or pages.parts}
    found |= {"listed": make(rows, most, dtype=torch.int32), "chosen": make(rows, dtype=torch.int32)}
    module, grid = _module(spec), (cdiv(scores, spec.tiling.pages), rows)
    launch(module.score, grid, arguments(spec, "score"), found, num_warps=spec.tiling.warps, num_stages=1)
    options = {"num_warps": _CHOOSING_WARPS, "num_stages": 1, **({"launch_pdl": True} if spec.early else {})}
    launch(module.choose, (rows,), arguments(spec, "choose"), found, **options)
    return found
