"""Inverse frequencies of a model's rotary embedding, by which caches rotate sinks and policies turn queries; refused where unverified."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from sparsify.errors import UnsupportedError

# RoPE scalings whose angles do not depend on the text's length; dynamic and longrope change every key's angle as a text grows.
_STATIC = ("default", "linear", "llama3", "yarn")

# Families that rotate the first dimensions of each head, in half-split layout, and nothing else.
_FAMILIES = (
    "llama",
    "mistral",
    "mixtral",
    "qwen2",
    "qwen3",
    "qwen3_moe",
    "gemma",
    "gemma2",
    "gemma3_text",
    "phi",
    "phi3",
    "gpt_neox",
    "olmo2",
    "starcoder2",
    "granite",
)


def inverse_frequencies(config: Any, layer_type: str | None, purpose: str, hint: str) -> Tensor:
    """Angle per position of each rotated pair, fp32 [rotated dimensions / 2]; read from the family's rotary module and checked against it.

    Args:
        config: a transformers text configuration.
        layer_type: as in `config.layer_types`, for families with one rotary embedding per type; None for the others.
        purpose: what cannot be done without them, for messages. hint: what works all the same.

    Raises:
        UnsupportedError: the family, its layout or its scaling is not known to rotate keys by a fixed angle per position.
    """
    kind = getattr(config, "model_type", "")
    if kind not in _FAMILIES:
        raise UnsupportedError(f"{purpose}: the rotary embedding of {kind!r} is not known", hint=hint)
    parameters = getattr(config, "rope_parameters", None) or {}
    if layer_type in parameters:
        parameters = parameters[layer_type]
    scaling = parameters.get("rope_type", "default")
    if scaling not in _STATIC:
        raise UnsupportedError(f"{purpose} under {scaling!r} RoPE: its angles change with the length", hint=hint)
    module = importlib.import_module(f"transformers.models.{kind.removesuffix('_text')}.modeling_{kind.removesuffix('_text')}")
    rotary = next((v for n, v in vars(module).items() if n.endswith("RotaryEmbedding") and v.__module__ == module.__name__), None)
    if rotary is None:
        raise UnsupportedError(f"{purpose}: {kind!r} has no rotary module of its own", hint=hint)
    embedding = rotary(config=config)
    found = getattr(
        embedding, "inv_freq" if layer_type is None or not hasattr(embedding, f"{layer_type}_inv_freq") else f"{layer_type}_inv_freq"
    )
    frequencies = found.detach().float().clone()
    _check(embedding, frequencies, layer_type, f"{purpose}: the rotary embedding of {kind!r}", hint)
    return frequencies


@torch.no_grad()
def _check(embedding: Any, frequencies: Tensor, layer_type: str | None, what: str, hint: str) -> None:
    """Checks that the module computes cos and sin of position · frequency, repeated for both halves, up to one common factor (scaling).

    Raises:
        UnsupportedError: it computes something else.
    """
    at = torch.tensor([[0, 1, 7, 500]])
    per_type = hasattr(embedding, f"{layer_type}_inv_freq") if layer_type else False
    cos, sin = embedding(torch.zeros(1, 1), at, layer_type) if per_type else embedding(torch.zeros(1, 1), at)
    angles = at[0, :, None].float() * frequencies
    factor = cos[0, 0, 0]
    want = torch.cat((angles, angles), -1)
    if cos.shape[-1] != want.shape[-1] or not (
        torch.allclose(cos[0], factor * want.cos(), atol=1e-5) and torch.allclose(sin[0], factor * want.sin(), atol=1e-5)
    ):
        raise UnsupportedError(f"{what} is not half-split", hint=hint)
