"""What a generated kernel takes.

One list of arguments is the signature in the text, the order at a launch, and the types for a compile without a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from sparsify.errors import UnsupportedError

# dtypes as a signature writes them, and as the text does
NUMBERS = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
ITEM_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}
# a row of a tile holds a whole head
MAX_HEAD_DIM = 256


@dataclass(frozen=True)
class Argument:
    """One argument of a kernel.

    Args:
        name: the parameter's, and the key of its value at a launch.
        type: as a Triton signature writes it: `*bf16` (pointer), `i32`, `fp32`, `tensordesc<bf16[64,128]>`, `constexpr`.
        aligned: a multiple of 16 in ordinary calls, which Triton specialises on.
        specialised: whether Triton may compile once more for numbers that are 1 or a multiple of 16; no for what changes from call to call.
        value: makes its value from the record of a call; None where the launch says it.
    """

    name: str
    type: str
    aligned: bool = False
    specialised: bool = True
    value: Callable[[Any], Any] | None = field(default=None, compare=False)

    def valued(self, value: Callable[[Any], Any]) -> Argument:
        """The same argument, with how its value is made."""
        return replace(self, value=value)


def argument_values(arguments: Iterable[Argument], call: Any) -> dict[str, Any]:
    """By name, the values of those arguments that say how they are made from a call's record."""
    makers = {argument.name: argument.value for argument in arguments}
    return {name: make(call) for name, make in makers.items() if make is not None}


def pointers(dtype: str, *names: str) -> list[Argument]:
    """Pointers to tensors, which torch aligns."""
    return [Argument(name, "*" + dtype, True) for name in names]


def integers(*names: str, aligned: bool = False, specialised: bool = True) -> list[Argument]:
    """Integers of 32 bits: lengths, strides, counts."""
    return [Argument(name, "i32", aligned, specialised) for name in names]


def floats(*names: str) -> list[Argument]:
    """Numbers of 32 bits."""
    return [Argument(name, "fp32") for name in names]


def descriptor(name: str, dtype: str, *box: int) -> Argument:
    """A tensor descriptor, through which the copy engine moves boxes of this shape."""
    return Argument(name, f"tensordesc<{dtype}[{','.join(map(str, box))}]>")


def constexprs(*names: str) -> list[Argument]:
    """Numbers that are part of the compiled kernel."""
    return [Argument(name, "constexpr") for name in names]


def present(*optional: tuple[bool, Iterable[Argument]]) -> list[Argument]:
    """Of pairs (whether a kernel has these arguments, the arguments), those that it has."""
    return [argument for has, arguments in optional if has for argument in arguments]


def parameters(arguments: Iterable[Argument], separator: str = ",\n    ") -> str:
    """The arguments as a kernel's signature lists them, one a line unless another separator is given."""
    return separator.join(a.name + (": tl.constexpr" if a.type == "constexpr" else "") for a in arguments)


def unspecialised(arguments: Iterable[Argument]) -> str:
    """The arguments that `do_not_specialize` of a kernel's decorator lists, without the brackets."""
    return ", ".join(f'"{a.name}"' for a in arguments if not a.specialised)


def padded(size: int) -> int:
    """The tile dimension that holds `size`: a power of two, at least 16, as `tl.dot` wants it."""
    return max(16, 1 << (size - 1).bit_length())


def dot_precision(dtype: str) -> str:
    """What a product of `dtype` adds to the arguments of `tl.dot`: fp32 stays fp32, where Triton would take TF32."""
    return ', input_precision="ieee"' if dtype == "fp32" else ""


def check_head_dims(where: str, *head_dims: int) -> None:
    """Raises UnsupportedError, naming the op `where`, unless tiles hold these head dims."""
    if not 0 < max(head_dims) <= MAX_HEAD_DIM:
        raise UnsupportedError(f"no kernel has head dims {' and '.join(map(str, head_dims))}", where=where, hint=f"at most {MAX_HEAD_DIM}")


def head_dim_values(dtype: str, qk_head_dim: int, v_head_dim: int) -> dict[str, str]:
    """What templates say of head dims that are no powers of two, by name: guards of loads, and of the output's store; and of fp32 products.

    dtype: as in Triton, such as "bf16".
    """
    qk_whole, v_whole = padded(qk_head_dim) == qk_head_dim, padded(v_head_dim) == v_head_dim
    return {
        "precision": dot_precision(dtype),
        "qk_guard": "" if qk_whole else f" & (qk_dims < {qk_head_dim})[None, :]",
        "v_guard": "" if v_whole else f" & (v_dims < {v_head_dim})[None, :]",
        "v_store": "" if v_whole else f", mask=v_dims < {v_head_dim}",
    }
