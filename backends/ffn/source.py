"""From a spec of one feed-forward block to the text of its Triton kernels. Needs neither a GPU nor Triton.

Few rows share one stream of the weights, so the time is the weights' bytes over the bandwidth. Four kernels in order: `normalise` (only
where the norm cannot be folded into the product), `widen`, `narrow`, `finish`. Their programs read the rows' counters first; when every
row skips they return before a weight is loaded, and `finish` copies the residual.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

from sparsify.backends.codegen.arguments import (
    ITEM_BYTES,
    Argument,
    constexprs,
    descriptor,
    floats,
    integers,
    padded,
    parameters,
    pointers,
)  # fmt: skip
from sparsify.backends.codegen.launch import power_of_two
from sparsify.backends.codegen.template import render
from sparsify.backends.ffn import many_rows_template as for_rows
from sparsify.backends.ffn.few_rows_template import ACTIVATE, ACTIVATE_ROWS, FINISH, FLAGS, NARROW, NORMALISE, START, WIDEN
from sparsify.errors import UnsupportedError
from sparsify.ops.limits import cdiv

# `rows` of a spec whose kernels take any number: those that compute are compacted
MANY = 0
NORMS = ("none", "layer", "rms", "rms_fp32", "rms_offset")
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu")
# one program of `finish` holds a row in registers
MAX_HIDDEN = 16384
# columns of one row that a program of `activate_rows` computes
ACTIVATION_BLOCK = 2048
# row tiles walked together, and rows that one program of `compact` places
_BAND, CHUNK = 16, 4096
# bytes of shared memory for one of two programs on a processor
_SHARED = 112 * 1024
# bytes of weights in a stage of the pipeline: fastest on an H200 for 1 and for 32 rows
_STAGE = 16 * 1024


@dataclass(frozen=True)
class FfnTiling:
    """wide_tile, narrow_tile: columns of a program in `widen` and `narrow`; *_step: elements of the summed dimension at a time.
    parts: programs that share a tile of `narrow`. warps: of both. *_stages: depth of the weights' pipeline."""

    wide_tile: int
    wide_step: int
    narrow_tile: int
    narrow_step: int
    parts: int
    warps: int
    wide_stages: int
    narrow_stages: int


@dataclass(frozen=True)
class RowsTiling:
    """For many rows. row_tile, wide_tile, narrow_tile: rows and columns of a tile in `widen` and `narrow`; step: elements of the summed
    dimension at a time; *_stages: depth of the pipeline; warps: of both; flatten: whether a tile's loads begin during the one before."""

    row_tile: int = 128
    wide_tile: int = 128
    narrow_tile: int = 256
    step: int = 64
    wide_stages: int = 3
    narrow_stages: int = 3
    warps: int = 8
    flatten: bool = False


