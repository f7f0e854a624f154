"""Prompts with images, and which of their tokens the rules of `fastv` and `divprune` keep: computed by eager models and plain loops."""

from __future__ import annotations

import inspect
import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    Gemma3ForConditionalGeneration,
    InternVLForConditionalGeneration,
    LlavaForConditionalGeneration,
    PaliGemmaForConditionalGeneration,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLForConditionalGeneration,
    Qwen3VLForConditionalGeneration,
)

from sparsify.planning.method import ImageRows
from tests.support.tiny_models import build_class, spread_weights

FAMILIES = {
    "llava": LlavaForConditionalGeneration,
    "qwen2_5_vl": Qwen2_5_VLForConditionalGeneration,
    "qwen2_vl": Qwen2VLForConditionalGeneration,
    "internvl": InternVLForConditionalGeneration,
    "gemma3": Gemma3ForConditionalGeneration,
    "paligemma": PaliGemmaForConditionalGeneration,
    "qwen3_vl": Qwen3VLForConditionalGeneration,
}
FIRST = 5  # column of a row's first image token, behind its padding
_OTHERS = 100  # identifiers of text lie below the special ones


# the layer that chooses (1) sees everything, as one in six does in the published ones; windows reach from the end of a prompt to its image
_WINDOWS = {"layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 58}
_OVERRIDES: dict[str, dict[str, Any]] = {"gemma3": {"text_config": _WINDOWS}}


def build(family: str, layers: int = 4) -> nn.Module:
    overrides = _OVERRIDES.get(family)
    if overrides is not None:
        text = overrides["text_config"]
        overrides = {"text_config": {**text, "layer_types": text["layer_types"][:layers]}}
    model = build_class(FAMILIES[family], "sdpa", layers=layers, by_layer=False, overrides=overrides)
    spread_weights(model)
    return model


def prompt(model: nn.Module, length: int, padding: tuple[int, ...] = (0,)) -> dict[str, Tensor]:
    """What a model is given: an image in each row, and the rest text. padding: columns in front of each row."""
    draw, batch = torch.Generator().manual_seed(length), len(padding)
    vision = model.config.vision_config
    given: dict[str, Tensor] = {}
    if hasattr(vision, "spatial_merge_size"):
        side, width = 8, 3 * vision.temporal_patch_size * vision.patch_size**2
        count = (side // vision.spatial_merge_size) ** 2
        given["pixel_values"] = torch.randn(batch * side * side, width, generator=draw)
        given["image_grid_thw"] = torch.tensor([[1, side, side]]).expand(batch, 3)
    else:
        size = vision.image_size if isinstance(vision.image_size, int) else vision.image_size[0]
        given["pixel_values"] = torch.randn(batch, 3, size, size, generator=draw)
        with torch.no_grad():
            features = model.get_image_features(pixel_values=given["pixel_values"]).pooler_output
        count = features[0].shape[0]
    ids = torch.randint(3, _OTHERS, (batch, length), generator=draw)
    for row, skipped in enumerate(padding):
        ids[row, skipped + FIRST : skipped + FIRST + count] = model.config.image_token_id
        ids[row, :skipped] = 0
    if any(padding):
        mask = (torch.arange(length) >= torch.tensor(padding)[:, None]).long()
        given |= {"attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}
    return with_tokens(model, given, ids)


def with_tokens(model: nn.Module, given: dict[str, Tensor], ids: Tensor) -> dict[str, Tensor]:
    """The same images, in a text of these tokens."""
    taken = inspect.signature(model.forward).parameters
    kinds = [name for name in ("token_type_ids", "mm_token_type_ids") if name in taken]
    found = (ids == model.config.image_token_id).long()
    if model.config.model_type == "paligemma":  # 0: of the prompt, whose tokens see each other
        found = torch.zeros_like(ids)
        found[:, given.get("input_ids", ids).shape[1] :] = 1
    return {**given, "input_ids": ids, **dict.fromkeys(kinds, found)}


def images(model: nn.Module, given: dict[str, Tensor]) -> list[list[int]]:
    """Columns of each row's image tokens."""
    return [row.nonzero()[:, 0].tolist() for row in given["input_ids"] == model.config.image_token_id]


@torch.no_grad()
def looked_at(model: nn.Module, given: dict[str, Tensor], layer: int, queries: int) -> list[list[int]]:
    """Of each row the image tokens, those first that the last queries attend to most in a layer (FastV)."""
    before = model.config.text_config._attn_implementation
    model.set_attn_implementation("eager")
    weights = model(**given, output_attentions=True, use_cache=False).attentions[layer]
    model.set_attn_implementation(before)
    score = weights[:, :, -queries:].sum((1, 2))
    return [sorted(columns, key=lambda column: -float(score[row, column])) for row, columns in enumerate(images(model, given))]


@torch.no_grad()
def far_apart(model: nn.Module, given: dict[str, Tensor]) -> list[list[int]]:
    """Of each row the image tokens in the order in which they are far from those before (DivPrune)."""
    seen: list[Tensor] = []
    layer = model.get_decoder().layers[0]
    hook = layer.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model(**given, use_cache=False)
    hook.remove()
    found = []
    for row, columns in enumerate(images(model, given)):
        distance = lambda a, b, row=row: 1 - float(torch.cosine_similarity(seen[0][row, a], seen[0][row, b], dim=0))
        nearest = {a: min(distance(a, b) for b in columns if b != a) for a in columns}
        order = [max(columns, key=nearest.__getitem__)]
        while len(order) < len(columns):
            order.append(max((c for c in columns if c not in order), key=lambda c: min(distance(c, b) for b in order)))
        found.append(order)
    return found


def kept(model: nn.Module, given: dict[str, Tensor], order: list[list[int]], keep: int | float) -> list[list[int]]:
    """Columns that go on: all that is text, and so many image tokens that rows are as wide as the one that needs most."""
    mask = given.get("attention_mask", torch.ones_like(given["input_ids"]))
    text = [[c for c in row.nonzero()[:, 0].tolist() if c not in seen] for row, seen in zip(mask, images(model, given), strict=True)]
    count = lambda n: min(n, keep if isinstance(keep, int) else math.ceil(keep * n))
    width = max(len(row) + count(len(seen)) for row, seen in zip(text, order, strict=True))
    return [sorted(row + seen[: width - len(row)]) for row, seen in zip(text, order, strict=True)]


def rows(hidden: Tensor, images: list[int], kept: int, mass: Tensor | None = None, padding: int = 0) -> ImageRows:
    """One row of the residual stream, what a rule chooses from. images: columns. padding: columns in front."""
    is_image = torch.zeros(1, hidden.shape[1], dtype=torch.bool)
    is_image[0, images] = True
    return ImageRows(hidden, mass, torch.arange(hidden.shape[1])[None] >= padding, is_image, kept)
