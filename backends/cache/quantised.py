"""Decode attention over a cache in 8 or 4 bits by generated kernels: codes are read as they lie, and turned into numbers in registers
(KIVI, arXiv 2402.02750). As `backends.cache.decode`, after a small kernel that turns a full group of slots into codes. Where pages are
chosen (`backends.cache.pages`), that is between the two.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from sparsify.backends.cache import pages as page_kernels
from sparsify.backends.cache.codes_template import KEYS_AT, PIECE, code_values
from sparsify.backends.cache.decode_template import COMBINE, RENEW_BOUNDS
from sparsify.backends.cache.kernels import check_code_dims, check_codes, logit_arguments, logit_values, packed_values, partial_sums
from sparsify.backends.cache.quantised_template import KEEP, SPLIT
from sparsify.backends.codegen import source
from sparsify.backends.codegen.arguments import (
    NUMBERS,
    Argument,
    constexprs,
    dot_precision,
    head_dim_values,
    integers,
    parameters,
    pointers,
    present,
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
from sparsify.ops.quantised import (
    FP8_LARGEST,
    GROUP,
    LARGEST_EXPONENT,
    LARGEST_STEP,
    LEAST_EXPONENT,
    LEAST_STEP,
)

_WHERE = f"sparsify::{CacheDecodeCall.NAME}"
# thread blocks per multiprocessor that a split aims at: registers hold so many of two warps
_PROGRAMS = 4
# columns of a product: query heads, once for each page of a tile
_COLUMNS = 128


@dataclass(frozen=True)
class QuantisedSpec:
    """What decides the kernels' text.

    dtype: of queries, outputs, recent tokens and scales, as `codegen.launch.DTYPES` names it.
    codes: "fp8" or "int4".
    qk_head_dim, v_head_dim: powers of two.
    group: query heads per KV head.
    softcap, sink_logits: whether the call has them.
    padded: tokens may be padding.
    grows: no slot is ever overwritten.
    packed: heads have numbers of slots of their own, side by side.
    warps, stages: Triton's launch options of `split`.
    page: slots of the pages that are read along a list; 0: all slots are.
    early: with pages, programs of `split` begin before those of the kernel that lists them have ended (programmatic dependent launch).
    """

    dtype: str
    codes: str
    qk_head_dim: int
    v_head_dim: int
    group: int
    softcap: bool = False
    sink_logits: bool = False
    padded: bool = False
    grows: bool = False
    packed: bool = False
    warps: int = 2
    stages: int = 3
    page: int = 0
    early: bool = False

    def __post_init__(self):
        check_code_dims(_WHERE, self.codes, self.qk_head_dim, self.v_head_dim)
        if self.group > 128:
            raise UnsupportedError(f"no decode kernel has {self.group} query heads per KV head", where=_WHERE)
        if self.rows * self.spread > _COLUMNS:
            what = f"codes in pages of {self.page} slots, {self.group} query heads per KV head"
            raise UnsupportedError(what, where=_WHERE, hint="larger pages")

    @property
    def rows(self) -> int:
        """Columns of a product that the group's query heads take."""
        return max(8, power_of_two(self.group))

    @property
    def spread(self) -> int:
        """Pages of a tile."""
        return GROUP // self.page if self.page else 1


