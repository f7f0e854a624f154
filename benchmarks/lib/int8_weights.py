"""Weights of a Llama model as int8 with a scale a row, in safetensors files of limited size: half of bf16, for models that travel.

A folder holds config.json and model-00001-of-0000N.safetensors; a matrix `name` [rows, columns] is stored as int8 and `name.scale`
[rows] float32, a vector as bf16. Transformers does not read it; `load` does, and `load(...).save_pretrained(...)` writes what it reads.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

SCALE = ".scale"


def quantise(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """weight [rows, columns] -> int8 [rows, columns] and scale [rows] float32: weight ≈ int8 x scale, symmetric, to nearest."""
    weight = weight.detach().float().cpu()
    scale = weight.abs().amax(1).clamp_min(1e-12) / 127
    return (weight / scale[:, None]).round().clamp(-127, 127).to(torch.int8), scale


def save(state: dict[str, torch.Tensor], config: LlamaConfig, folder: Path, shard_bytes: int = 15_500_000) -> list[Path]:
    """Writes the folder and returns its files. `state` must not hold the tied lm_head.weight. Tensors larger than a shard get one each."""
    folder.mkdir(parents=True, exist_ok=True)
    shards: list[dict[str, torch.Tensor]] = [{}]
    size = 0
    for name, tensor in state.items():
        if tensor.ndim == 2:
            whole, scale = quantise(tensor)
            parts = {name: whole, name + SCALE: scale}
        else:
            parts = {name: tensor.detach().to("cpu", torch.bfloat16)}
        part_bytes = sum(part.numel() * part.element_size() for part in parts.values())
        if shards[-1] and size + part_bytes > shard_bytes:
            shards.append({})
            size = 0
        shards[-1] |= {key: part.contiguous() for key, part in parts.items()}
        size += part_bytes
    config.save_pretrained(folder)
    files = [folder / "config.json"]
    for number, shard in enumerate(shards, 1):
        files.append(folder / f"model-{number:05}-of-{len(shards):05}.safetensors")
        save_file(shard, files[-1], {"format": "int8 rows"})
    for file in files:
        file.chmod(0o644)
    return files


def holds(folder: Path) -> bool:
    """Whether a folder's weights are such: shards without an index."""
    return any(folder.glob("model-*-of-*.safetensors")) and not (folder / "model.safetensors.index.json").exists()


def read(folder: Path) -> dict[str, torch.Tensor]:
    """The weights, float32. Raises FileNotFoundError where `folder` lacks a shard."""
    files = sorted(folder.glob("model-*-of-*.safetensors"))
    if not files or len(files) != int(files[0].stem.rsplit("-", 1)[1]):
        raise FileNotFoundError(f"{folder} holds {len(files)} shards of weights, not all that there are")
    stored: dict[str, torch.Tensor] = {}
    for file in files:
        stored |= load_file(file)
    return {
        name: tensor.float() * stored[name + SCALE][:, None] if name + SCALE in stored else tensor.float()
        for name, tensor in stored.items()
        if not name.endswith(SCALE)
    }


def load(folder: Path, dtype: torch.dtype = torch.bfloat16) -> LlamaForCausalLM:
    """The model in `dtype`, on the CPU, in eval mode. Raises RuntimeError where weights and configuration do not fit each other."""
    config = LlamaConfig.from_pretrained(folder)
    model = LlamaForCausalLM._from_config(config, dtype=dtype)
    missing, unexpected = model.load_state_dict(read(folder), strict=False)
    if unexpected or set(missing) - {"lm_head.weight"} or (missing and not config.tie_word_embeddings):
        raise RuntimeError(f"{folder}: weights that are missing: {missing}, that fit nowhere: {unexpected}")
    model.tie_weights()
    return model.eval()
