"""Caches whose layers hold fewer tokens than the text has: what was left out before a layer is one number beside its keys.

A model asks the first layer how long its text is. What stands outside of the layers (masks, positions, `generate()`) therefore counts the
tokens that were left out, and what runs within a layer does not.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import DynamicLayer

from sparsify.errors import CacheError
from sparsify.generation.caches.layer import SparseLayer
from sparsify.generation.regions.masks import PostponedMask, Recipe, postponing


class NarrowedLayer(DynamicLayer):
    """A layer of a DynamicCache some of whose layers were given some tokens of the prompt only.

    left_out: columns of the text that this one was not given.
    fixed: tokens of it before the last run that no layer has a gap in: what comes before cannot be cropped.
    is_first: whether the model asks this layer for the length of its text.
    narrowed: whether any layer of the cache was given some tokens only.
    """

    left_out = 0
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
        if self.fixed and self.is_initialized and self.keys is not None and self.keys.shape[-2] - abs(tokens_to_remove) < self.fixed:
            raise CacheError(
                f"a layer was given some tokens of the prompt, of which {abs(tokens_to_remove)} cannot be taken back",
                where="crop",
                hint="crop no more than what came after the last token that was left out",
            )
        super().crop(tokens_to_remove)

    def reset(self) -> None:
        self.left_out = self.fixed = 0
        self.narrowed = False
        super().reset()


def check_whole(layer: Any, query_len: int) -> None:
    """Raises CacheError where a cache's layer cannot serve a call of the whole model, in which one mask is made for all layers."""
    if query_len > 1 and isinstance(layer, NarrowedLayer) and layer.narrowed and DynamicLayer.get_seq_length(layer):
        raise CacheError(
            f"layers of this cache hold different tokens of the prompt, and a call of {query_len} tokens makes one mask for all of them",
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


def narrow(cache: Any, first: int, tokens: int, kept: int, run: int) -> None:
    """Says of an empty cache that its layers from `first` on will be given `kept` of a prompt's `tokens`, of which the last `run` have no
    gap."""
    for number, layer in enumerate(cache.layers):
        given = kept if number >= first else tokens
        if type(layer) is DynamicLayer:
            layer.__class__ = NarrowedLayer
        if isinstance(layer, NarrowedLayer):
            layer.left_out, layer.fixed, layer.is_first = tokens - given, given - run, number == 0
            layer.narrowed = kept < tokens
        elif isinstance(layer, SparseLayer) and number >= first:
            layer.left_out, layer.fixed = tokens - given, given - run


def forget(cache: Any) -> None:
    """Takes back `narrow`, of an empty cache."""
    for layer in cache.layers:
        if isinstance(layer, SparseLayer | NarrowedLayer):
            layer.left_out = layer.fixed = 0
        if isinstance(layer, NarrowedLayer):
            layer.narrowed = False


def as_held(layer: Any) -> Any:
    """A cache's layer as it counts what it holds."""
    if not isinstance(layer, NarrowedLayer):
        return layer
    plain = object.__new__(DynamicLayer)
    vars(plain).update(vars(layer))
    return plain


def own_mask(mask: PostponedMask, layer: Any, query_len: int) -> PostponedMask:
    """The mask of a later call for a layer of an ordinary cache that holds fewer tokens, none of which is padding."""
    gone = left_out(layer)
    call = dict(mask.recipe.call)
    key_len = call["kv_length"] - gone
    call["kv_length"], call["q_offset"] = key_len, call.get("q_offset", 0) - gone
    padding = call.get("attention_mask")
    if padding is not None:
        call["attention_mask"] = torch.cat((padding.new_ones(padding.shape[0], key_len - query_len), padding[:, -query_len:]), 1)
    return PostponedMask(Recipe(mask.recipe.function, call), (*mask.shape[:3], key_len), mask.dtype, mask.device)
