"""From a spec of one block selection to the text of its Triton kernels, which have exactly its clauses. Needs neither a GPU nor Triton."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, get_args

from sparsify.backends.codegen.arguments import (
    ITEM_BYTES,
    NUMBERS,
    Argument,
    constexprs,
    descriptor,
    floats,
    integers,
    parameters,
    pointers,
    present,
    unspecialised,
)  # fmt: skip
from sparsify.backends.codegen.template import render
from sparsify.backends.select import choose_template, prepare, row_template, score_template, stream_template
from sparsify.errors import UnsupportedError
from sparsify.ops.estimate import EXACT, Estimate, Pool
from sparsify.ops.limits import SCORE_TILE, SCORE_TILE_INT8, SCORE_TILES_AT_ONCE, SCORE_TILES_AT_ONCE_INT8, cdiv
from sparsify.ops.selection import DENSITY_BITS, RULES


@dataclass(frozen=True)
class SelectTiling:
    """How `score` cuts its work.

    rows, cols: query and key cells of a tile. warps, stages: Triton's launch options. per_sm: programs per multiprocessor.
    band: row tiles that are walked together, column by column, so that neighbours in time share the L2 cache.
    tma: operands come through tensor descriptors, which need compute capability 9.0, instead of pointers.
    """

    rows: int
    cols: int
    warps: int
    stages: int
    per_sm: int
    tma: bool
    band: int = 16


# 128 x 256 runs at 94 % of cuBLAS on an H200 (registers 255, no spills); it needs 197 KB of shared memory.
TMA_TILING = SelectTiling(*SCORE_TILE, 8, 4, SCORE_TILES_AT_ONCE, True)
# 8 bits halve the products' time and no exponential's: of two programs one multiplies while the other sums up (8 % faster on an H200)
INT8_TILING = SelectTiling(*SCORE_TILE_INT8, 4, 3, SCORE_TILES_AT_ONCE_INT8, True, band=32)
# 96 KB: fits every GPU from compute capability 8.0 on
POINTER_TILING = SelectTiling(128, 128, 8, 3, 1, False)
# bytes of the largest cells that are multiplied whole
WHOLE_CELL = 512


@dataclass(frozen=True)
class SelectSpec:
    """What decides the kernels' text; numbers that may differ between calls are arguments.

    group: query heads per KV head.
    estimate: what is multiplied; `dtype` is what the op gets.
    window: "none", "one" or "per_head" (a tensor; 0 = none for that head).
    rule: how blocks are chosen, a name in `sparsify.ops.selection.RULES`.
    wide: rows of key blocks do not fit in registers.
    importance: `choose` also stores importances, for tests.
    streamed: a tile of query cells stays while keys pass by (`stream_template`).
    grouped: the first of two stages: one list for all heads of a group.
    listed: the second of two stages: blocks that a coarser one lists are scored and chosen among. Its tiles have the cells of as many heads
        of a group as `tiling.rows` holds.
    finer: cells of a second stage that are cut out of one of the first, whose scale they share.
    min_share: cells also keep what holds a least share of their mass, which is an argument.
    """

    dtype: str
    head_dim: int
    group: int
    stride: int
    block: int
    tiling: SelectTiling
    estimate: Estimate = EXACT
    reduce: str = "max"
    causal: bool = True
    window: str = "none"
    key_flags: bool = False
    segments: bool = False
    has_start: bool = False
    rule: str = "tau"
    wide: bool = False
    importance: bool = False
    streamed: bool = False
    grouped: bool = False
    listed: bool = False
    finer: int = 1
    min_share: bool = False

    def __post_init__(self):
        impossible = {
            f"dtype {self.dtype}": self.dtype not in ITEM_BYTES,
            f"stride {self.stride}": self.stride not in (4, 8, 16),
            f"block {self.block} at a span of {self.span}": self.block % self.span != 0 or self.block % self.stride != 0,
            f"window {self.window!r}": self.window not in ("none", "one", "per_head"),
            f"rule {self.rule!r}": self.rule not in RULES,
            f"pooling by {self.reduce!r}": self.reduce not in get_args(Pool),
            "a density under the row rule": self.reduce == "row" and self.rule == "density",
            f"tiles of {self.tiling.rows} x {self.tiling.cols} cells": self.tiling.rows % max(1, self.block // self.span) != 0
            or self.tiling.cols * self.stride % self.block != 0,
            "keys that pass by in a call of another kind": self.streamed
            and (self.wide or self.key_flags or self.segments or self.window != "none" or self.shared > 1 or self.rule == "density"),
            "a stage without keys that pass by": (self.grouped or self.listed) and not self.streamed,
            f"keys that pass by, pooling by {self.reduce!r}": self.streamed and self.reduce != "row",
            "stored importances of wide rows": self.wide and self.importance,
            f"a least share of a block pooled by {self.reduce!r}": self.min_share and self.reduce != "row",
            "a least share in lists of groups": self.min_share and self.grouped,
        }
        for what, wrong in impossible.items():
            if wrong:
                raise UnsupportedError(f"no selection kernel has {what}", where="sparsify::select_blocks")

    @property
    def span(self) -> int:
        """Query rows from one scored cell to the next."""
        return self.estimate.span(self.stride)

    @property
    def steps(self) -> int:
        """Products of tokens, or of neighbours' means, in one score."""
        return self.stride // self.estimate.merge

    @property
    def scored(self) -> int:
        """Scored heads per KV head."""
        return 1 if self.estimate.group else self.group

    @property
    def shared(self) -> int:
        """Query heads that share a scored head."""
        return self.group if self.estimate.group else 1

    @property
    def depth(self) -> int:
        """Numbers of a token per step: a swizzled row of 128 bytes, or of 64 when that wastes less of the head dim."""
        full = 128 // (1 if self.estimate.int8 else ITEM_BYTES[self.dtype])
        return min((full, full // 2), key=lambda d: (cdiv(self.head_dim, d) * d, -d))

    @property
    def sharing(self) -> int:
        """Key cells that share a scale: those of a block, where integers of a block are compared."""
        return self.block // self.stride if self.estimate.int8 and self.estimate.peak else 1

    @property
    def dims(self) -> int:
        """Numbers of a token in a tile that keys pass by."""
        return max(16, 1 << (self.head_dim - 1).bit_length())

    @property
    def whole(self) -> bool:
        """Whether whole cells are multiplied at once, so that a tile of queries stays in shared memory while keys pass by."""
        return self.steps * self.dims * (1 if self.estimate.int8 else ITEM_BYTES[self.dtype]) <= WHOLE_CELL

    @property
    def triangular(self) -> bool:
        """Whether scratch of a tile that keys pass by has as many places for a query block as that may see."""
        return self.causal and not self.has_start

    @property
    def skips(self) -> bool:
        """Whether heads that keep everything are not scored: those of a launch are told apart by their thresholds."""
        return self.streamed and self.rule == "taus" and not (self.grouped or self.listed or self.importance)

    @property
    def tile_heads(self) -> int:
        """Heads whose cells a tile of a second stage has."""
        return self.tiling.rows * self.span // self.block

    @property
    def tile_blocks(self) -> int:
        """Key blocks of a column tile."""
        return self.tiling.cols * self.stride // self.block

    def describe(self) -> str:
        """One line: `bf16, head dim 128, stride 8, block 128, max; causal, key flags; density`."""
        clauses = {
            "causal": self.causal,
            f"window {self.window}": self.window != "none",
            "key flags": self.key_flags,
            "segments": self.segments,
            "start from a tensor": self.has_start,
        }
        one = self.estimate
        pool = self.reduce + (", half the query cells" if one.half else "") + (", shared by a group" if self.shared > 1 else "")
        pool += (f", means of {one.merge} tokens" if one.merge > 1 else "") + (", 8 bits" if one.int8 else "")
        pool += ", highest scores" if one.peak else ""
        pool += ", a least share" if self.min_share else ""
        kept = ", ".join(name for name, on in clauses.items() if on) or "no mask"
        return f"{self.dtype}, head dim {self.head_dim}, stride {self.stride}, block {self.block}, {pool}; {kept}; {self.rule}"


# threads that share a row of what tensor cores multiply
_LANES = 4
# lengths and numbers that change from call to call: specialising on them would compile once more for each that divides by 16 or is 1
_runtime = functools.partial(integers, specialised=False)


def _mask_arguments(spec: SelectSpec, flags: list[Argument], *segments: str) -> list[Argument]:
    return present(
        (spec.key_flags, [*flags, *_runtime("flags_batch")]),
        (spec.segments, [*pointers("i32", *segments), *_runtime("segments_batch")]),
        (spec.window == "one", _runtime("window")),
        (spec.window == "per_head", pointers("i32", "windows")),
    )


def _candidate_masks(spec: SelectSpec) -> list[Argument]:
    flags = [*pointers("u8", "block_bits"), *pointers("i32", "sink_blocks")]
    return _mask_arguments(spec, flags, "rows_low", "rows_high", "block_low", "block_high")


def _start(spec: SelectSpec) -> list[Argument]:
    return [] if spec.has_start else _runtime("start")


@functools.lru_cache(maxsize=512)
def arguments(spec: SelectSpec, kernel: str) -> tuple[Argument, ...]:
    """The arguments of "score", "choose", "pool", "pick" or "prepare_cells", in order."""
    if kernel == "prepare_cells":
        return prepare.arguments(spec.dtype, spec.estimate.int8)
    start_at = pointers("i64", "start_at") if spec.has_start else []
    listed = [*pointers("i32", "listed_counts"), *pointers("i16", "listed_indices")] if spec.listed else []
    sums = pointers("fp16", "logs") if spec.streamed else [*pointers("fp16", "sums"), *pointers("fp32", "tops")]
    if kernel == "score":
        flags = pointers("i32", "key_first", "query_last", *["key_last"] * (spec.window != "none"))
        masks = _mask_arguments(spec, flags, "query_low", "query_high", "key_low", "key_high")
        strides = [] if spec.tiling.tma else integers("q_b", "q_h", "q_n", "k_b", "k_h", "k_n", aligned=True)
        numbers = _runtime("batch", "scored_heads", "query_len", "key_len", "query_cells", "first_cell", "end_cell")
        scales = pointers("fp32", "query_scales", "key_scales") if spec.estimate.int8 else []
        if spec.streamed:
            numbers = _runtime("heads", *_lists_batch(spec), "query_len", "key_len", "query_cells", "first_block", "blocks", "first_seen")
            skipped = pointers("fp32", "thresholds") if spec.skips else []
            return (*_cells(spec), *scales, *sums, *listed, *skipped, *start_at, *strides, *floats("scale"), *numbers, *_start(spec))
        return (*_cells(spec), *scales, *sums, *start_at, *masks, *strides, *floats("scale"), *numbers, *_start(spec))
    lists, importances = [*pointers("i32", "counts"), *pointers("i16", "indices")], pointers("fp32", "importances")
    kinds = {"fp32": floats, "i32": _runtime, "*fp32": functools.partial(pointers, "fp32")}
    rule = [kinds[argument.type](argument.name) for argument in RULES[spec.rule].arguments]
    rule += [floats("min_share")] if spec.min_share else []
    chosen = [*start_at, *_candidate_masks(spec), *itertools.chain(*rule)]
    lengths = ["heads", "query_len", "key_len"]
    rows = ["query_cells", "first_cell", "row_count"]
    if kernel == "pool":
        choosing = chosen if spec.reduce == "row" else start_at
        return (*sums, *importances, *choosing, *_runtime(*lengths, *rows, "first_block"), *_start(spec), *constexprs("TILES", "PART"))
    if kernel == "pick":
        return (*lists, *importances, *chosen, *_runtime("counts_batch", *lengths, "first_block"), *_start(spec), *constexprs("WIDTH"))
    stored = importances if spec.importance else []
    if spec.streamed:
        numbers = _runtime("counts_batch", *_lists_batch(spec), *lengths, "query_cells", "begin", "first_block", "blocks", "first_seen")
        constants = constexprs("PLACES", "CELLS", "LEAST", "SPREAD", "VECTOR", "WORD")
        return (*sums, *lists, *listed, *stored, *chosen, *numbers, *_start(spec), *constants)
    return (*sums, *lists, *stored, *chosen, *_runtime("counts_batch", *lengths, *rows, "first_block"), *_start(spec), *constexprs("TILES"))


def _lists_batch(spec: SelectSpec) -> list[str]:
    return ["lists_batch"] if spec.listed else []


def _cells(spec: SelectSpec) -> list[Argument]:
    """Query and key cells as `score` reads them."""
    dtype = "i8" if spec.estimate.int8 else spec.dtype
    if not spec.tiling.tma:
        return pointers(dtype, "q", "k")
    return [descriptor(name, dtype, 1, 1, 1, cells, spec.depth) for name, cells in (("q", spec.tiling.rows), ("k", spec.tiling.cols))]


def _names(listed: Iterable[Argument], without: tuple[str, ...] = ()) -> str:
    return ", ".join([*(argument.name for argument in listed if argument.name not in without), "start"])


def generate(spec: SelectSpec) -> str:
    """The module's text: `score`, and `choose` or, for wide rows, `pool` and `pick`; of a second stage, those for lists."""
    by_block = stream_template.BY_BLOCK if spec.streamed else score_template.BY_BLOCK
    tiles = stream_template.SCORE_STREAM if spec.streamed else score_template.FINISH + score_template.SCORE
    scoring = by_block + score_template.POOLED + tiles
    parts = [(score_template.HEADER + ("" if spec.streamed else score_template.WALK), ""), (scoring, "score")]
    if spec.estimate.prepared:
        parts.append((prepare.PREPARE, "prepare_cells"))
    parts.append((score_template.CANDIDATES + ("" if spec.streamed else choose_template.LOADS), ""))
    parts += _choosing(spec)
    values = _values(spec)
    return "".join(render(text, values | _signature(spec, kernel)) for text, kernel in parts)


def _values(spec: SelectSpec) -> dict[str, Any]:
    """What stands for the names in the templates, but for signatures."""
    tiling = spec.tiling
    constants = {
        "description": spec.describe(),
        "depth": spec.depth,
        "chunks": cdiv(spec.head_dim, spec.depth),
        "rows": tiling.rows,
        "cols": tiling.cols,
        "stages": tiling.stages,
        "row_cells": spec.block // spec.span,
        "col_cells": spec.block // spec.stride,
        "tile_blocks": spec.tile_blocks,
        "tile_shift": (tiling.cols * spec.stride).bit_length() - 1,
        "tma": tiling.tma,
        "band": tiling.band,
        # what `score` hands on to `finish` beside the tile, and what `candidates` takes after block and head
        "finish_arguments": _names(
            arguments(spec, "score"), ("q", "k", "start_at", "start", "batch", "q_b", "q_h", "q_n", "k_b", "k_h", "k_n")
        ),
        "density_bits": DENSITY_BITS,
        "span": spec.span,
        "steps": spec.steps,
        "group": spec.scored,
        "shared": spec.shared,
        "merged": spec.estimate.merge,
        "heads": spec.tile_heads,
        "parts": cdiv(spec.scored, max(1, spec.tile_heads)),
        "pair": min(2, spec.block // spec.stride),
        "lanes": min(_LANES, spec.tile_blocks),
        "folds": max(1, spec.tile_blocks // _LANES),
        "dims": spec.dims,
        "whole": spec.whole,
        "triangular": spec.triangular,
        "skips": spec.skips,
        "int8": spec.estimate.int8,
        "peak": spec.estimate.peak,
        # what `pooled` multiplies scores by
        "scales": "scale" if not spec.estimate.int8 else "row_scale, block_scale" if spec.estimate.peak else "row_scale",
        "lowest": "-2147483648" if spec.estimate.int8 and spec.estimate.peak else 'float("-inf")',
        "prepared": spec.estimate.prepared,
        "query_step": "STEPS" if spec.estimate.prepared else "SPAN",
        "number": NUMBERS[spec.dtype],
        "sharing": spec.sharing,
        **prepare.constants(spec.head_dim, spec.steps, spec.sharing),
        "candidate_arguments": _names([*_candidate_masks(spec), *_runtime("query_len", "key_len")]),
    }
    names = (
        "head_dim",
        "stride",
        "block",
        "reduce",
        "causal",
        "window",
        "key_flags",
        "segments",
        "has_start",
        "importance",
        "grouped",
        "streamed",
        "listed",
        "finer",
        "rule",
        "min_share",
    )
    return {**{name: getattr(spec, name) for name in names}, **constants}


def _choosing(spec: SelectSpec) -> list[tuple[str, str]]:
    """Template and kernel name of what turns sums into lists; a template without a kernel has "" for a name."""
    by_row = spec.reduce == "row"
    if spec.wide:
        pool, pick = (row_template.POOL_ROWS, row_template.PICK_ROWS) if by_row else (choose_template.POOL, choose_template.PICK)
        return [(pool, "pool"), (pick, "pick")]
    if spec.streamed:
        return [(stream_template.NEEDED, ""), (stream_template.CHOOSE_STREAM, "choose")]
    return [(row_template.NEEDED, ""), (row_template.CHOOSE_ROWS, "choose")] if by_row else [(choose_template.CHOOSE, "choose")]


def _signature(spec: SelectSpec, kernel: str) -> dict[str, str]:
    listed = arguments(spec, kernel) if kernel else ()
    return {"parameters": parameters(listed, ", "), "unspecialised": unspecialised(listed)}
