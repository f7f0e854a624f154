"""Postpones the attention masks that a model makes before its layers run until a layer is captured.

A region's graph then shows how its mask is computed, which is what a proof reads, and a mask of query_len × key_len is never written where
no attention needs it.
"""

from __future__ import annotations

import contextvars
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree
from transformers import masking_utils
from transformers.masking_utils import (
    and_masks,
    blockwise_overlay,
    causal_mask_function,
    packed_sequence_mask_function,
    sliding_window_overlay,
)

from sparsify.distributed import sequence

# whether masks that are asked for in this thread are put off: around the calls of a model whose layers are regions
postponing: contextvars.ContextVar[bool] = contextvars.ContextVar("sparsify_postponing", default=False)


@dataclass(frozen=True)
class Recipe:
    """How a mask is made: `function(**call)`.

    function: one of transformers' mask functions.
    call: its arguments by name: sizes, offsets, a condition on indices, a padding mask.
    documents: int32 [batch, key_len]: beside the condition a row sees its own document alone; None: whatever the condition shows. Apart
        from the condition, whose numbers are constants of a graph.
    """

    function: Callable[..., Tensor]
    call: dict[str, Any]
    documents: Tensor | None = None

    def make(self) -> Tensor:
        return _made(self.function, self.call, self.documents)

    @functools.cached_property
    def form(self) -> tuple[Any, ...]:
        """What tells graphs apart that make such a mask: code and kinds of arguments, whatever their sizes."""
        code = tuple(getattr(part, "__code__", None) for part in _parts(self.call.get("mask_function")))
        named = tuple((name, isinstance(value, Tensor), value is None) for name, value in self.call.items())
        return self.function, code, named, self.documents is None


def _made(function: Callable[..., Tensor], call: dict[str, Any], documents: Tensor | None) -> Tensor:
    if documents is not None:
        call = {**call, "mask_function": and_masks(call["mask_function"], packed_sequence_mask_function(documents))}
    return function(**call)


_CAUSAL = causal_mask_function.__code__
_WINDOW = sliding_window_overlay(1).__code__
_GROUPS = blockwise_overlay(torch.zeros(1, 1)).__code__
_AND = and_masks(causal_mask_function).__code__
_PACKED = packed_sequence_mask_function(torch.zeros(1, 1)).__code__
# of texts that are packed in one row, by the numbers of their positions; older releases count places
_REMAP = getattr(masking_utils, "remap_positions_for_packed_sequence", None)
_REMAPPED = None if _REMAP is None else _REMAP(causal_mask_function, torch.zeros(1, 1)).__code__
_KINDS: dict[Any, str] = {_CAUSAL: "causal", _WINDOW: "window", _GROUPS: "groups"}


def kinds(function: Any) -> set[str] | None:
    """What a condition on indices is made of: "causal", "window" and "groups", of tokens that see each other; None for anything else."""
    ends = [part for part in _parts(function) if not any(callable(value) and not isinstance(value, Tensor) for value in _closed_over(part))]
    found = {_KINDS.get(getattr(part, "__code__", None)) for part in ends}
    return None if None in found else {kind for kind in found if kind is not None}


def groups(function: Any) -> list[Tensor]:
    """Of each such condition the group of each token, int64 [batch, tokens]; negative where a token is of none."""
    return [value for part in _parts(function) if getattr(part, "__code__", None) is _GROUPS for value in _tensors(part)]


def of_one_text(function: Any) -> Any:
    """A condition on indices without what tells packed texts apart, where each row holds one text.

    transformers leaves that out itself, but not while something is compiled, and asks torch for that by a flag that another thread may
    have set. The host waits for the device only where there is such a part.
    """
    if getattr(function, "__code__", None) is not _AND:
        return function
    parts = list(_closed_over(function))
    packed = [tensor for part in parts if getattr(part, "__code__", None) is _PACKED for tensor in _tensors(part)]
    if not packed or any(_capturing(tensor) or bool((tensor[:, -1] != 0).any()) for tensor in packed):
        return function
    left = [_by_places(part) for part in parts if getattr(part, "__code__", None) is not _PACKED]
    return left[0] if len(left) == 1 else and_masks(*left)


