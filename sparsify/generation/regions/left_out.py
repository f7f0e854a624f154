"""Caches whose layers hold fewer tokens than the text has: what was left out before a layer is one number beside its keys. A layer with a
sliding window keeps a place for each token of its window, and masks hide those that it was not given.

A model asks the first layer how long its text is. What stands outside of the layers (masks, positions, `generate()`) therefore counts the
tokens that were left out, and what runs within a layer does not.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.masking_utils import sdpa_mask, sliding_window_causal_mask_function

from sparsify.errors import CacheError
from sparsify.generation.caches import cropping
from sparsify.generation.caches.layer import SparseLayer
from sparsify.generation.regions.masks import PostponedMask, Recipe, kinds, of_columns, postponing

# Layers of ordinary caches become one of the two classes below while they are empty, so that these have one base each, and share no mixin.


def _check_crop(layer: Any, held: int, tokens_to_remove: int) -> None:
    """Raises CacheError where a narrowed layer's last tokens cannot be taken back.

    tokens_to_remove: negative; releases that take a positive number for the text's new length count tokens that a layer does not have.
    """
    if not layer.fixed:
        return
    cropping.check_amount(tokens_to_remove)
    if held + tokens_to_remove < layer.fixed:
        raise CacheError(
            f"a layer was given some tokens of the prompt, of which {-tokens_to_remove} cannot be taken back",
            where="crop",
            hint="crop no more than what came after the last token that was left out",
        )


def _repeated(columns: tuple[Tensor, ...], repeats: int) -> tuple[Tensor, ...]:
    return tuple(one.repeat_interleave(repeats, 0) for one in columns)


def _taken(columns: tuple[Tensor, ...], rows: Tensor) -> tuple[Tensor, ...]:
    return tuple(one[rows.to(one.device)] for one in columns)


class NarrowedLayer(DynamicLayer):
    """A layer of a DynamicCache that holds the tokens that it was given, side by side.

    left_out: columns of the text that this one was not given.
    columns: int64 [batch, kept], where the prompt's tokens that it was given stood, rising, in a tuple; empty where it was given all.
    fixed: tokens of it before the last run that no layer has a gap in: what comes before cannot be cropped.
    is_first: whether the model asks this layer for the length of its text.
    narrowed: whether any layer of the cache was given some tokens only.
    """

    left_out = 0
    columns: tuple[Tensor, ...] = ()
    fixed = 0
    is_first = False
    narrowed = False

    def get_seq_length(self) -> int:
        held = super().get_seq_length()
        return held + self.left_out if held and self.is_first else held

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Raises CacheError where one mask is made for several tokens in all layers, which hold different numbers of tokens."""
        if not postponing.get():
            check_whole(self, query_length)
        return super().get_mask_sizes(query_length)

    def crop(self, tokens_to_remove: int) -> None:
        """Raises CacheError where the tokens cannot be taken back; changes nothing then."""
        if self.is_initialized and self.keys is not None:
            _check_crop(self, self.keys.shape[-2], tokens_to_remove)
        super().crop(tokens_to_remove)

    def reset(self) -> None:
        self.left_out, self.columns, self.fixed, self.narrowed = 0, (), 0, False
        super().reset()

    def reorder_cache(self, beam_idx: Any) -> None:
        super().reorder_cache(beam_idx)
        self.columns = _taken(self.columns, beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self.columns = _repeated(self.columns, repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self.columns = _taken(self.columns, indices)


class NarrowedSlidingLayer(DynamicSlidingWindowLayer):
    """A layer with a sliding window, which counts places: it holds the window's, and nothing at those that were left out.

    columns, fixed: as of `NarrowedLayer`; fixed counts places.
    """

    columns: tuple[Tensor, ...] = ()
    fixed = 0

    def crop(self, tokens_to_remove: int) -> None:
        """Raises CacheError where the tokens cannot be taken back; changes nothing then."""
        if self.is_initialized:
            _check_crop(self, self.get_seq_length(), tokens_to_remove)
        super().crop(tokens_to_remove)

    def reset(self) -> None:
        self.columns, self.fixed = (), 0
        super().reset()

    def reorder_cache(self, beam_idx: Any) -> None:
        super().reorder_cache(beam_idx)
        self.columns = _taken(self.columns, beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self.columns = _repeated(self.columns, repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self.columns = _taken(self.columns, indices)

    def spread(self, tokens: int) -> None:
        """Gives each token of the prompt that was just read, of `tokens`, the place where it stood."""
        if not self.columns or self.keys is None or self.values is None or self.get_seq_length() == tokens:
            return
        (columns,), held = self.columns, self.keys.shape[-2]
        width = tokens if self.record_past else min(tokens, self.sliding_window - 1)
        slots = columns[:, columns.shape[1] - held :] - (tokens - width)
        slots = torch.where(slots < 0, width, slots)[:, None, :, None]  # beyond the window: into a slot that is cut off

        def placed(rows: Tensor) -> Tensor:
            empty = rows.new_zeros((*rows.shape[:2], width + 1, rows.shape[3]))
            return empty.scatter_(2, slots.expand_as(rows), rows)[:, :, :width].contiguous()

        self.keys, self.values, self.cumulative_length = placed(self.keys), placed(self.values), tokens

    def gaps(self, query_len: int) -> tuple[int, int] | None:
        """Keys and first place of the window of a later call, where it reaches back to a token that was left out; else None."""
        key_len, start = super().get_mask_sizes(query_len)
        return (key_len, start) if self.columns and start < self.fixed else None

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Raises CacheError where a mask is made that does not hide the places of tokens that were left out."""
        if not postponing.get():
            check_whole(self, query_length)
        return super().get_mask_sizes(query_length)

    def holds(self, length: int) -> Tensor:
        """Which of a text's first columns are there for this layer, int64 [batch, length]."""
        (columns,) = self.columns
        there = torch.ones((columns.shape[0], max(length, self.fixed)), dtype=torch.int64, device=columns.device)
        there[:, : self.fixed] = 0
        return there.scatter_(1, columns.clamp(max=there.shape[1] - 1), 1)[:, :length]


def check_whole(layer: Any, query_len: int, masked: bool = False) -> None:
    """Raises CacheError where a cache's layer cannot serve a call of the whole model, in which one mask is made for all layers.

    Args:
        masked: whether a mask is made for a single token, too.
    """
    if isinstance(layer, NarrowedSlidingLayer) and layer.get_seq_length() and layer.gaps(query_len) is not None:
        raise CacheError(
            "a layer with a sliding window holds some tokens of the prompt only, which one mask for all layers does not say",
            where="DynamicCache",
            hint="call the model that sparsify.compile compiled, without output_attentions and the like",
        )
    if (query_len > 1 or masked) and isinstance(layer, NarrowedLayer) and layer.narrowed and DynamicLayer.get_seq_length(layer):
        what = f"{query_len} tokens" if query_len > 1 else "1 with a mask"
        raise CacheError(
            f"layers of this cache hold different tokens of the prompt, and a call of {what} makes one mask for all of them",
            where="DynamicCache",
            hint="call the model that sparsify.compile compiled, without output_attentions and the like, or use a SparseCache",
        )


def left_out(layer: Any) -> int:
    """Columns that a cache's layer was not given, of those that the text has."""
    return layer.left_out if isinstance(layer, SparseLayer | NarrowedLayer) else 0


def places_trouble(layer: SparseLayer) -> str:
    """Why a layer cannot hold fewer tokens than the text has, in a clause; empty where its places need be no positions."""
    if layer.inverse_frequencies is not None:
        return "the cache turns sinks by places inside it, which are no positions any more"
    if layer.policy.turns_back:
        return f"policy {layer.policy.name} turns queries back by places in the cache, which are no positions any more"
    return ""


def narrow(cache: Any, first: int, tokens: int, columns: Tensor, run: int) -> None:
    """Says of an empty cache that its layers from `first` on will be given some of a prompt's `tokens`.

    Args:
        columns: int64 [batch, kept], rising, which ones.
        run: how many of the last ones have no gap between them.
    """
    kept = columns.shape[1]
    asked = (0, next((number for number, layer in enumerate(cache.layers) if not getattr(layer, "is_sliding", False)), 0))
    for number, layer in enumerate(cache.layers):
        given = kept if number >= first else tokens
        if type(layer) is DynamicLayer:
            layer.__class__ = NarrowedLayer
        if type(layer) is DynamicSlidingWindowLayer and number >= first:
            layer.__class__ = NarrowedSlidingLayer
        if isinstance(layer, NarrowedLayer):  # a model asks one layer for the length of its text, and one for that of whole masks
            layer.left_out, layer.fixed, layer.is_first = tokens - given, given - run, number in asked
            layer.columns, layer.narrowed = (columns,) if given < tokens else (), kept < tokens
        elif isinstance(layer, NarrowedSlidingLayer):
            layer.fixed, layer.columns = (tokens - run, (columns,)) if number >= first else (0, ())
        elif isinstance(layer, SparseLayer) and number >= first:
            layer.left_out, layer.fixed = tokens - given, given - run


def forget(cache: Any) -> None:
    """Takes back `narrow`, of an empty cache."""
    for layer in cache.layers:
        if isinstance(layer, SparseLayer | NarrowedLayer):
            layer.left_out = layer.fixed = 0
        if isinstance(layer, NarrowedLayer):
            layer.narrowed = False
        if isinstance(layer, NarrowedLayer | NarrowedSlidingLayer):
            layer.fixed, layer.columns = 0, ()


def as_held(layer: Any) -> Any:
    """A cache's layer as it counts what it holds."""
    kind = DynamicLayer if isinstance(layer, NarrowedLayer) else DynamicSlidingWindowLayer
    if not isinstance(layer, NarrowedLayer | NarrowedSlidingLayer):
        return layer
    plain = object.__new__(kind)
    vars(plain).update(vars(layer))
    return plain


def own_masks(given: dict[str, Any], arguments: Sequence[str], layer: Any, hidden: Tensor) -> dict[str, Any]:
    """Arguments of a layer in a later call, the masks as its cache's layer needs them, which was given some tokens of the prompt only.

    Args:
        given: arguments by name. arguments: names of those that it takes.
        layer: of the cache.
        hidden: [batch, query_len, width].
    """
    query_len = hidden.shape[1]
    if isinstance(layer, NarrowedSlidingLayer):
        if (gaps := layer.gaps(query_len)) is None:
            return given
        name = "attention_mask"
        if given.get(name) is None and name in arguments:
            return {**given, name: _window_mask(layer, hidden, gaps)}
        return {name: _without(value, layer, *gaps) if _is_mask(value, gaps[0]) else value for name, value in given.items()}
    if not left_out(layer):
        return given
    return {name: _own_mask(value, layer, query_len) if isinstance(value, PostponedMask) else value for name, value in given.items()}


def _own_mask(mask: PostponedMask, layer: Any, query_len: int) -> PostponedMask:
    """The mask of a later call for a layer that holds fewer tokens side by side."""
    gone = left_out(layer)
    call = dict(mask.recipe.call)
    key_len = call["kv_length"] - gone
    call["kv_length"], call["q_offset"] = key_len, call.get("q_offset", 0) - gone
    padding = call.get("attention_mask")
    if padding is not None:
        if isinstance(layer, NarrowedLayer):
            call["attention_mask"] = _padding_held(padding, layer.columns[0], key_len, gone)
        else:  # which knows by itself what it holds
            call["attention_mask"] = torch.cat((padding.new_ones(padding.shape[0], key_len - query_len), padding[:, -query_len:]), 1)
    recipe = Recipe(mask.recipe.function, call)
    if isinstance(layer, NarrowedLayer) and kinds(call.get("mask_function")) != {"causal"}:
        recipe = of_columns(recipe, gone, layer.columns[0])
    return PostponedMask(recipe, (*mask.shape[:3], key_len), mask.dtype, mask.device)


def _padding_held(padding: Tensor, columns: Tensor, key_len: int, gone: int) -> Tensor:
    """A text's padding mask at the places that a layer holds, [batch, key_len]. columns: of the first; others stand `gone` behind."""
    held = torch.arange(gone, key_len + gone, device=columns.device).repeat(columns.shape[0], 1)
    known = min(columns.shape[1], key_len)
    held[:, :known] = columns[:, :known]
    missing = max(0, key_len + gone - padding.shape[1])  # as transformers fills up a mask that is too short
    return F.pad(padding, (0, missing)).gather(1, held)


def _is_mask(value: Any, key_len: int) -> bool:
    return isinstance(value, PostponedMask) or (isinstance(value, Tensor) and value.dim() == 4 and value.shape[-1] == key_len)


def _without(mask: Tensor, layer: NarrowedSlidingLayer, key_len: int, start: int) -> Tensor:
    """A mask of a later call that hides what the layer was not given, too."""
    if not isinstance(mask, PostponedMask):
        there = layer.holds(start + key_len)[:, None, None, start:].bool()
        return mask & there if mask.dtype == torch.bool else mask.masked_fill(~there, torch.finfo(mask.dtype).min)
    call, there = dict(mask.recipe.call), layer.holds(start + key_len)
    padding = call.get("attention_mask")
    call["attention_mask"] = there.bool() if padding is None else padding.bool() & there.bool()
    call["allow_is_causal_skip"] = False
    return PostponedMask(Recipe(mask.recipe.function, call, mask.recipe.documents), tuple(mask.shape), mask.dtype, mask.device)


def _window_mask(layer: NarrowedSlidingLayer, hidden: Tensor, gaps: tuple[int, int]) -> PostponedMask:
    """The mask of a call that needs none where nothing is left out: `scaled_dot_product_attention`'s, whose layers are given none."""
    (batch, query_len), (key_len, start) = hidden.shape[:2], gaps
    call: dict[str, Any] = {"batch_size": batch, "q_length": query_len, "kv_length": key_len, "q_offset": layer.get_seq_length()}
    call |= {"kv_offset": start, "mask_function": sliding_window_causal_mask_function(layer.sliding_window), "device": hidden.device}
    call |= {"attention_mask": layer.holds(start + key_len).bool(), "allow_is_causal_skip": False}
    return PostponedMask(Recipe(cast(Any, sdpa_mask), call), (batch, 1, query_len, key_len), torch.bool, hidden.device)