@functools.lru_cache(maxsize=512)
def arguments(spec: QuantisedSpec, kernel: str) -> tuple[Argument, ...]:
    """The arguments of "split", "combine" or "close_group", in order."""
    data = functools.partial(pointers, spec.dtype)
    heads = pointers("i32", "starts") if spec.packed else []
    around = [*data("key_scales", "value_scales", "recent_keys", "recent_values"), *pointers("i32", "staged", "positions")]
    capacity = integers("capacity", aligned=True)
    paged = [*data("bounds"), *integers("pages")] if spec.page else []
    if kernel == "close_group":
        return (*heads, *pointers("u8", "keys", "values"), *around, *integers("kv_heads"), *capacity, *integers("groups"), *paged)
    shared = pointers("fp32", "part_m", "part_l", "part_acc")
    sizes, logit = [*integers("kv_heads"), *capacity, *integers("splits")], logit_arguments(spec.softcap)
    counters = pointers("i32", "counts", "seen", "slots")
    token = integers("query_b", "query_h", "key_b", "key_h", "value_b", "value_h", "out_b", "out_h", aligned=True)
    if kernel == "split":
        codes = [*pointers("u8" if spec.codes == "fp8" else "i16", "key_codes"), *pointers("i16", "value_words")]
        listed = [*heads, *data("query"), *codes, *around, *counters, *shared, *token[:2], *sizes, *integers("groups", "pinned"), *logit]
        listed += [*pointers("i32", "listed", "chosen"), *integers("most")] if spec.page else []
        return (*listed, *present((spec.padded, [Argument("is_token", "*u8"), *integers("is_token_b")])))
    listed = [*data("query", "key", "value", "recent_keys", "recent_values"), *pointers("i32", "staged"), *counters]
    listed += [*pointers("i64", "length"), *shared, *data("out"), *token, *sizes, *logit]
    listed += [*pointers("u8", "keys"), *data("key_scales"), *integers("groups"), *paged] if spec.page else []
    return (*heads, *listed, *present((spec.sink_logits, pointers("fp32", "sink_logits"))), *constexprs("SPLITS"))


def quantised_source(spec: QuantisedSpec) -> str:
    """Module text with `close_group` (grid: batch * kv_heads), `split` (splits, batch * kv_heads), `combine` (group, batch * kv_heads)."""
    values = vars(spec) | {
        **head_dim_values(spec.dtype, spec.qk_head_dim, spec.v_head_dim),
        **dict.fromkeys(("qk_mask", "v_mask", "qk_store"), ""),
        "page": spec.page,
        "spread": spec.spread,
        "paged": ", group_bounds, left" if spec.page else "",
        **packed_values(spec.packed),
        **code_values(spec.codes, spec.dtype, spec.qk_head_dim, spec.v_head_dim),
        "number": f"tl.{NUMBERS[spec.dtype]}",
        "precision": dot_precision(spec.dtype),
        "context": "tanh_scale, cap_log2" if spec.softcap else "scale",
        "fp8_step": 1 / FP8_LARGEST,
        "least_exponent": LEAST_EXPONENT,
        "largest_exponent": LARGEST_EXPONENT,
        "least_step": LEAST_STEP,
        "largest_step": LARGEST_STEP,
        **{f"{name}_parameters": parameters(arguments(spec, kernel)) for name, kernel in
           (("split", "split"), ("combine", "combine"), ("close", "close_group"))},
    }  # fmt: skip
    constants = {
        "GROUP": spec.group, "ROWS": spec.rows, "KEYS": GROUP, "QK_DIM": spec.qk_head_dim, "V_DIM": spec.v_head_dim,
        "QK_WIDTH": values["qk_width"], "QK_WORDS": values["qk_width"], "V_WIDTH": values["v_width"], "LOG2E": LOG2E,
    }  # fmt: skip
    constants |= {"PAGE": spec.page, "SPREAD": spec.spread} if spec.page else {}
    texts = (PIECE, KEYS_AT, *([RENEW_BOUNDS] if spec.page else []), SPLIT, COMBINE, KEEP)
    title = f"Attention of one token over a cache of {spec.codes} codes"
    return "\n\n".join([header(title, constants), *(render(text, values) for text in texts)])


@functools.lru_cache(maxsize=256)
def _module(spec: QuantisedSpec) -> ModuleType:
    return source.load(quantised_source(spec), "quantised")


def paged_options(codes: str, page: int, group: int) -> dict[str, int]:
    """What a spec says of codes that are read along a list: products have a column for each page of a tile and query head, and sums of
    4-bit codes' quarters leave few registers for what runs ahead."""
    wide = GROUP // page * max(8, power_of_two(group)) > 32
    return {"page": page, "warps": 4 if wide else 2, "stages": 2 if codes == "int4" else 5}


