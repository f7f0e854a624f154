"""Reads off the values of a mask what it says: a guess for calls to come, to be compared with each call's own mask."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, fx

from sparsify.graph.typed_torch import AND
from sparsify.masks.symbolic import FURTHEST

Call = Callable[..., Any]

Start = Literal["bottom right", "top left", "tensor"]


@dataclass(frozen=True)
class Constant:
    """All elements are this number."""

    number: float | int | bool


@dataclass(frozen=True)
class Visibility:
    """A tensor [.., query_len, key_len] of two numbers, the same for all heads, as a conjunction of clauses.

    shown, hidden: the numbers where a key is visible and where it is not.
    start: where the first query row stands, for the causal clause: as `predicate.QueryStart`, or read off the mask on every call; None
        without the clause.
    window: tokens that a row sees, its own included; None without the clause.
    tokens: whether some keys are visible to no row at all, as padding is.
    documents: whether a row sees no key before a place of its own, which keys of one document share.
    """

    shown: float | int | bool
    hidden: float | int | bool
    start: Start | None
    window: int | None = None
    tokens: bool = False
    documents: bool = False

    def describe(self) -> str:
        """One short phrase: `causal from a tensor, window 4, padding`."""
        words = [] if self.start is None else ["causal" + ("" if self.start == "bottom right" else f" from {self.start}")]
        words += [] if self.window is None else [f"window {self.window}"]
        return ", ".join([*words, *(["padding"] if self.tokens else []), *(["documents"] if self.documents else [])]) or "none"


Observed = Constant | Visibility


def observe(mask: Tensor) -> Observed | None:
    """What a tensor of at least one element says; None where that is none of the known forms.

    Args:
        mask: real, not fake: [query_len, key_len], [heads, query_len, key_len] or [batch, heads, query_len, key_len]; of other shapes
            only whether all elements are one number is said.
    """
    if mask.dim() < 2 or mask.numel() == 0 or mask.is_complex():
        return None
    low, high = (_number(value) for value in torch.aminmax(mask))
    if low == high:
        return Constant(low)
    if mask.dim() > 4 or low != low or not bool(((mask == low) | (mask == high)).all()):
        return None
    forms: list[Visibility] = []
    for shown, hidden in ((high, low), (low, high)):
        seen = shows(Visibility(shown, hidden, None), mask, run)
        if not bool((seen == (mask == shown)).all()):
            return None  # heads differ
        forms += _forms(seen, shown, hidden)
    # what a mask shows and what it hides may both have a form: the plainer one first
    for form in sorted(forms, key=lambda form: form.start == "tensor"):
        said = visible(form, mask, (mask.shape[-2], mask.shape[-1]), mask.device, run)
        if bool((said == (mask == form.shown)).all()):
            return form
    return None


def is_bias(mask: Tensor) -> bool:
    """Whether a real tensor of at least one element holds more than two numbers: those of a mask are two."""
    if not mask.dtype.is_floating_point:
        return False
    numbers = mask[~mask.isnan()]
    if numbers.numel() == 0:
        return False
    low, high = torch.aminmax(numbers)
    return not bool(((numbers == low) | (numbers == high)).all())


def _number(value: Tensor) -> float | int | bool:
    return value.item()


def run(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Calls a function on tensors."""
    return function(*args, **kwargs)


def _forms(seen: Tensor, shown: float | int | bool, hidden: float | int | bool) -> Iterator[Visibility]:
    query_len, key_len = seen.shape[-2:]
    first, last, rows = _first(seen), key_len - 1 - _first(seen.flip(-1)), seen.any(-1)
    place = torch.arange(query_len, device=seen.device)
    reach = int((last - place)[rows].max())
    padded = not bool(seen.any(-2).all())
    clauses: tuple[dict[str, bool], ...] = ({}, {"tokens": True}) if padded else ({},)
    if padded:
        yield Visibility(shown, hidden, None, tokens=True)
    if query_len == 1:
        return
    start: Start = "bottom right" if reach == key_len - query_len else "top left" if reach == 0 else "tensor"
    yield from (Visibility(shown, hidden, start, **more) for more in clauses)
    width = int((place + reach - first)[rows].max()) + 1
    yield from (Visibility(shown, hidden, start, width, **more) for more in clauses)
    if query_len == key_len and reach == 0:
        yield from (Visibility(shown, hidden, start, documents=True, **more) for more in clauses)


def _first(seen: Tensor) -> Tensor:
    """The first visible key of each row; 0 for a row without one."""
    return seen.to(torch.uint8).argmax(-1)


def visible(form: Visibility, mask: Any, lengths: tuple[Any, Any], device: torch.device, call: Call) -> Any:
    """The booleans that a form says, broadcastable to the mask; what is a tensor in it is taken from the mask.

    Args:
        mask: the tensor that was observed, or the graph node of one.
        lengths: query_len and key_len, integers or nodes.
        call: calls a torch function or an operator on tensors, or inserts the call of it into a graph.
    """
    seen = shows(form, mask, call)
    query = call(torch.unsqueeze, call(torch.arange, lengths[0], device=device), 1)
    key = call(torch.unsqueeze, call(torch.arange, lengths[1], device=device), 0)
    clauses: list[Any] = []
    if form.start is not None:
        row = query
        if form.start == "bottom right":
            row = call(operator.add, query, call(operator.sub, lengths[1], lengths[0]))
        elif form.start == "tensor":
            row = call(operator.add, query, call(torch.amax, call(torch.where, seen, call(operator.sub, key, query), -FURTHEST)))
        clauses.append(call(operator.le, key, row))
        if form.window is not None:
            clauses.append(call(operator.gt, key, call(operator.sub, row, form.window)))
    if form.tokens:
        clauses.append(call(torch.unsqueeze, call(torch.any, seen, -2), -2))
    if form.documents:
        border = call(torch.amin, call(torch.where, seen, key, FURTHEST), -1)
        clauses.append(call(operator.eq, call(torch.unsqueeze, border, -2), call(torch.unsqueeze, border, -1)))
    return functools.reduce(lambda one, other: call(AND, one, other), clauses)


def shows(form: Visibility, mask: Any, call: Call) -> Any:
    """Where the first head's mask shows a key."""
    rank = (mask.meta["example_value"] if isinstance(mask, fx.Node) else mask).dim()
    one = mask if rank == 2 else call(torch.narrow, mask, -3, 0, 1)
    return one if form.shown is True else call(operator.eq, one, form.shown)
