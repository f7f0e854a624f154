"""From a spec of one block selection to the text of its Triton kernels, which have exactly its clauses. Needs neither a GPU nor Triton."""

from __future__ import annotations

from dataclasses import dataclass

from sparsify.backends.codegen.template import render
from sparsify.backends.select import choose_template, prepare, score_template
from sparsify.backends.select.reference import DENSITY_BITS
from sparsify.errors import UnsupportedError

ITEM_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}


@dataclass(frozen=True)
class Tiling:
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
TMA_TILING = Tiling(128, 256, 8, 4, 1, True)
# 8 bits halve the products' time and no exponential's: of two programs one multiplies while the other sums up (8 % faster on an H200)
INT8_TILING = Tiling(128, 128, 4, 3, 2, True, band=32)
# 96 KB: fits every GPU from compute capability 8.0 on
POINTER_TILING = Tiling(128, 128, 8, 3, 1, False)


@dataclass(frozen=True)
class SelectSpec:
    """What decides the kernels' text; numbers that may differ between calls are arguments.

    group: scored heads per KV head. shared: query heads that share a scored head; one of both is 1.
    window: "none", "one" or "per_head" (a tensor; 0 = none for that head).
    rule: "tau" (one threshold), "taus" (a tensor) or "density".
    merged: neighbouring tokens whose mean stands for them all; 1: none are merged.
    int8: cells are rounded to 8 bits before they are multiplied; `dtype` is what the op gets.
    wide: rows of key blocks do not fit in registers.
    negative: the scale of the logits is below 0; `score` gets its size.
    importance: `choose` also stores importances, for tests.
    """

    dtype: str
    head_dim: int
    group: int
    stride: int
    block: int
    tiling: Tiling
    half: bool = False
    shared: int = 1
    reduce: str = "max"
    causal: bool = True
    window: str = "none"
    key_flags: bool = False
    segments: bool = False
    has_start: bool = False
    rule: str = "tau"
    merged: int = 1
    int8: bool = False
    wide: bool = False
    importance: bool = False
    negative: bool = False

    def __post_init__(self):
        impossible = {
            f"dtype {self.dtype}": self.dtype not in ITEM_BYTES,
            f"stride {self.stride}": self.stride not in (4, 8, 16),
            f"block {self.block} at a span of {self.span}": self.block % self.span != 0 or self.block % self.stride != 0,
            f"window {self.window!r}": self.window not in ("none", "one", "per_head"),
            f"rule {self.rule!r}": self.rule not in ("tau", "taus", "density"),
            f"pooling by {self.reduce!r}": self.reduce not in ("sum", "max"),
            f"means of {self.merged} tokens": self.merged not in (1, 2, 4),
            "heads that are both shared and grouped": self.shared > 1 and self.group > 1,
            f"tiles of {self.tiling.rows} x {self.tiling.cols} cells": self.tiling.rows % max(1, self.block // self.span) != 0
            or self.tiling.cols * self.stride % self.block != 0,
            "stored importances of wide rows": self.wide and self.importance,
        }
        for what, wrong in impossible.items():
            if wrong:
                raise UnsupportedError(f"no selection kernel has {what}", where="backends.select_source")

    @property
    def span(self) -> int:
        """Query rows from one scored cell to the next."""
        return self.stride * (2 if self.half else 1)

    @property
    def steps(self) -> int:
        """Products of tokens, or of neighbours' means, in one score."""
        return self.stride // self.merged

    @property
    def prepared(self) -> bool:
        """Whether a kernel makes cells of their own before they are multiplied, side by side."""
        return self.merged > 1 or self.int8

    @property
    def depth(self) -> int:
        """Numbers of a token per step: a swizzled row of 128 bytes, or of 64 when that wastes less of the head dim."""
        full = 128 // (1 if self.int8 else ITEM_BYTES[self.dtype])
        return min((full, full // 2), key=lambda d: (-(-self.head_dim // d) * d, -d))

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
        pool = self.reduce + (", half the query cells" if self.half else "") + (", shared by a group" if self.shared > 1 else "")
        pool += (f", means of {self.merged} tokens" if self.merged > 1 else "") + (", 8 bits" if self.int8 else "")
        kept = ", ".join(name for name, on in clauses.items() if on) or "no mask"
        return f"{self.dtype}, head dim {self.head_dim}, stride {self.stride}, block {self.block}, {pool}; {kept}; {self.rule}"


def _mask_arguments(spec: SelectSpec, flags: list[str], segments: list[str]) -> list[str]:
    window = {"none": [], "one": ["window"], "per_head": ["windows"]}[spec.window]
    return ([*flags, "flags_batch"] if spec.key_flags else []) + ([*segments, "segments_batch"] if spec.segments else []) + window


def score_arguments(spec: SelectSpec) -> list[str]:
    """Arguments of `score`, in order."""
    sinks = ["key_last"] if spec.window != "none" else []
    masks = _mask_arguments(spec, ["key_first", "query_last", *sinks], ["query_low", "query_high", "key_low", "key_high"])
    strides = [] if spec.tiling.tma else ["q_b", "q_h", "q_n", "k_b", "k_h", "k_n"]
    numbers = ["scale", "batch", "scored_heads", "query_len", "key_len", "query_cells", "first_cell", "end_cell"]
    scales = ["query_scales", "key_scales"] if spec.int8 else []
    return ["q", "k", *scales, "sums", "tops", *_start(spec), *masks, *strides, *numbers, *([] if spec.has_start else ["start"])]


def finish_arguments(spec: SelectSpec) -> list[str]:
    """Arguments of `finish` after its tile."""
    outside = ("q", "k", "start_at", "start", "batch", "q_b", "q_h", "q_n", "k_b", "k_h", "k_n")
    return [*(name for name in score_arguments(spec) if name not in outside), "start"]


def _start(spec: SelectSpec) -> list[str]:
    return ["start_at"] if spec.has_start else []


def candidate_arguments(spec: SelectSpec) -> list[str]:
    """Arguments of `candidates` after block and head."""
    masks = _mask_arguments(spec, ["block_bits", "sink_blocks"], ["rows_low", "rows_high", "block_low", "block_high"])
    return [*masks, "query_len", "key_len", "start"]


def choose_arguments(spec: SelectSpec, kernel: str = "choose") -> list[str]:
    """Arguments of `choose`, `pool` or `pick`, in order, without the constexpr ones."""
    outputs = {"choose": ["sums", "tops", "counts", "indices"], "pool": ["sums", "tops"], "pick": ["counts", "indices"]}[kernel]
    outputs += ["importances"] if spec.importance or kernel != "choose" else []
    rule = {"tau": ["tau"], "taus": ["thresholds"], "density": ["share"]}[spec.rule] if kernel != "pool" else []
    masks = [] if kernel == "pool" else [n for n in candidate_arguments(spec) if n not in ("query_len", "key_len", "start")]
    numbers = ["counts_batch", "heads", "query_len", "key_len", "query_cells", "first_cell", "row_count", "first_block"]
    numbers = [n for n in numbers if kernel == "choose" or n not in _UNUSED[kernel]]
    return [*outputs, *_start(spec), *masks, *rule, *numbers, *([] if spec.has_start else ["start"])]


_UNUSED = {"pool": ("counts_batch",), "pick": ("query_cells", "first_cell", "row_count")}

# Specialising on these would compile once more for each length that happens to divide by 16 or to be 1.
_LENGTHS = ("batch", "scored_heads", "heads", "query_len", "key_len", "query_cells", "first_cell", "end_cell", "start", "counts_batch")
UNSPECIALIZED = (*_LENGTHS, "row_count", "first_block", "share", "window", "flags_batch", "segments_batch")


def generate(spec: SelectSpec) -> str:
    """The module's text: `score`, and `choose` or, for wide rows, `pool` and `pick`."""
    tiling = spec.tiling
    constants = {
        "description": spec.describe(),
        "depth": spec.depth,
        "chunks": -(-spec.head_dim // spec.depth),
        "rows": tiling.rows,
        "cols": tiling.cols,
        "stages": tiling.stages,
        "row_cells": spec.block // spec.span,
        "col_cells": spec.block // spec.stride,
        "tile_blocks": spec.tile_blocks,
        "tile_shift": (tiling.cols * spec.stride).bit_length() - 1,
        "tma": tiling.tma,
        "band": tiling.band,
        "finish_arguments": ", ".join(finish_arguments(spec)),
        "density": spec.rule == "density",
        "per_head": spec.rule == "taus",
        "density_bits": DENSITY_BITS,
        "span": spec.span,
        "steps": spec.steps,
        "prepared": spec.prepared,
        "query_step": "STEPS" if spec.prepared else "SPAN",
        "number": {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}[spec.dtype],
        **prepare.constants(spec.head_dim, spec.steps),
        "candidate_arguments": ", ".join(candidate_arguments(spec)),
    }
    names = (
        "head_dim",
        "group",
        "stride",
        "block",
        "shared",
        "reduce",
        "causal",
        "window",
        "key_flags",
        "segments",
        "has_start",
        "importance",
        "merged",
        "int8",
        "negative",
    )
    values = {**{name: getattr(spec, name) for name in names}, **constants}
    parts = [(score_template.HEADER + score_template.WALK, []), (score_template.FINISH + score_template.SCORE, score_arguments(spec))]
    if spec.prepared:
        parts.append((prepare.PREPARE, []))
    parts.append((score_template.CANDIDATES + choose_template.LOADS, []))
    if spec.wide:
        parts.append((choose_template.POOL, choose_arguments(spec, "pool")))
        parts.append((choose_template.PICK, choose_arguments(spec, "pick")))
    else:
        parts.append((choose_template.CHOOSE, choose_arguments(spec)))
    return "".join(_render(text, values, arguments) for text, arguments in parts)


def _render(text: str, values: dict[str, object], arguments: list[str]) -> str:
    unspecialized = ", ".join(f'"{name}"' for name in arguments if name in UNSPECIALIZED)
    return render(text, {**values, "arguments": ", ".join(arguments), "unspecialized": unspecialized})
