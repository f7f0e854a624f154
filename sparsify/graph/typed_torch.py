"""What of torch, and of `operator`, is private or has no complete types, typed once, for the folders that are checked strictly."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol, overload

import sympy
import torch
from sympy.logic.boolalg import Boolean
from torch import Tensor
from torch._C import _functorch  # pyright: ignore[reportAttributeAccessIssue]  # not in torch's stubs
from torch._ops import OpOverload
from torch.autograd import forward_ad
from torch.fx.experimental.sym_node import SymNode
from torch.utils._python_dispatch import _disable_current_modes


def symbolic_node(number: torch.SymInt | torch.SymFloat | torch.SymBool) -> SymNode:
    """What stands behind a symbolic number: its expression, its value in the example, its ShapeEnv."""
    return number.node


@overload
def expression(number: torch.SymInt | torch.SymFloat) -> sympy.Expr: ...
@overload
def expression(number: torch.SymBool) -> Boolean: ...
def expression(number: torch.SymInt | torch.SymFloat | torch.SymBool) -> sympy.Basic:
    """A symbolic number as sympy writes it."""
    return number.node.expr


# how a graph computes the larger and the smaller of two sizes, and their quotient rounded down
SYMBOLIC_MAX: Callable[[Any, Any], Any] = torch.sym_max
SYMBOLIC_MIN: Callable[[Any, Any], Any] = torch.sym_min
FLOOR_DIV: Callable[[Any, Any], Any] = operator.floordiv
# both of two conditions
AND: Callable[[Any, Any], Any] = operator.and_

# as which Dynamo traces some functions of torch.nn.functional; not in torch's stubs
TRACED_FUNCTIONAL: Any = getattr(torch._C, "_nn")  # noqa: B009


def argument_names(op: OpOverload) -> tuple[str, ...]:
    """Of an op, in its schema's order."""
    return tuple(argument.name for argument in op._schema.arguments)


def as_floats(tensor: Tensor) -> list[float]:
    """The elements of a tensor of one dimension as Python's numbers. Synchronises."""
    return tensor.tolist()


def within_transform() -> bool:
    """Whether a transform of torch.func is open here."""
    return _functorch.maybe_current_level() is not None


def is_wrapped(tensor: Tensor) -> bool:
    """Whether a tensor is one that a transform of torch.func has wrapped."""
    return _functorch.is_functorch_wrapped_tensor(tensor)


def dual_levels() -> int:
    """Number of open levels of forward-mode derivatives."""
    return forward_ad._current_level + 1


def tangent(tensor: Tensor) -> Tensor | None:
    """Of a tensor at the innermost level, which must be open; None where it carries none."""
    return torch._VF._unpack_dual(tensor, level=forward_ad._current_level).tangent


class DeviceProperties(Protocol):
    """Of a CUDA device, as every release tells them."""

    name: str
    major: int
    minor: int
    multi_processor_count: int
    total_memory: int
    L2_cache_size: int


def device_properties(index: int | None) -> DeviceProperties:
    return torch.cuda.get_device_properties(index)


def without_modes() -> AbstractContextManager[object]:
    """In this block no mode of torch, such as the one for fake tensors, sees what is called."""
    return _disable_current_modes()


def define_op(library: torch.library.Library, schema: str, tags: Sequence[torch.Tag] = ()) -> None:
    library.define(schema, tags=tags)


def register_kernel(library: torch.library.Library, op: str, kernel: Callable[..., Any], dispatch_key: str) -> None:
    """Registers a kernel of an op of the library; op: its name without the namespace."""
    library.impl(op, kernel, dispatch_key)


def register_fake(library: torch.library.Library, op: str, fake: Callable[..., Any]) -> None:
    """Registers how an op of the library is traced; op: its name with the namespace."""
    torch.library.register_fake(op, fake, lib=library)