def _by_places(function: Any) -> Any:
    """A condition on positions as one on places, which rise with them: those of one text differ by as much."""
    if _REMAPPED is None or getattr(function, "__code__", None) is not _REMAPPED:
        return function
    return next(value for value in _closed_over(function) if callable(value) and not isinstance(value, Tensor))


def of_columns(recipe: Recipe, query_start: int, columns: Tensor, **sizes: Any) -> Recipe:
    """The recipe over fewer keys, which stand at other places than they did.

    Args:
        query_start: of the first query's place, less that of its index.
        columns: int64 [batch, keys], the places of the first keys; those behind them stand `query_start` further on than their indices.
            Where `query_start` is 0, so do the queries.
        sizes: arguments of the recipe that change.
    """
    function = recipe.call["mask_function"]

    def at_columns(batch: Any, head: Any, query: Any, key: Any) -> Any:
        among = columns[batch, key.clamp(max=columns.shape[1] - 1)]
        if query_start == 0:
            return function(batch, head, columns[batch, query], among)
        return function(batch, head, query + query_start, torch.where(key < columns.shape[1], among, key + query_start))

    call = {**recipe.call, **sizes, "mask_function": at_columns, "allow_is_causal_skip": False}
    call.pop("local_size", None)  # by which nothing but a mask that can be left out is found
    return Recipe(recipe.function, call, recipe.documents)


class Later(torch.Tensor):
    """A tensor without memory. The first operation on it makes the real one, which takes its place in all of them."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # pyright: ignore[reportAssignmentType]  # as torch's documents have it

    def make(self) -> Tensor:
        raise NotImplementedError

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = _pytree.tree_map(real, (args, kwargs or {}))
        return function(*args, **kwargs)


def real(value: Any) -> Any:
    """What a value stands for: itself, or what a `Later` makes."""
    return value.make() if isinstance(value, Later) else value


class PostponedMask(Later):
    """A mask [batch, 1, query_len, key_len] without memory, for models that may change masks."""

    recipe: Recipe
    made: Tensor | None

    def __new__(cls, recipe: Recipe, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str) -> PostponedMask:
        mask = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=torch.device(device))
        mask.recipe, mask.made = recipe, None
        return mask

    def make(self) -> Tensor:
        if self.made is None:
            self.made = self.recipe.make()
        return self.made

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"PostponedMask({tuple(self.shape)})"


def postpone(base: str, function: Callable[..., Any], call: dict[str, Any]) -> Any:
    """The mask `function(**call)` of transformers' implementation `base`, postponed; None where scaled_dot_product_attention needs none.

    The padding is looked at once a call, which synchronises with the device, as transformers itself does outside of compiled code.
    """
    call = dict(call)
    if call.get("mask_function") is not None:
        call["mask_function"] = of_one_text(call["mask_function"])
    query_len, key_len, padding = call["q_length"], call["kv_length"], call.get("attention_mask")
    sizes = (call["batch_size"], query_len, key_len)
    if call.get("use_vmap") and kinds(call.get("mask_function")) is not None:
        call["use_vmap"] = False  # it asks for that where it does not know whether a condition may be given many indices at once
    if not all(type(size) is int for size in sizes) or call.get("use_vmap"):
        return function(**call)
    window = call.get("local_size")
    # where processes share a text, all of them have flags if one of them has padding
    shared = sequence.under_way()
    dropped = padding is not None and not (shared is not None and shared.padded) and not _capturing(padding) and bool(padding.all())
    if dropped and padding is not None and padding.shape[-1] >= key_len + call.get("kv_offset", 0):
        padding = call["attention_mask"] = None
    plain = padding is None and (window is None or key_len < window)
    if call.get("allow_is_bidirectional_skip"):
        if plain:
            return function(**call)
        call["allow_is_bidirectional_skip"] = False  # asked just now
    if base == "sdpa" and call.get("allow_is_causal_skip", True) and plain and (query_len == 1 or key_len == query_len):
        return None
    # what layers count on, they change while they run: the length of a static cache is a tensor
    for name in ("q_offset", "kv_offset"):
        if isinstance(call.get(name), Tensor):
            call[name] = call[name].clone()
    dtype = torch.bool if base == "sdpa" else call.get("dtype", torch.float32)
    return PostponedMask(Recipe(function, call), (call["batch_size"], 1, query_len, key_len), dtype, call.get("device", "cpu"))


def _capturing(tensor: Tensor) -> bool:
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


# arguments of a recipe that change from call to call
_VARYING = ("batch_size", "q_length", "kv_length", "q_offset", "kv_offset", "attention_mask")


_DOCUMENTS = "documents"  # the name of a recipe's documents among them


@dataclass(frozen=True)
class Plan:
    """How a region makes a mask.

    A size that is taken from the region's other inputs has one symbol in its graph.

    function: of the recipe.
    fixed: the recipe's arguments that are the same in all calls.
    rows: whether batch_size and q_length are those of the hidden states.
    keys: whether kv_length and kv_offset are the cache layer's, or q_length without a cache.
    start: whether q_offset is the cache layer's length.
    """

    function: Callable[..., Tensor]
    fixed: dict[str, Any]
    rows: bool
    keys: bool
    start: bool

    def form(self) -> tuple[bool, ...]:
        """What tells graphs apart, beside the recipe's own."""
        return self.rows, self.keys, self.start, "mask_function" in self.fixed


