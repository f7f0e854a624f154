"""The shapes of models that are timed, and models of them with random weights: speed does not depend on the weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from sparsify.commands.bench.clock import clean, peak_bytes

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

__all__ = ["HEADS", "HEAD_DIM", "KV_HEADS", "SHAPES", "build", "clean", "peak_bytes", "weight_bytes"]

# Llama-3.1-8B's published configuration, but for its scaled rotary embedding, which costs the same; and one that a CPU runs in no time
SHAPES = {
    "8b": {
        "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 1 << 20, "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    },
    "tiny": {
        "vocab_size": 256, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 64, "max_position_embeddings": 1 << 20,
    },
}  # fmt: skip
HEADS, KV_HEADS, HEAD_DIM = (SHAPES["8b"][name] for name in ("num_attention_heads", "num_key_value_heads", "head_dim"))


def build(shape: str, layers: int | None, device: str, **other: int) -> LlamaForCausalLM:
    """layers: fewer than the shape has. other: fields of the configuration that differ from it. bf16 on a GPU, float32 on a CPU."""
    from transformers import LlamaConfig, LlamaForCausalLM

    fields = SHAPES[shape] | ({"num_hidden_layers": layers} if layers else {}) | other
    config = LlamaConfig(**fields, bos_token_id=None, eos_token_id=None)
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    with torch.device(device):
        model = LlamaForCausalLM._from_config(config, dtype=dtype)
    return model.to(device).eval()


def weight_bytes(model: torch.nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters())
