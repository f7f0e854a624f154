"""From a spec of one feed-forward block to the text of its Triton kernels. Needs neither a GPU nor Triton.

Few rows share one stream of the weights, so the time is the weights' bytes over the bandwidth. Four kernels in order: `normalise` (only
where the norm cannot be folded into the product), `project_up`, `project_down`, `finish`. Their programs read the rows' counters first;
when every row skips they return before a weight is loaded, and `finish` copies the residual.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

from sparsify.backends.codegen.arguments import (
    ITEM_BYTES,
    Argument,
    constexprs,
    descriptor,
    dot_precision,
    floats,
    integers,
    padded,
    parameters,
    pointers,
)  # fmt: skip
from sparsify.backends.codegen.launch import power_of_two
from sparsify.backends.codegen.template import header, render
from sparsify.backends.ffn import many_rows_template as for_rows
from sparsify.backends.ffn.few_rows_template import ACTIVATE, ACTIVATE_ROWS, FINISH, FLAGS, NORMALISE, PROJECT_DOWN, PROJECT_UP, START
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
    """How the work for few rows is cut.

    up_tile, down_tile: columns of a program in `project_up` and in `project_down`.
    up_step, down_step: elements of the summed dimension at a time.
    parts: programs that share a tile of `project_down`.
    warps: of both kernels.
    up_stages, down_stages: depth of the weights' pipeline.
    """

    up_tile: int
    up_step: int
    down_tile: int
    down_step: int
    parts: int
    warps: int
    up_stages: int
    down_stages: int


@dataclass(frozen=True)
class RowsTiling:
    """How the work for many rows is cut.

    row_tile: rows of a tile.
    up_tile, down_tile: columns of a tile in `project_up` and in `project_down`.
    step: elements of the summed dimension at a time.
    up_stages, down_stages: depth of the pipeline.
    warps: of both kernels.
    flatten: whether a tile's loads begin during the one before.
    """

    row_tile: int = 128
    up_tile: int = 128
    down_tile: int = 256
    step: int = 64
    up_stages: int = 3
    down_stages: int = 3
    warps: int = 8
    flatten: bool = False


@dataclass(frozen=True)
class FfnSpec:
    """What decides the kernels' text.

    dtype: of all tensors but integers, as `codegen.launch.DTYPES` names it.
    rows: rows of a tile, 16 or 32, or MANY.
    hidden, intermediate: sizes of the block.
    tiling: how the work is cut.
    gated: whether there is a gate beside up.
    transposed: weights are [inputs, outputs], not [outputs, inputs].
    activation, norm, eps, post_norm, post_eps, scale: as the op takes them.
    norm_bias, down_bias, post_bias: whether there are biases.
    up_bias: whether up and, where there is one, gate have biases.
    """

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
    up_bias: bool = False
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
        """Elements of the intermediate dimension that one program of `project_down` sums."""
        steps = cdiv(self.intermediate, self.few.down_step)
        return cdiv(steps, self.few.parts) * self.few.down_step

    @property
    def up_programs(self) -> int:
        return cdiv(self.intermediate, self.tiling.up_tile)

    @property
    def down_programs(self) -> int:
        return cdiv(self.hidden, self.few.down_tile) * self.few.parts

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
            "project_up": [*data("source"), *counters("remaining"), *data("out", "weight", "up", "gate", "up_bias", "gate_bias")],
            "project_down": [*data("source"), *counters("remaining"), *pointers("fp32", "partial"), *data("down")],
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
        "project_up": [rows, weight("up", tiling.up_tile), weight("gate", tiling.up_tile), box("out", tiling.row_tile, tiling.up_tile)],
        "project_down": [rows, weight("down", tiling.down_tile), box("out", tiling.row_tile, tiling.down_tile // 2), *counters("count")],
        "finish": [*data("residual"), *counters("remaining", "slots"), *data("updates", "out"), *counters("after")],
    }
    many["project_up"] += [*counters("count"), *data("up_bias", "gate_bias")]
    many["project_down"] += data("bias")
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
    """Module text with the kernels `normalise` (unless the norm is folded in or absent), `project_up`, `project_down` and `finish`."""
    tiling = spec.few
    up_strides = (1, spec.intermediate) if spec.transposed else (spec.hidden, 1)
    down_strides = (1, spec.hidden) if spec.transposed else (spec.intermediate, 1)
    values = vars(spec) | {
        "flags": FLAGS.rstrip("\n"),
        "many": False,
        "fused_norm": spec.fused_norm,
        "up_stages": tiling.up_stages,
        "down_stages": tiling.down_stages,
        "up_stride_n": up_strides[0],
        "up_stride_k": up_strides[1],
        "down_stride_n": down_strides[0],
        "down_stride_k": down_strides[1],
        "up_ragged": spec.intermediate % tiling.up_tile != 0 or spec.hidden % tiling.up_step != 0,
        "down_ragged": spec.hidden % tiling.down_tile != 0
        or spec.part % tiling.down_step != 0
        or spec.part * tiling.parts != spec.intermediate,
        "precision": dot_precision(spec.dtype),
        **_parameters(spec, "normalise", "project_up", "project_down", "finish"),
    }
    parts = [_header(spec), render(ACTIVATE, values)]
    if needs_normalise(spec):
        parts.append(render(NORMALISE, values))
    parts += [render(template, values) for template in (PROJECT_UP, PROJECT_DOWN, FINISH)]
    return "\n\n".join(parts)


def rows_source(spec: FfnSpec) -> str:
    """Module text for many rows: the kernels `compact`, `normalise`, `project_up`, `project_down` and `finish`, in this order.

    Sizes of the products are known on the device alone, so `project_up` and `project_down` are persistent: as many programs as the device
    holds, each taking tiles until the computing rows are used up.
    """
    values = vars(spec) | vars(spec.tiling) | {"many": True, "precision": dot_precision(spec.dtype)}
    values |= _parameters(spec, "compact", "normalise", "project_up", "project_down", "finish")
    templates = (ACTIVATE, for_rows.COMPACT, NORMALISE, for_rows.PLACE, for_rows.PROJECT_UP, for_rows.PROJECT_DOWN, FINISH)
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
    title = f"{activation} of a feed-forward block{', gated' if gated else ''}, {dtype}"
    return "\n\n".join([header(title, {"BLOCK": ACTIVATION_BLOCK}), render(ACTIVATE, values), render(ACTIVATE_ROWS, values)])


def needs_normalise(spec: FfnSpec) -> bool:
    return spec.norm != "none" and not spec.fused_norm


def _header(spec: FfnSpec) -> str:
    tiling = spec.tiling
    constants = {
        "HIDDEN": spec.hidden,
        "HIDDEN_PADDED": power_of_two(spec.hidden),
        "INTERMEDIATE": spec.intermediate,
        "UP_TILE": tiling.up_tile,
        "DOWN_TILE": tiling.down_tile,
        "EPS": spec.eps,
        "POST_EPS": spec.post_eps,
        "SCALE": spec.scale,
    }
    if isinstance(tiling, RowsTiling):
        constants |= {"ROW_TILE": tiling.row_tile, "STEP": tiling.step, "BAND": _BAND, "CHUNK": CHUNK}
    else:
        constants |= {"ROWS": spec.rows, "UP_STEP": tiling.up_step, "DOWN_STEP": tiling.down_step}
        constants |= {"PARTS": tiling.parts, "PART": spec.part}
    return header(f"Feed-forward block: {spec.describe()}", constants)


def choose_tiling(dtype: str, rows: int, hidden: int, intermediate: int, gated: bool, processors: int) -> FfnTiling:
    """Tiles such that all programs are resident at once and each has some 50 KB of weights on the way.

    With every program resident, programs share the bandwidth evenly and end together, so a tile count that no number of processors
    divides costs nothing. processors: streaming multiprocessors of the device.
    """
    element = ITEM_BYTES[dtype]
    matrices = 2 if gated else 1
    up_tile = down_tile = 64
    while up_tile > 16 and intermediate // up_tile < processors:
        up_tile //= 2
    while down_tile > 16 and hidden * 8 // down_tile < processors:
        down_tile //= 2
    up_step, up_stages = _pipeline(up_tile * matrices * element, rows * element, padded(hidden))
    down_step, down_stages = _pipeline(down_tile * element, rows * element, padded(intermediate))
    parts = 1
    while cdiv(hidden, down_tile) * parts * 2 <= 3 * processors and intermediate // (2 * parts) >= 4 * down_step:
        parts *= 2
    return FfnTiling(up_tile, up_step, down_tile, down_step, parts, 4, up_stages, down_stages)


def choose_rows_tiling(dtype: str, gated: bool) -> RowsTiling:
    """Tiles that fill the registers of two warp groups with sums. On an H200 three stages are faster than four, which would fit."""
    if dtype == "fp32":  # not for GPUs, where `many_rows` refuses it
        return RowsTiling(64, 64, 128, 32, 3, 3, 8)
    return RowsTiling() if gated else RowsTiling(up_tile=256)


def _pipeline(weights: int, rows: int, most: int) -> tuple[int, int]:
    """(step, stages): four stages of 16 KB of weights each, or as much as fits half of a processor's shared memory.

    weights, rows: bytes of an element of the step. most: the longest step that there is.
    """
    step = min(most, padded(_STAGE // weights))
    while step > 32 and 4 * step * (weights + rows) > _SHARED:
        step //= 2
    return step, max(2, min(4, _SHARED // (step * (weights + rows))))
