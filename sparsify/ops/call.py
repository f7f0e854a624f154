"""A record for each op call: its fields are the op's arguments, and the op's schema is made from them.

A record is a frozen dataclass. Fields without a default value that may be given by position come first; the others are keywords. Tensor
fields say in their annotation what they must be (`Operand`), so that a call can be checked when it runs, on numbers, and when a graph
is rewritten, on symbolic sizes.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
import string
import typing
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor
from torch._ops import OpOverload

from sparsify.errors import UnsupportedError
from sparsify.ops.estimate import Estimate
from sparsify.ops.pages import Pages


@dataclass(frozen=True)
class Operand:
    """What a tensor must be.

    shape: names of its sizes; the same name is the same size throughout a call. "batch|1": the batch size or 1. "*": any size. Without
        names: exactly one element.
    holds: "same" (floating point, in the dtype of the first operand), "floats", "integers" or "anything".
    anywhere: it may lie on another device than the first operand.
    written: the op writes to it.
    """

    shape: str
    holds: str = "same"
    anywhere: bool = False
    written: bool = False

    @functools.cached_property
    def sizes(self) -> tuple[tuple[str, bool], ...]:
        """Name of every dimension's size, and whether 1 will do as well."""
        return tuple((name.removesuffix("|1"), name.endswith("|1")) for name in self.shape.split())


@dataclass(frozen=True)
class Argument:
    """One argument of an op.

    name: of the argument and of the record's field.
    wire: its type in the schema.
    keyword: whether it is given by name alone.
    default: of the field; MISSING: it must be given.
    operand: what a tensor must be; None where nothing is said.
    sent: what turns a field's value into one of the wire's type; None: nothing.
    received: what turns it back; None: nothing.
    """

    name: str
    wire: str
    keyword: bool
    default: Any = dataclasses.MISSING
    operand: Operand | None = None
    sent: Callable[[Any], Any] | None = None
    received: Callable[[Any], Any] | None = None

    @property
    def optional(self) -> bool:
        return self.default is not dataclasses.MISSING

    def is_default(self, value: Any) -> bool:
        return value is self.default or (not isinstance(value, Tensor) and value == self.default)

    @property
    def text(self) -> str:
        """As the schema writes it."""
        if not self.optional:
            return f"{self.wire} {self.name}"
        value = self.default if self.sent is None else self.sent(self.default)
        return f"{self.wire} {self.name}={repr(value).replace(chr(39), chr(34)) if isinstance(value, str) else value}"


def _estimate(value: Estimate | str) -> Estimate:
    return value if isinstance(value, Estimate) else Estimate.parse(value)


def _pages_text(value: Pages | None) -> str:
    return "" if value is None else str(value)


@functools.cache
def _parsed_pages(text: str) -> Pages | None:
    return Pages.parse(text) if text else None


def _pages(value: Pages | str | None) -> Pages | None:
    return _parsed_pages(value) if isinstance(value, str) else value


_WIRES: dict[Any, tuple[Any, ...]] = {
    Tensor: ("Tensor",),
    Tensor | None: ("Tensor?",),
    float: ("float",),
    bool: ("bool",),
    int: ("int",),
    int | None: ("SymInt?",),
    str: ("str",),
    tuple[int, ...]: ("int[]", list, tuple),
    tuple[float, ...]: ("float[]", list, tuple),
    Estimate: ("str", str, _estimate),
    Pages | None: ("str", _pages_text, _pages),
}


@functools.cache
def schema_arguments(record: type[OpCall]) -> tuple[Argument, ...]:
    """The op's arguments in the order of its schema, without the version."""
    hints = typing.get_type_hints(record, include_extras=True)
    found: list[Argument] = []
    aliases = iter(string.ascii_lowercase)
    for field in dataclasses.fields(record):
        hint, operand = hints[field.name], None
        if typing.get_origin(hint) is typing.Annotated:
            hint, operand = typing.get_args(hint)
        wire, *converted = _WIRES[hint]
        if operand is not None and operand.written:
            wire = wire.replace("Tensor", f"Tensor({next(aliases)}!)")
        found.append(Argument(field.name, wire, field.kw_only is True, field.default, operand, *converted))
    return tuple(sorted(found, key=lambda argument: argument.keyword))


