"""The library that our ops are registered in, and how an op is defined: schema, fake kernel, and what it refuses. Kernels register from
`sparsify.backends`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch._ops import OpOverload

from sparsify.graph.typed_torch import define_op, register_fake
from sparsify.ops import gradients
from sparsify.ops.call import OpCall

Call = TypeVar("Call", bound=OpCall)
NAMESPACE = "sparsify"
TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order)
library = torch.library.Library(NAMESPACE, "DEF")
_NAMES: list[str] = []


def defined() -> tuple[str, ...]:
    """Names of all ops."""
    return tuple(_NAMES)


def define(call: type[Call], fake: Callable[[Call], Any], returns: str = "(Tensor, Tensor)") -> OpOverload:
    """Defines the op of a record.

    Args:
        call: the record.
        fake: makes empty outputs from a call's record.
        returns: the outputs' types in the schema.
    """
    define_op(library, f"{call.schema()} -> {returns}", TAGS)

    def outputs(*args: Any, **options: Any) -> Any:
        return fake(call.bind(*args, **options))

    traced(call.NAME, outputs)
    return getattr(torch.ops.sparsify, call.NAME).default


def traced(op: str, fake: Callable[..., Any]) -> None:
    """Says how an op is traced. Tracing refuses what running does: derivatives, and transforms of torch.func.

    Args:
        op: its name.
        fake: makes empty outputs from a call's arguments.
    """

    _NAMES.append(op)

    def call(*args: Any, **options: Any) -> Any:
        gradients.refuse(op, args, options)
        return fake(*args, **options)

    register_fake(library, f"{NAMESPACE}::{op}", call)
    gradients.refuse_transforms(op, library)