def cache_decode(call: CacheDecodeCall, *, splits: int | None = None) -> Tensor:
    """The op over codes by generated kernels.

    Args:
        splits: instead of the choice by sizes, for tests and tuning.

    Raises:
        UnsupportedError: no kernel takes this call.
        KernelError: a kernel could not be compiled or launched.
    """
    query, is_token, key_scales = call.query, call.is_token, call.key_scales
    _check(call)
    assert key_scales is not None, "checked"
    (batch, heads, _, qk_head_dim), kv_heads, capacity, v_head_dim = query.shape, call.kv_heads, call.capacity, call.value.shape[3]
    rows, grows, pages = batch * kv_heads, call.pinned == cache_ops.NEVER_OVERWRITTEN, call.pages
    listing = {} if pages is None else paged_options(call.codes, pages.size, heads // kv_heads)
    spec = QuantisedSpec(
        DTYPES[query.dtype], call.codes, qk_head_dim, v_head_dim, heads // kv_heads, call.softcap > 0, call.sink_logits is not None,
        is_token is not None, grows, call.starts is not None, early=pages is not None and overlaps(query.device), **listing,
    )  # fmt: skip
    read = capacity if pages is None else min(capacity, pages.most(capacity, call.sinks, grows, GROUP) * pages.size)
    count = splits or choose_splits(cdiv(read, GROUP), rows, processors(query.device) * _PROGRAMS)
    out = cache_ops.empty_output(call)
    given: dict[str, Any] = {
        **vars(call), "out": out, "kv_heads": kv_heads, "capacity": capacity, "groups": key_scales.shape[2], "splits": count,
        "key_codes": call.keys if call.codes == "fp8" else call.keys.view(torch.int16), "value_words": call.values.view(torch.int16),
        "SPLITS": max(2, power_of_two(count)), "slots": torch.empty(rows, dtype=torch.int32, device=query.device),
        **logit_values(call.scale, call.softcap), **partial_sums(rows * spec.group * count, v_head_dim, query.device),
        **stride_values(query=(query, "bh"), key=(call.key, "bh"), value=(call.value, "bh"), out=(out, "bh")),
    }  # fmt: skip
    if call.sink_logits is not None:
        given["sink_logits"] = call.sink_logits.float().contiguous()
    if is_token is not None:
        given |= {"is_token": is_token.view(torch.uint8), "is_token_b": is_token.stride(0)}
    with launching(query.device, lambda: f"quantised decode kernel ({spec})"):
        module = _module(spec)
        if pages is not None and call.bounds is not None:
            given["pages"] = call.bounds.shape[2]
        launch(module.close_group, (rows,), arguments(spec, "close_group"), given, num_warps=8, num_stages=1)
        if pages is not None:
            listed, chosen = page_kernels.choose(call, pages)
            given |= {"listed": listed, "chosen": chosen, "most": listed.shape[1]}
        options = {"num_warps": spec.warps, "num_stages": spec.stages, **({"launch_pdl": True} if spec.early else {})}
        launch(module.split, (count, rows), arguments(spec, "split"), given, **options)
        launch(module.combine, (spec.group, rows), arguments(spec, "combine"), given, num_warps=4)
    return out


def _check(call: CacheDecodeCall) -> None:
    query = call.query
    check_codes(call, _WHERE)
    numbers = (query, call.key, call.value)
    need(all(t.dtype == query.dtype for t in numbers) and query.dtype in DTYPES, f"dtypes beside {query.dtype}", _WHERE)
    need(all(t.stride(-1) == 1 for t in (query, call.key, call.value)), "strided head dimensions", _WHERE)
    bounds = call.bounds
    need(bounds is None or (bounds.is_contiguous() and bounds.dtype == query.dtype), "bounds that are strided or of another dtype", _WHERE)
    need(call.pages is None or call.starts is None, "pages of slots by head", _WHERE)
    need(-1 <= call.pinned < call.capacity and call.scale > 0, f"{call.pinned} pinned slots of {call.capacity}, scale {call.scale}", _WHERE)
