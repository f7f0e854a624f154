"""What an untyped value is, from a file, from JSON or from a caller, in words that a type checker understands."""

from __future__ import annotations

import os
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeGuard


def is_table(value: Any) -> TypeGuard[Mapping[Any, Any]]:
    return isinstance(value, Mapping)


def is_list(value: Any) -> TypeGuard[list[Any]]:
    return isinstance(value, list)


def is_sequence(value: Any) -> TypeGuard[list[Any] | tuple[Any, ...]]:
    return isinstance(value, list | tuple)


def is_path(value: Any) -> TypeGuard[str | os.PathLike[str]]:
    return isinstance(value, str | os.PathLike)


def is_union(kind: Any) -> bool:
    """Whether a type is a union, however it is written."""
    # `Optional[int]` has this origin, and pydantic hands such out: nothing else names it before Python 3.14
    return typing.get_origin(kind) in (typing.Union, types.UnionType)  # pyright: ignore[reportDeprecated]
