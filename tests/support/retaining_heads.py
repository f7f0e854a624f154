"""Retaining heads of the policy "locret" that were never trained, for tiny models."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import PretrainedConfig


def write(path: Path, config: PretrainedConfig, hidden: int = 12) -> Path:
    """Random heads for each layer of a model."""
    generator = torch.Generator().manual_seed(0)
    width = (config.num_attention_heads + 2 * config.num_key_value_heads) * config.head_dim
    sizes = {"w1": (hidden, width), "w2": (config.num_key_value_heads, hidden)}
    layers = range(config.num_hidden_layers)
    save_file({f"layers.{n}.{name}": torch.randn(size, generator=generator) for n in layers for name, size in sizes.items()}, path)
    return path


@functools.cache
def of_tiny_llama() -> str:
    """A file of them for `tiny_models.build("llama", layers=2)`, as long as the process runs."""
    from tests.support.tiny_models import build

    folder = tempfile.TemporaryDirectory(prefix="sparsify-heads-")
    _folders.append(folder)
    return str(write(Path(folder.name) / "heads.safetensors", build("llama", layers=2).config))


_folders: list[tempfile.TemporaryDirectory[str]] = []
