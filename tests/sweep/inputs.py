"""What models are given beside text: sound and images, by model type."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Inputs:
    """encoder: whether it is called as one, with padding on both sides. sound: makes the arguments of an encoder that hears or sees, for so
    many rows. codebooks: numbers that a decoder reads per step, 0 for one token."""

    encoder: bool = False
    sound: Callable[[int], dict[str, Any]] | None = None
    codebooks: int = 0

    def beside(self, model: nn.Module, tokens: Tensor, first: int = 0) -> dict[str, Any]:
        """Arguments for a prompt of these tokens, of which the first row begins at column `first`."""
        return {"input_ids": tokens}

    def part(self, given: dict[str, Any], part: slice) -> dict[str, Any]:
        """Of the arguments for a prompt those for some of its columns."""
        return {"input_ids": given["input_ids"][:, part]}

    def source(self, model: nn.Module, rows: int) -> dict[str, Any] | None:
        return None if self.sound is None else self.sound(rows)

    def answer(self, tokens: Tensor) -> Tensor:
        """A decoder's tokens in the form that it takes."""
        return tokens[..., None].expand(*tokens.shape, self.codebooks) % 60 if self.codebooks else tokens


@dataclass(frozen=True)
class DraftInputs(Inputs):
    """Of a draft, which reads keys and values that another model has of the text: its next token's states, and as many keys as tokens."""

    def beside(self, model: nn.Module, tokens: Tensor, first: int = 0) -> dict[str, Any]:
        (rows, length), config = tokens.shape, model.config
        text: Any = config.get_text_config()
        generator = torch.Generator().manual_seed(5)
        draw = lambda *shape: torch.randn(rows, *shape, generator=generator)
        kept: dict[str, tuple[int, int, int]] = {}
        for layer in (one for one in model.modules() if hasattr(one, "num_key_value_groups")):
            seen = length if layer.layer_type == "full_attention" else min(length, text.sliding_window)
            kept[layer.layer_type] = (text.num_attention_heads // layer.num_key_value_groups, seen, layer.head_dim)
        return {
            "inputs_embeds": draw(1, 2 * config.backbone_hidden_size),
            "position_ids": torch.full((rows, 1), length - 1),
            "shared_kv_states": {kind: (draw(*shape), draw(*shape)) for kind, shape in kept.items()},
        }

    def part(self, given: dict[str, Any], part: slice) -> dict[str, Any]:
        return given


def _noise(name: str, *shape: int) -> Inputs:
    """Of each row of the batch an array of this shape."""
    return Inputs(sound=lambda rows: {name: torch.randn(rows, *shape, generator=torch.Generator().manual_seed(5))})


_WAVE = _noise("input_values", 32000)  # two seconds
_MEL = _noise("input_features", 400, 80)
_SEAMLESS = _noise("input_features", 120, 160)
_SOURCES: dict[str, Inputs] = {
    "canary": _MEL,
    "cohere_asr": _MEL,
    "moonshine": _WAVE,
    "moonshine_streaming": _WAVE,
    "speech-encoder-decoder": _WAVE,
    "speech_to_text": _MEL,
    "speecht5": _WAVE,
    "vision-encoder-decoder": _noise("pixel_values", 3, 32, 32),
    "whisper": _noise("input_features", 80, 200),
    "dia": Inputs(codebooks=9),
    "gemma4_assistant": DraftInputs(),
    "gemma4_unified_assistant": DraftInputs(),
}


def inputs_of(which: str, model_type: str) -> Inputs:
    """What a type of a list is given."""
    if which == "causal":
        return _SOURCES.get(model_type, Inputs()) if model_type.endswith("_assistant") else Inputs()
    if which == "speech" and model_type.startswith("seamless_m4t"):  # on another list it reads text
        return _SEAMLESS
    return _SOURCES.get(model_type, Inputs(encoder=which == "masked"))
