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
}


def inputs_of(which: str, model_type: str) -> Inputs:
    """What a type of a list is given."""
    if which == "causal":
        return Inputs()
    if which == "speech" and model_type.startswith("seamless_m4t"):  # on another list it reads text
        return _SEAMLESS
    return _SOURCES.get(model_type, Inputs(encoder=which == "masked"))
