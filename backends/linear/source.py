"""From a spec of linear layers for few rows to the text of their Triton kernel. Needs neither a GPU nor Triton."""

from __future__ import annotations

import functools
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass

from sparsify.backends.codegen.arguments import ITEM_BYTES, Argument, dot_precision, integers, parameters, pointers
from sparsify.backends.codegen.launch import power_of_two
from sparsify.backends.codegen.template import header, render
from sparsify.backends.ffn.few_rows_template import ACTIVATE
from sparsify.backends.linear import template
from sparsify.errors import UnsupportedError
from sparsify.ops.limits import cdiv
from sparsify.ops.linear import ACTIVATIONS, NORMS

# rows of a tile of tensor cores
TENSOR_ROWS = (8, 16)


@dataclass(frozen=True)
class LinearTiling:
    """columns: of the output that a program computes. step: inputs at a time, of each warp where tensor cores multiply. warps: of it.
    stages: depth of the weights' pipeline through shared memory to tensor cores, which multiply 8 or 16 rows, whatever of them are real;
    0: CUDA cores multiply a single row, and weights wait in registers."""

    columns: int
    step: int
    warps: int
    stages: int = 0

    @property
    def tensor(self) -> bool:
        return self.stages > 0

    @property
    def stride(self) -> int:
        """Inputs at a time of a whole program."""
        return self.step * self.warps if self.tensor else self.step


@dataclass(frozen=True)
class LinearSpec:
    """What decides the kernel's text. rows: of a tile of tensor cores, else 1. outputs: of each weight.
    biased: every weight has a bias. early: kernels may overlap (programmatic dependent launch, Hopper and later)."""

    dtype: str
    rows: int
    inputs: int
    outputs: tuple[int, ...]
    tiling: LinearTiling
    biased: bool = False
    residual: bool = False
    norm: str = "none"
    eps: float = 0.0
    activation: str = "none"
    early: bool = False

    def __post_init__(self):
        rows, tensor = self.rows, self.tiling.tensor
        impossible = {
            f"dtype {self.dtype}": self.dtype not in ITEM_BYTES,
            f"{rows} rows": rows not in TENSOR_ROWS if tensor else rows != 1,
            f"{len(self.outputs)} weights": not 0 < len(self.outputs) <= 3 or (self.gated and len(self.outputs) != 2),
            f"norm {self.norm!r} and activation {self.activation!r}": self.norm not in NORMS or self.activation not in ACTIVATIONS,
            "a norm on tensor cores": tensor and self.norm != "none",
        }
        for what, wrong in impossible.items():
            if wrong:
                raise UnsupportedError(f"no linear kernel has {what}", where="sparsify::linear")

    @property
    def gated(self) -> bool:
        return self.activation != "none"

    @property
    def tiles(self) -> tuple[int, ...]:
        """Programs for each output."""
        outputs = self.outputs[:1] if self.gated else self.outputs
        return tuple(cdiv(columns, self.tiling.columns) for columns in outputs)

    @property
    def programs(self) -> int:
        return sum(self.tiles)

    def describe(self) -> str:
        names = [f"{self.inputs} to {' and '.join(map(str, self.outputs))}", f"up to {self.rows} rows" if self.tiling.tensor else "one row"]
        names += [f"norm {self.norm}"] if self.norm != "none" else []
        names += [f"gate {self.activation}"] if self.gated else []
        return ", ".join([self.dtype, *names, *(["residual"] if self.residual else [])])


@functools.lru_cache(maxsize=512)
def arguments(spec: LinearSpec) -> tuple[Argument, ...]:
    """The kernel's arguments, in order."""
    numbers = range(1, len(spec.outputs) + 1)
    names = ["input", *(f"weight_{i}" for i in numbers), *(f"out_{i}" for i in range(1, len(spec.tiles) + 1))]
    names += [f"bias_{i}" for i in numbers] if spec.biased else []
    names += ["residual"] if spec.residual else []
    names += ["norm_weight"] if spec.norm != "none" else []
    return (*pointers(spec.dtype, *names), *(integers("rows", specialised=False) if spec.tiling.tensor else ()))