def plan(recipe: Recipe, hidden: Tensor, layer: Any) -> tuple[Plan, dict[str, Any]]:
    """The plan for a layer's mask and what varies of its recipe. layer: the cache layer, None without a cache."""
    call = recipe.call
    same = lambda one, other: type(one) is int and type(other) is int and one == other
    query_len, padding = call["q_length"], call.get("attention_mask")
    rows = (padding is None or padding.shape[0] == hidden.shape[0]) and tuple(hidden.shape[:2]) == (call["batch_size"], query_len)
    if layer is None:
        keys, start = rows and same(call["kv_length"], query_len) and call.get("kv_offset", 0) == 0, False
    else:
        key_len, offset = layer.get_mask_sizes(query_len)
        keys = rows and same(key_len, call["kv_length"]) and same(offset, call.get("kv_offset", 0))
        start = same(call.get("q_offset", 0), layer.get_seq_length())
    taken = {"batch_size": rows, "q_length": rows, "kv_length": keys, "kv_offset": keys and layer is not None, "q_offset": start}
    # without a cache nothing comes before the call's tokens: as a number that varies, 0 would be an operand of attention
    first = {name for name in ("q_offset", "kv_offset") if layer is None and same(call.get(name), 0)}
    varying = {name: call[name] for name in _VARYING if call.get(name) is not None and not taken.get(name) and name not in first}
    fixed = {name: value for name, value in call.items() if name not in _VARYING or name in first}
    if any(tensor.dim() > 1 for tensor in _tensors(call.get("mask_function"))):  # over tokens: their number varies too
        varying["mask_function"] = fixed.pop("mask_function")
    if recipe.documents is not None:
        varying[_DOCUMENTS] = recipe.documents
    return Plan(recipe.function, fixed, rows, keys, start), varying


def _closed_over(function: Any) -> Iterator[Any]:
    for cell in getattr(function, "__closure__", None) or ():
        yield from cell.cell_contents if isinstance(cell.cell_contents, tuple | list) else (cell.cell_contents,)


def _parts(function: Any) -> Iterator[Any]:
    """A condition on indices, and those that it is made of."""
    yield function
    for value in _closed_over(function):
        if callable(value) and not isinstance(value, Tensor):
            yield from _parts(value)


def _tensors(function: Any) -> Iterator[Tensor]:
    """Tensors that a condition on indices refers to."""
    return (value for part in _parts(function) for value in _closed_over(part) if isinstance(value, Tensor))


def build(plan: Plan, varying: dict[str, Any], hidden: Tensor, layer: Any) -> Tensor:
    """The mask, within a region that is being captured."""
    call = {**plan.fixed, **varying}
    documents = call.pop(_DOCUMENTS, None)
    padding = varying.get("attention_mask")
    if plan.rows and padding is not None and padding.shape[0] != hidden.shape[0]:  # asked for the guard: one symbol for both
        raise ValueError("the padding mask has another batch size than the hidden states")
    if plan.rows:
        call["batch_size"], call["q_length"] = hidden.shape[0], hidden.shape[1]
    if plan.keys and layer is None:
        call["kv_length"] = hidden.shape[1]
    elif plan.keys:
        call["kv_length"], call["kv_offset"] = layer.get_mask_sizes(hidden.shape[1])
    if plan.start and layer is not None:
        call["q_offset"] = layer.get_seq_length()
    return _made(plan.function, call, documents)