@dataclass(frozen=True)
class FfnSpec:
    """What decides the kernels' text. rows: rows of a tile, 16 or 32, or MANY. wide_bias: on up and, where there is one, gate."""

    dtype: str
    rows: int
    hidden: int
    intermediate: int
    tiling: FfnTiling | RowsTiling
    gated: bool = True
    transposed: bool = False
    activation: str = "silu"
    norm: str = "rms"
    norm_bias: bool = False
    eps: float = 1e-6
    wide_bias: bool = False
    down_bias: bool = False
    post_norm: str = "none"
    post_bias: bool = False
    post_eps: float = 0.0
    scale: float = 1.0

    def __post_init__(self):
        impossible = {
            f"dtype {self.dtype}": self.dtype not in ITEM_BYTES,
            f"tile of {self.rows} rows": self.rows not in (16, 32, MANY),
            f"hidden size {self.hidden}": not 0 < self.hidden <= MAX_HIDDEN,
            f"activation {self.activation!r}": self.activation not in ACTIVATIONS,
            f"norms {self.norm!r} and {self.post_norm!r}": self.norm not in NORMS or self.post_norm not in NORMS,
        }
        for what, wrong in impossible.items():
            if wrong:
                raise UnsupportedError(f"no feed-forward kernel has {what}", where="sparsify::ffn")

    @property
    def fused_norm(self) -> bool:
        """An RMS norm is a factor per row and one per column, which the product takes along. In fp16, x · weight could overflow before
        the row's factor makes it small; a layer norm subtracts a mean first. Many rows are normalised once, while they are compacted."""
        return self.rows != MANY and self.norm.startswith("rms") and self.dtype != "fp16"

    @property
    def few(self) -> FfnTiling:
        """The tiling of a spec for few rows."""
        if not isinstance(self.tiling, FfnTiling):
            raise TypeError(f"a spec for many rows: {self.describe()}")
        return self.tiling

    @property
    def many(self) -> RowsTiling:
        """The tiling of a spec for many rows."""
        if not isinstance(self.tiling, RowsTiling):
            raise TypeError(f"a spec for few rows: {self.describe()}")
        return self.tiling

    @property
    def part(self) -> int:
        """Elements of the intermediate dimension that one program of `narrow` sums."""
        steps = cdiv(self.intermediate, self.few.narrow_step)
        return cdiv(steps, self.few.parts) * self.few.narrow_step

    @property
    def wide_programs(self) -> int:
        return cdiv(self.intermediate, self.tiling.wide_tile)

    @property
    def narrow_programs(self) -> int:
        return cdiv(self.hidden, self.few.narrow_tile) * self.few.parts

    def describe(self) -> str:
        kind = f"{'gated ' if self.gated else ''}{self.activation}"
        rows = f"up to {self.rows}" if self.rows else "compacted"
        return f"{self.dtype}, {self.hidden} to {self.intermediate}, {kind}, norm {self.norm}, {rows} rows"


