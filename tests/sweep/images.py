"""Images for models that see: pixels in the forms that transformers' models take, and as many image tokens as features come out."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tests.sweep.inputs import Inputs

_TOKENS = ("image_token_id", "image_token_index")
_KINDS = ("mm_token_type_ids", "token_type_ids")  # 1 where a token stands for a part of an image
_OTHER = 101  # stands in a text for what would be an image token
_BEFORE = 3  # tokens of text ahead of the image
_TILES = 3  # of an image that is cut
_MERGED = 2  # image tokens a side, where patches are merged


@dataclass(frozen=True)
class ImageInputs(Inputs):
    """pixels: makes the arguments for so many rows, one image each. token: what stands for a part of an image, count: of them in a row."""

    pixels: Callable[[int], dict[str, Any]] = lambda rows: {}
    token: int = 0
    count: int = 0
    kinds: tuple[str, ...] = ()

    def beside(self, model: nn.Module, tokens: Tensor, first: int = 0) -> dict[str, Any]:
        tokens = tokens.masked_fill(tokens == self.token, _OTHER)
        for row in range(len(tokens)):
            begin = _BEFORE + (first if row == 0 else 0)
            tokens[row, begin : begin + self.count] = self.token
        return {"input_ids": tokens, **dict.fromkeys(self.kinds, (tokens == self.token).long()), **self.pixels(len(tokens))}

    def part(self, given: dict[str, Any], part: slice) -> dict[str, Any]:
        columns = {name: value[:, part] for name, value in given.items() if name in ("input_ids", *self.kinds)}
        return {**given, **columns} if part.start == 0 else columns


def image_inputs(model: Any) -> Iterator[ImageInputs]:
    """Ways to show the model an image, those that its `get_image_features` takes; none for a model without one."""
    token = next((t for name in _TOKENS if isinstance(t := getattr(model.config, name, None), int)), None)
    if token is None or not hasattr(model, "get_image_features"):
        return
    names = set(inspect.signature(model.forward).parameters)
    kinds = tuple(name for name in _KINDS if name in names)
    for pixels in _forms(model, names):
        try:
            with torch.no_grad():
                count = _rows(model.get_image_features(**pixels(1)))
        except Exception:
            continue
        yield ImageInputs(pixels=pixels, token=token, count=count, kinds=kinds)


def _forms(model: nn.Module, names: set[str]) -> Iterator[Callable[[int], dict[str, Any]]]:
    draw = lambda *shape: torch.randn(*shape, generator=torch.Generator().manual_seed(5))
    vision: Any = getattr(model.config, "vision_config", None)
    if "image_grid_thw" in names and (width := _patch_numbers(model)):
        side = _MERGED * getattr(vision, "spatial_merge_size", 1)
        grid = torch.tensor([[1, side, side]])
        yield lambda rows: {"pixel_values": draw(rows * side * side, width), "image_grid_thw": grid.expand(rows, 3)}
    size = getattr(vision, "image_size", 32)
    size = size if isinstance(size, int) else size[0]
    sizes = {"image_sizes": torch.tensor([[size, size]])} if "image_sizes" in names else {}
    for tiles, given in itertools.product(((), (1,), (_TILES,)), (sizes, {})):  # an image, or one that is cut into tiles
        shape = (*tiles, 3, size, size)
        more = lambda rows, given=given: {name: value.expand(rows, 2) for name, value in given.items()}
        yield lambda rows, shape=shape, more=more: {"pixel_values": draw(rows, *shape), **more(rows)}


def _patch_numbers(model: nn.Module) -> int | None:
    """How many numbers a patch has, where patches come flattened."""
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if "patch_embed" in name and isinstance(weight, Tensor) and weight.dim() >= 2:
            return weight[0].numel()
    return None


def _rows(features: Any) -> int:
    """Of image features those of all images."""
    found = getattr(features, "pooler_output", None)
    found = found if found is not None else getattr(features, "last_hidden_state", features)
    if isinstance(found, Tensor):
        return found.numel() // found.shape[-1]
    return sum(_rows(one) for one in found)
