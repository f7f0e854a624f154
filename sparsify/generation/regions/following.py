"""What can follow a prompt's tokens where some are left out: which caches and masks, and why others cannot."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from sparsify.generation.caches.layer import SparseLayer
from sparsify.generation.regions import left_out
from sparsify.generation.regions.left_out import NarrowedLayer, NarrowedSlidingLayer
from sparsify.generation.regions.masks import PostponedMask, kinds


def cache_trouble(cache: Any, layer: int) -> str:
    """Why a cache's layers from `layer` on cannot hold fewer tokens than its text has; empty where they can."""
    for number, one in enumerate(cache.layers):
        if number < layer:
            continue
        if isinstance(one, SparseLayer):
            if one.is_sliding:
                return f"the cache's layer {number} has a sliding window, which counts places that are left out"
            if reason := left_out.places_trouble(one):
                return reason
        elif type(one) not in (DynamicLayer, NarrowedLayer, DynamicSlidingWindowLayer, NarrowedSlidingLayer):
            return f"a {type(one).__name__} makes its masks from columns, which later layers do not have"
    return ""


def mask_trouble(mask: Any, tokens: int, known: set[str]) -> str:
    """Why a prompt's mask cannot follow its tokens; empty where it can. known: what it may be made of, of `kinds`."""
    if mask is None or (type(mask) is Tensor and mask.dim() == 2 and mask.shape[1] == tokens):
        return ""
    if not isinstance(mask, PostponedMask):
        return "the mask is a tensor of its own, whose meaning is not known"
    call = mask.recipe.call
    made_of = kinds(call.get("mask_function"))
    if made_of is None or not made_of <= known or mask.recipe.documents is not None or (call.get("local_size") and "window" not in known):
        return "the mask says more than causality and padding"
    lengths = (call["q_length"], call["kv_length"], call.get("q_offset", 0), call.get("kv_offset", 0))
    if lengths != (tokens, tokens, 0, 0):
        return "the mask is one of another length"
    padding = call.get("attention_mask")
    return "" if padding is None or padding.shape[-1] == tokens else "the padding mask is one of another length"


def side_by_side(groups: Tensor) -> Tensor:
    """Whether the tokens of each group stand side by side in each row, bool []. groups: int64 [batch, tokens], negative for none."""
    starts = (groups[:, 1:] != groups[:, :-1]) & (groups[:, 1:] >= 0)
    runs = starts.sum() + (groups[:, 0] >= 0).sum()
    rows = torch.arange(groups.shape[0], device=groups.device)[:, None] * (groups.amax() + 1)
    return runs == torch.unique(torch.where(groups >= 0, groups + rows, -1)).numel() - bool((groups < 0).any())