@functools.lru_cache(maxsize=512)
def arguments(spec: FfnSpec, kernel: str) -> tuple[Argument, ...]:
    """The arguments of a kernel of `ffn_source` or `rows_source`, in order. Those that a spec has no use for are there, too."""
    data, counters = functools.partial(pointers, spec.dtype), functools.partial(pointers, "i32")
    ends = [*floats("threshold"), *integers("skip_next")]
    if spec.rows != MANY:
        few = {
            "normalise": [*data("source"), *counters("remaining"), *data("out", "weight", "bias")],
            "widen": [*data("source"), *counters("remaining"), *data("out", "weight", "up", "gate", "up_bias", "gate_bias")],
            "narrow": [*data("source"), *counters("remaining"), *pointers("fp32", "partial"), *data("down")],
            "finish": [*data("residual"), *counters("remaining"), *pointers("fp32", "partial"), *data("out"), *counters("after")],
        }
        few["finish"] += [*data("bias", "post_weight", "post_bias"), *ends]
        return (*few[kernel], *([] if kernel == "normalise" else integers("rows")))
    tiling = spec.many
    box = lambda name, *sizes: descriptor(name, spec.dtype, *sizes)
    weight = lambda name, tile: box(name, *((tiling.step, tile) if spec.transposed else (tile, tiling.step)))
    rows = box("source", tiling.row_tile, tiling.step)
    many = {
        "compact": [*counters("remaining", "order", "slots", "count"), *integers("rows")],
        "normalise": [*data("source"), *counters("order", "count"), *data("out", "weight", "bias")],
        "widen": [rows, weight("up", tiling.wide_tile), weight("gate", tiling.wide_tile), box("out", tiling.row_tile, tiling.wide_tile)],
        "narrow": [rows, weight("down", tiling.narrow_tile), box("out", tiling.row_tile, tiling.narrow_tile // 2), *counters("count")],
        "finish": [*data("residual"), *counters("remaining", "slots"), *data("updates", "out"), *counters("after")],
    }
    many["widen"] += [*counters("count"), *data("up_bias", "gate_bias")]
    many["narrow"] += data("bias")
    many["finish"] += [*data("post_weight", "post_bias"), *ends]
    return tuple(many[kernel])


START_ARGUMENTS = (
    *pointers("i64", "positions", "state"), *pointers("i32", "out"), *integers("count", "slot", "rows", "warmup", "most", "length"),
    *constexprs("BLOCK", "READS"),
)  # fmt: skip


def _parameters(spec: FfnSpec, *kernels: str) -> dict[str, str]:
    return {f"{kernel}_parameters": parameters(arguments(spec, kernel), ", ") for kernel in kernels}


def start_source() -> str:
    """Module text with the kernel `start` of the counters. Grid: 1."""
    return render(START, {"start_parameters": parameters(START_ARGUMENTS, ", ")})


def ffn_source(spec: FfnSpec) -> str:
    """Module text with the kernels `normalise` (unless the norm is folded in or absent), `widen`, `narrow` and `finish`."""
    tiling = spec.few
    wide_strides = (1, spec.intermediate) if spec.transposed else (spec.hidden, 1)
    narrow_strides = (1, spec.hidden) if spec.transposed else (spec.intermediate, 1)
    values = vars(spec) | {
        "flags": FLAGS.rstrip("\n"),
        "many": False,
        "fused_norm": spec.fused_norm,
        "wide_stages": tiling.wide_stages,
        "narrow_stages": tiling.narrow_stages,
        "wide_stride_n": wide_strides[0],
        "wide_stride_k": wide_strides[1],
        "narrow_stride_n": narrow_strides[0],
        "narrow_stride_k": narrow_strides[1],
        "wide_ragged": spec.intermediate % tiling.wide_tile != 0 or spec.hidden % tiling.wide_step != 0,
        "narrow_ragged": spec.hidden % tiling.narrow_tile != 0
        or spec.part % tiling.narrow_step != 0
        or spec.part * tiling.parts != spec.intermediate,
        "precision": _precision(spec),
        **_parameters(spec, "normalise", "widen", "narrow", "finish"),
    }
    parts = [_header(spec), render(ACTIVATE, values)]
    if needs_normalise(spec):
        parts.append(render(NORMALISE, values))
    parts += [render(template, values) for template in (WIDEN, NARROW, FINISH)]
    return "\n\n".join(parts)


def rows_source(spec: FfnSpec) -> str:
    """Module text for many rows: the kernels `compact`, `normalise`, `widen`, `narrow` and `finish`, in the order in which they run.

    Sizes of the products are known on the device alone, so `widen` and `narrow` are persistent: as many programs as the device holds,
    each taking tiles until the computing rows are used up.
    """
    values = vars(spec) | vars(spec.tiling) | {"many": True, "precision": _precision(spec)}
    values |= _parameters(spec, "compact", "normalise", "widen", "narrow", "finish")
    templates = (ACTIVATE, for_rows.COMPACT, NORMALISE, for_rows.PLACE, for_rows.WIDEN, for_rows.NARROW, FINISH)
    return "\n\n".join([_header(spec), *(render(template, values) for template in templates)])


def activation_arguments(dtype: str) -> tuple[Argument, ...]:
    """The arguments of the kernel of `activation_source`."""
    return (*pointers(dtype, "x", "factor"), *integers("width", "x_row", "factor_row"))


def activation_source(dtype: str, activation: str, gated: bool) -> str:
    """Module text with the kernel `activate_rows`, which writes where it read. Grid: rows, cdiv(width, ACTIVATION_BLOCK).

    Raises:
        UnsupportedError: another activation.
    """
    if activation not in ACTIVATIONS:
        raise UnsupportedError(f"no feed-forward kernel has activation {activation!r}", where="sparsify::ffn_parts")
    values = {"activation": activation, "gated": gated, "activate_rows_parameters": parameters(activation_arguments(dtype), ", ")}
    head = f'"""{activation} of a feed-forward block{", gated" if gated else ""}, {dtype}. Generated by sparsify."""'
    imports = f"{head}\n\nimport triton\nimport triton.language as tl\n\nBLOCK = tl.constexpr({ACTIVATION_BLOCK})\n"
    return "\n\n".join([imports, render(ACTIVATE, values), render(ACTIVATE_ROWS, values)])


def _precision(spec: FfnSpec) -> str:
    return ', input_precision="ieee"' if spec.dtype == "fp32" else ""


def needs_normalise(spec: FfnSpec) -> bool:
    return spec.norm != "none" and not spec.fused_norm


def _header(spec: FfnSpec) -> str:
    tiling = spec.tiling
    constants = {
        "HIDDEN": spec.hidden,
        "HIDDEN_PADDED": power_of_two(spec.hidden),
        "INTERMEDIATE": spec.intermediate,
        "WIDE_TILE": tiling.wide_tile,
        "NARROW_TILE": tiling.narrow_tile,
        "EPS": spec.eps,
        "POST_EPS": spec.post_eps,
        "SCALE": spec.scale,
    }
    if isinstance(tiling, RowsTiling):
        constants |= {"ROW_TILE": tiling.row_tile, "STEP": tiling.step, "BAND": _BAND, "CHUNK": CHUNK}
    else:
        constants |= {"ROWS": spec.rows, "WIDE_STEP": tiling.wide_step, "NARROW_STEP": tiling.narrow_step}
        constants |= {"PARTS": tiling.parts, "PART": spec.part}
    lines = [
        f'"""Feed-forward block: {spec.describe()}. Generated by sparsify."""',
        "",
        "import triton",
        "import triton.language as tl",
        "",
    ]
    return "\n".join(lines + [f"{name} = tl.constexpr({value})" for name, value in constants.items()]) + "\n"


def choose_tiling(dtype: str, rows: int, hidden: int, intermediate: int, gated: bool, processors: int) -> FfnTiling:
    """Tiles such that all programs are resident at once and each has some 50 KB of weights on the way.

    With every program resident, programs share the bandwidth evenly and end together, so a tile count that no number of processors
    divides costs nothing. processors: streaming multiprocessors of the device.
    """
    element = ITEM_BYTES[dtype]
    matrices = 2 if gated else 1
    wide_tile = narrow_tile = 64
    while wide_tile > 16 and intermediate // wide_tile < processors:
        wide_tile //= 2
    while narrow_tile > 16 and hidden * 8 // narrow_tile < processors:
        narrow_tile //= 2
    wide_step, wide_stages = _pipeline(wide_tile * matrices * element, rows * element, padded(hidden))
    narrow_step, narrow_stages = _pipeline(narrow_tile * element, rows * element, padded(intermediate))
    parts = 1
    while cdiv(hidden, narrow_tile) * parts * 2 <= 3 * processors and intermediate // (2 * parts) >= 4 * narrow_step:
        parts *= 2
    return FfnTiling(wide_tile, wide_step, narrow_tile, narrow_step, parts, 4, wide_stages, narrow_stages)


def choose_rows_tiling(dtype: str, gated: bool) -> RowsTiling:
    """Tiles that fill the registers of two warp groups with sums. On an H200 three stages are faster than four, which would fit."""
    if dtype == "fp32":  # not for GPUs, where `many_rows` refuses it
        return RowsTiling(64, 64, 128, 32, 3, 3, 8)
    return RowsTiling() if gated else RowsTiling(wide_tile=256)


def _pipeline(weights: int, rows: int, most: int) -> tuple[int, int]:
    """(step, stages): four stages of 16 KB of weights each, or as much as fits half of a processor's shared memory.

    weights, rows: bytes of an element of the step. most: the longest step that there is.
    """
    step = min(most, padded(_STAGE // weights))
    while step > 32 and 4 * step * (weights + rows) > _SHARED:
        step //= 2
    return step, max(2, min(4, _SHARED // (step * (weights + rows))))
