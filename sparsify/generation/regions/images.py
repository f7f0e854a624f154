"""Which tokens of a prompt stand for images, read from the model's own image positions.

Models with images put what their vision tower gives into the places of one identifier, which their configuration names: the same comparison
says here which columns those are.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

# by which configurations name identifiers that images and videos take the place of
_IDENTIFIERS = ("image_token_id", "image_token_index", "video_token_id", "video_token_index")


def find(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], shape: tuple[int, ...]) -> tuple[Tensor | None, str]:
    """Which columns of a call stand for images.

    Args:
        args, kwargs: of the model's forward.
        shape: (batch, tokens) of the residual stream.

    Returns:
        bool [batch, tokens], or None and why they are not known.
    """
    config: Any = model.config
    identifiers = sorted({value for name in _IDENTIFIERS if type(value := getattr(config, name, None)) is int})
    if not identifiers:
        return None, "the model's configuration names no image tokens"
    ids = kwargs.get("input_ids")
    if ids is None and args:
        ids = inspect.signature(model.forward).bind_partial(*args, **kwargs).arguments.get("input_ids")
    if not isinstance(ids, Tensor):
        return None, "embeddings are given in place of tokens, of which it is not known what stands for an image"
    if tuple(ids.shape) != shape:
        return None, "the model makes other rows of its tokens, of which it is not known what stands for an image"
    # one by one: a tensor of identifiers would be copied to the device, and the host would wait
    return functools.reduce(torch.logical_or, [ids == identifier for identifier in identifiers]), ""


def added_later(config: Any) -> str:
    """Why image tokens cannot be left out of a model's later layers, to which features of images are added; empty where none are."""
    parts = (config, getattr(config, "vision_config", None), getattr(config, "text_config", None))
    named = [name for part in parts if part is not None for name, value in vars(part).items() if name.startswith("deepstack") and value]
    return f"features of images are added again behind later layers ({named[0]})" if named else ""