def linear_source(spec: LinearSpec) -> str:
    """Module text with the kernel `linear`. Grid: `spec.programs`."""
    tiling = spec.tiling
    values = {**vars(spec), **_masks(spec), "gated": spec.gated, "parts": len(spec.outputs), "parameters": parameters(arguments(spec))}
    values |= {"tensor": tiling.tensor, "stages": tiling.stages, "steps": cdiv(spec.inputs, tiling.stride)}
    values["precision"] = dot_precision(spec.dtype)
    values |= {f"{name}weights": _load(values, "weight", first) for name, first in _FIRSTS.items()}
    values |= {f"{name}ups": _load(values, "weight_2", first) for name, first in _FIRSTS.items()}
    begin, step = (template.TENSOR_BEGIN, template.TENSOR_STEP) if tiling.tensor else (template.BEGIN, template.STEP)
    indented = lambda text, indent: textwrap.indent(render(text, values), " " * indent).rstrip("\n")
    values |= {"begin": indented(begin, 4), "inner": indented(step, 8), "last": indented(step, 4), "finish": indented(template.FINISH, 4)}
    activate = [render(ACTIVATE, values)] if spec.gated else []
    lines = [line for line in render(template.LINEAR, values).splitlines() if line.strip()]
    return "\n\n".join([_header(spec), *activate, "\n".join(lines) + "\n"])


# where a tile of the weights begins, as the text says it
_FIRSTS = {"first_": "", "": " + first", "later_": " + first + STRIDE"}


def _load(values: Mapping[str, object], weight: str, first: str) -> str:
    tensor = values["tensor"]
    masks = [f"(column < outputs)[{'None, :' if tensor else ':'}, None]"] if values["column_mask"] else []
    masks += [f"(part{first} < INPUTS)[{':, None' if tensor else 'None'}, :]"] if values["part_mask"] else []
    mask = f", mask={' & '.join(masks)}, other=0.0" if masks else ""
    return f'tl.load({weight} + at{first}{mask}, eviction_policy="evict_first")'


def _masks(spec: LinearSpec) -> dict[str, str]:
    """What differs between ragged and whole tiles, and between the two units."""
    ragged_columns = any(columns % spec.tiling.columns for columns in spec.outputs)
    ragged_steps = spec.inputs % spec.tiling.stride != 0
    tensor = spec.tiling.tensor
    inside = ["real[None, :]"] if tensor else []
    inside += ["(column < outputs)[:, None]" if tensor else "column < outputs"] if ragged_columns else []
    return {
        "column_mask": ", mask=column < outputs, other=0.0" if ragged_columns else "",
        "part_mask": ", mask=part + first < INPUTS, other=0.0" if ragged_steps else "",
        "x_mask": " & (part + first < INPUTS)[:, :, None]" if ragged_steps else "",
        "y_mask": f", mask={' & '.join(inside)}, other=0.0" if inside else "",
        "y_store": f", mask={' & '.join(inside)}" if inside else "",
        "y_at": "row[None, :] * outputs + column[:, None]" if tensor else "column",
    }


def _header(spec: LinearSpec) -> str:
    tiling = spec.tiling
    constants: dict[str, float] = {"INPUTS": spec.inputs, "COLUMNS": tiling.columns, "STEP": tiling.step, "STRIDE": tiling.stride}
    constants |= {f"OUTPUTS_{i}": columns for i, columns in enumerate(spec.outputs, 1)}
    constants |= {f"FIRST_{i}": sum(spec.tiles[: i - 1]) for i in range(2, len(spec.tiles) + 1)}
    if tiling.tensor:
        constants |= {"ROWS": spec.rows, "GROUPS": tiling.warps}
    else:
        constants |= {"LAST": (cdiv(spec.inputs, tiling.stride) - 1) * tiling.stride}
    if spec.norm != "none":
        constants |= {"EPS": spec.eps}
    return header(f"Linear layers: {spec.describe()}", constants)


def choose_tiling(dtype: str, rows: int, inputs: int, gated: bool, normed: bool) -> LinearTiling:
    """Tiles by measurement on an H200 (docs/kernels.md).

    One row: a program asks for 4 KB of a weight at a time, and there are so many programs that they end together whatever their number.
    With a norm, whose weight each program reads too, it is 32 KB. More rows: four warps share 16 columns.
    """
    size, most = ITEM_BYTES[dtype], power_of_two(inputs)
    if rows > 1:
        return LinearTiling(16, max(16, min(256 // size, most // 4)), 4, stages=3)
    step = min((8192 if normed else 4096) // size, most)
    columns = (32768 // (2 if gated else 1) if normed else 4096) // (size * step)
    return LinearTiling(columns, step, 8 if normed else 4)
