"""The model of word pieces as it is trained: a Llama whose layers' matrices are stacked."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from transformers import LlamaConfig

from benchmarks.answers.code_model.setup import Setup

EPS = 1e-5


def _norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return F.rms_norm(x, x.shape[-1:], weight, EPS)


def block_in(
    x: torch.Tensor, norm: torch.Tensor, into: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, heads: int, kv_heads: int, head_dim: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x [tokens, hidden] float32 -> rotated queries, rotated keys, values [tokens, heads, head_dim]. cos, sin: [tokens, head_dim]."""
    projected = F.linear(_norm(x, norm).to(into.dtype), into).view(x.shape[0], -1, head_dim)
    q, k, v = projected.split([heads, kv_heads, kv_heads], 1)
    cos, sin = cos[:, None], sin[:, None]

    def turn(part: torch.Tensor) -> torch.Tensor:
        low, high = part.float().chunk(2, -1)
        return (part.float() * cos + torch.cat((-high, low), -1) * sin).to(part.dtype)

    return turn(q), turn(k), v.contiguous()


def block_out(
    x: torch.Tensor, mixed: torch.Tensor, out: torch.Tensor, norm: torch.Tensor, gates: torch.Tensor, down: torch.Tensor
) -> torch.Tensor:
    """What follows attention in a layer; x [tokens, hidden] float32, mixed [tokens, heads * head_dim]."""
    x = x + F.linear(mixed, out)
    gate, up = F.linear(_norm(x, norm).to(gates.dtype), gates).chunk(2, -1)
    return x + F.linear(F.silu(gate) * up, down)


def head(x: torch.Tensor, norm: torch.Tensor, embedding: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    logits = F.linear(_norm(x, norm).to(embedding.dtype), embedding).float()
    return F.cross_entropy(logits, targets, reduction="none"), logits.detach().argmax(-1) == targets


PARTS = (block_in, block_out, head)


def rotary(setup: Setup, length: int, tokens: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin [tokens, head_dim] float32 of sequences of `length` one after the other."""
    exponents = torch.arange(0, setup.head_dim, 2, device=device).float() / setup.head_dim
    angles = (torch.arange(tokens, device=device) % length).float()[:, None] * setup.theta**-exponents
    angles = torch.cat((angles, angles), -1)
    return angles.cos(), angles.sin()


class Decoder(torch.nn.Module):
    """A Llama whose layers' matrices are stacked: one tensor a kind, which optimisers and all-reduce treat at once. Float32."""

    def __init__(self, setup: Setup) -> None:
        super().__init__()
        self.setup = setup
        d, layers = setup.hidden, setup.layers
        shapes = {
            "q_proj": (setup.heads * setup.head_dim, d),
            "k_proj": (setup.kv_heads * setup.head_dim, d),
            "v_proj": (setup.kv_heads * setup.head_dim, d),
            "o_proj": (d, setup.heads * setup.head_dim),
            "gate_proj": (setup.inner, d),
            "up_proj": (setup.inner, d),
            "down_proj": (d, setup.inner),
        }
        generator = torch.Generator().manual_seed(setup.seed)
        deep = (2 * layers) ** -0.5
        self.matrices = torch.nn.ParameterDict({
            name: torch.nn.Parameter(torch.randn(layers, *shape, generator=generator) * (0.02 * deep if shape[0] == d else 0.02))
            for name, shape in shapes.items()
        })  # fmt: skip
        self.embedding = torch.nn.Parameter(torch.randn(setup.vocabulary, d, generator=generator) * 0.02)
        self.norms = torch.nn.Parameter(torch.ones(2 * layers + 1, d))
        self.parts: tuple[Callable[..., Any], ...] = PARTS

    def compile_parts(self) -> None:
        self.parts = tuple(torch.compile(part, dynamic=False) for part in PARTS)

    def forward(self, ids: torch.Tensor, targets: torch.Tensor, tables: tuple[torch.Tensor, torch.Tensor], dtype: torch.dtype) -> Any:
        """ids, targets [batch, n] int64 -> loss [batch * n] float32 and whether the argmax is right [batch * n] bool."""
        setup = self.setup
        batch, length = ids.shape
        block_in, block_out, head = self.parts
        cast = {name: weight.to(dtype) for name, weight in self.matrices.items()}
        into = torch.cat([cast[name] for name in ("q_proj", "k_proj", "v_proj")], 1).unbind(0)
        gates = torch.cat([cast["gate_proj"], cast["up_proj"]], 1).unbind(0)
        outs, downs, norms = cast["o_proj"].unbind(0), cast["down_proj"].unbind(0), self.norms.unbind(0)
        embedding = self.embedding.to(dtype)
        x = F.embedding(ids.flatten(), embedding).float()
        for layer in range(setup.layers):
            q, k, v = block_in(x, norms[2 * layer], into[layer], *tables, setup.heads, setup.kv_heads, setup.head_dim)
            q, k, v = (part.view(batch, length, -1, setup.head_dim).transpose(1, 2) for part in (q, k, v))
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            mixed = mixed.transpose(1, 2).reshape(batch * length, -1)
            x = block_out(x, mixed, outs[layer], norms[2 * layer + 1], gates[layer], downs[layer])
        return head(x, norms[-1], embedding, targets.flatten())

    def state(self) -> dict[str, torch.Tensor]:
        """The weights under the names of transformers' LlamaForCausalLM, without the tied lm_head."""
        found = {"model.embed_tokens.weight": self.embedding.detach(), "model.norm.weight": self.norms[-1].detach()}
        for layer in range(self.setup.layers):
            for name, weight in self.matrices.items():
                block = "mlp" if name in ("gate_proj", "up_proj", "down_proj") else "self_attn"
                found[f"model.layers.{layer}.{block}.{name}.weight"] = weight[layer].detach()
            found[f"model.layers.{layer}.input_layernorm.weight"] = self.norms[2 * layer].detach()
            found[f"model.layers.{layer}.post_attention_layernorm.weight"] = self.norms[2 * layer + 1].detach()
        return found

    def config(self) -> LlamaConfig:
        setup = self.setup
        return LlamaConfig(
            vocab_size=setup.vocabulary, hidden_size=setup.hidden, intermediate_size=setup.inner, num_hidden_layers=setup.layers,
            num_attention_heads=setup.heads, num_key_value_heads=setup.kv_heads, head_dim=setup.head_dim,
            max_position_embeddings=setup.positions, rms_norm_eps=EPS, rope_parameters={"rope_type": "default", "rope_theta": setup.theta},
            tie_word_embeddings=True, bos_token_id=None, eos_token_id=0, pad_token_id=0,
            architectures=["LlamaForCausalLM"], dtype="bfloat16",
        )  # fmt: skip