@dataclass(frozen=True, eq=False)
class OpCall:
    """One call of an op of ours.

    NAME: of the op.
    VERSION: torch caches compiled graphs by op name and constants, not by kernel source: raised when semantics change.
    UNREAD: arguments that no kernel has to know, since they say how memory is laid out or what is done to its output.
    """

    NAME: ClassVar[str]
    VERSION: ClassVar[int]
    UNREAD: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def schema(cls) -> str:
        """The op's name and arguments for `torch.library`, the version last."""
        arguments = schema_arguments(cls)
        positional = [argument.text for argument in arguments if not argument.keyword]
        keywords = [argument.text for argument in arguments if argument.keyword]
        return f"{cls.NAME}({', '.join([*positional, '*', *keywords])}, int version)"

    @classmethod
    def bind(cls, *args: Any, **options: Any) -> Self:
        """The record of a call as torch hands it to a kernel: without the arguments that have their default."""
        given = dict(zip((argument.name for argument in schema_arguments(cls)), args, strict=False)) | options
        given.pop("version", None)
        for argument in schema_arguments(cls):
            if argument.received is not None and argument.name in given:
                given[argument.name] = argument.received(given[argument.name])
        return cls(**given)

    def arguments(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Positional and keyword arguments of the op, those that have their default left out."""
        positional: list[Any] = []
        keywords: dict[str, Any] = {}
        for argument in schema_arguments(type(self)):
            value = getattr(self, argument.name)
            if argument.optional and argument.is_default(value):
                continue
            value = value if argument.sent is None else argument.sent(value)
            if argument.keyword:
                keywords[argument.name] = value
            else:
                positional.append(value)
        return tuple(positional), keywords | {"version": self.VERSION}

    def beyond(self, served: Collection[str]) -> list[str]:
        """Arguments that do not have their default and are not among `served`: a kernel that knows only those must not take the call."""
        known = {*served, *self.UNREAD}
        given = (argument for argument in schema_arguments(type(self)) if argument.name not in known)
        return [argument.name for argument in given if argument.optional and not argument.is_default(getattr(self, argument.name))]

    @property
    def device(self) -> torch.device:
        """Of the first tensor. Every dispatch asks, so that the others are not looked at."""
        values = (getattr(self, argument.name) for argument in schema_arguments(type(self)))
        return next(value.device for value in values if isinstance(value, Tensor))

    @classmethod
    def op(cls) -> OpOverload:
        """What graphs call."""
        return getattr(torch.ops.sparsify, cls.NAME).default

    def run(self) -> Any:
        """Calls the op."""
        positional, keywords = self.arguments()
        return self.op()(*positional, **keywords)

    def common(self, other: type[OpCall]) -> dict[str, Any]:
        """The fields that a record of another op has too, by name."""
        return {argument.name: getattr(self, argument.name) for argument in schema_arguments(other) if hasattr(self, argument.name)}

    def map_tensors(self, change: Callable[[Tensor], Tensor]) -> Self:
        """The same call on other tensors."""
        changed = {name: change(tensor) for name, tensor in self.tensors().items()}
        return dataclasses.replace(self, **changed)

    def tensors(self) -> dict[str, Tensor]:
        """The tensors of this call by name."""
        found = ((argument.name, getattr(self, argument.name)) for argument in schema_arguments(type(self)) if "Tensor" in argument.wire)
        return {name: tensor for name, tensor in found if tensor is not None}

    def check(self) -> None:
        """Checks that the operands fit together.

        Raises:
            UnsupportedError: says what is wrong.
        """
        if wrong := self.misfit():
            self.need(False, wrong)

    def need(self, holds: bool, otherwise: str, hint: str = "") -> None:
        """Raises UnsupportedError unless the condition holds."""
        if not holds:
            raise UnsupportedError(otherwise, where=f"sparsify::{self.NAME}", hint=hint)

    def misfit(
        self, sizes: Callable[[Tensor], Sequence[Any]] = lambda tensor: tensor.shape, differ: Callable[[Any, Any], bool] = operator.ne
    ) -> str:
        """What is wrong with a tensor's shape, dtype or device; empty when nothing is.

        Args:
            sizes: the sizes of a tensor, as numbers or symbols.
            differ: whether two sizes are known to be different.
        """
        described = {argument.name: argument.operand for argument in schema_arguments(type(self)) if argument.operand is not None}
        return misfit({name: tensor for name, tensor in self.tensors().items() if name in described}, described, sizes, differ)


def misfit(
    tensors: dict[str, Tensor],
    described: dict[str, Operand],
    sizes: Callable[[Tensor], Sequence[Any]],
    differ: Callable[[Any, Any], bool],
    first: Tensor | None = None,
) -> str:
    """As `OpCall.misfit`.

    Args:
        tensors: by name.
        described: what they must be, by name.
        first: the tensor whose dtype and device they share; None: the first of them.
    """
    first = next(iter(tensors.values())) if first is None else first
    known: dict[str, Any] = {}
    for name, tensor in tensors.items():
        operand = described[name]
        if tensor.device != first.device and not operand.anywhere:
            return f"{name} is on {tensor.device}, not {first.device}"
        if operand.holds == "same" and tensor.dtype is not first.dtype:
            return f"{name} is {tensor.dtype}, not {first.dtype}"
        if operand.holds != "anything" and (tensor.is_floating_point() is (operand.holds == "integers") or tensor.is_complex()):
            return f"{name} is {tensor.dtype}, not {'integers' if operand.holds == 'integers' else 'floating point'}"
        if not operand.sizes:
            if tensor.numel() != 1:
                return f"{name} has {tensor.numel()} elements, not one"
            continue
        shape = sizes(tensor)
        if len(shape) != len(operand.sizes):
            return f"{name} has {len(shape)} dimensions, not {len(operand.sizes)}"
        for size, (letter, may_be_one) in zip(shape, operand.sizes, strict=True):
            if letter == "*" or (may_be_one and size == 1):
                continue
            wanted = 1 if letter == "1" else known.setdefault(letter, size)
            if differ(size, wanted):
                return f"{name} is {list(tensor.shape)}, not [{operand.shape.replace(' ', ', ')}]: {letter} is {wanted}"
        heads, kv_heads = known.get("query_heads"), known.get("kv_heads")
        if heads is not None and kv_heads is not None and (kv_heads == 0 or differ(heads % kv_heads, 0)):
            return f"{heads} query heads are no multiple of {kv_heads} KV heads"
    return ""
