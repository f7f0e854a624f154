"""Seconds of a whole decoder's prefill and decode step in closed form, beside what was measured and what `sparsify cost` says.

From the model's shape alone: linear layers, attention, and everything elementwise. Lengths may be numbers or sympy symbols.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import sympy
import torch

from sparsify.costs import work
from sparsify.costs.device import Device
from sparsify.costs.seconds import SMALL_KERNELS, STEP_LAUNCHES, linear_seconds, seconds
from sparsify.costs.sizes import AttentionSizes, Size

# What the host needs in eager mode, in launches' times: an operator of transformers' layers takes about four, for Python around it (8B
# prefills of 1K tokens in benchmarks/results, which wait for the host).
_EAGER_LAYER = 130
# Operators that run one by one over broadcast and transposed operands reach two thirds of the bandwidth of Inductor's fused kernels (8B
# prefills of 4K and 16K tokens in eager mode, there; other lengths agree).
_EAGER_BYTES = 1.5


@dataclass(frozen=True)
class ModelShape:
    """What a decoder's cost depends on. gated: three feed-forward matrices instead of two. dtype: of weights and activations."""

    layers: int
    hidden: int
    intermediate: int
    query_heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    gated: bool = True
    dtype: torch.dtype = torch.bfloat16

    @classmethod
    def from_config(cls, config: Any, dtype: torch.dtype | None = None) -> ModelShape:
        """The shape of a transformers configuration of a dense decoder (Llama, Mistral, Qwen and the like)."""
        heads, hidden = config.num_attention_heads, config.hidden_size
        return cls(
            layers=config.num_hidden_layers,
            hidden=hidden,
            intermediate=config.intermediate_size,
            query_heads=heads,
            kv_heads=getattr(config, "num_key_value_heads", None) or heads,
            head_dim=getattr(config, "head_dim", None) or hidden // heads,
            vocab=config.vocab_size,
            gated=getattr(config, "hidden_act", "silu") in ("silu", "swish", "gelu_pytorch_tanh", "gelu_tanh"),
            dtype=dtype or torch.bfloat16,
        )

    @property
    def query_width(self) -> int:
        return self.query_heads * self.head_dim

    @property
    def kv_width(self) -> int:
        return self.kv_heads * self.head_dim

    @property
    def attention_matrices(self) -> tuple[tuple[int, int], ...]:
        """(inputs, outputs) of the projections of a layer's attention."""
        return (
            (self.hidden, self.query_width),
            (self.hidden, self.kv_width),
            (self.hidden, self.kv_width),
            (self.query_width, self.hidden),
        )

    @property
    def ffn_matrices(self) -> tuple[tuple[int, int], ...]:
        return ((self.hidden, self.intermediate),) * (2 if self.gated else 1) + ((self.intermediate, self.hidden),)

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights, the embedding and the output layer once each."""
        layer = sum(i * o for i, o in self.attention_matrices + self.ffn_matrices) + 2 * self.hidden
        return (self.layers * layer + 2 * self.vocab * self.hidden) * self.dtype.itemsize

    def attention(self, query_len: Size, key_len: Size, batch: Size = 1) -> AttentionSizes:
        """The attention of one layer."""
        return AttentionSizes(batch, self.query_heads, self.kv_heads, query_len, key_len, self.head_dim, self.head_dim, self.dtype)

    def cache_bytes(self, key_len: Size, batch: Size = 1) -> sympy.Expr:
        """Bytes of keys and values of all layers."""
        return sympy.sympify(2 * self.layers * batch * self.kv_width * key_len * self.dtype.itemsize)


def _elements(shape: ModelShape, compiled: bool) -> int:
    """Numbers that a layer's elementwise parts read and write for each token.

    Compiled: each norm reads the stream and the sum's other term and writes both results (4 · hidden); queries and keys are rotated in
    one pass; keys and values are appended to a cache; the activation reads two wide rows and writes one. Eager, each norm takes eight
    operators, half of them in fp32, the rotation five, and each sum and product is a pass of its own.
    """
    if compiled:
        return 8 * shape.hidden + 2 * (shape.query_width + shape.kv_width) + 4 * shape.kv_width + 3 * shape.intermediate
    return 42 * shape.hidden + 10 * (shape.query_width + shape.kv_width) + 4 * shape.kv_width + 5 * shape.intermediate


def prefill_seconds(
    shape: ModelShape,
    device: Device,
    length: Size,
    *,
    batch: Size = 1,
    attention: Any = None,
    compiled: bool = True,
) -> sympy.Expr:
    """Seconds from a prompt of `length` tokens to the logits of its last one, cache filled.

    Args:
        attention: seconds of attention: one expression for every layer, a sequence with one for each, or None for dense attention by SDPA.
            `attention_seconds(shape.attention(n, n), device, kernel=...)` and `estimate_seconds` give such expressions.
        compiled: elementwise operations fused by Inductor, as sparsify runs them; False: one kernel each, as in eager mode.
    """
    tokens = batch * length
    layer = sympy.Add(*(linear_seconds(device, tokens, i, o, shape.dtype) for i, o in shape.attention_matrices + shape.ffn_matrices))
    moved = _elements(shape, compiled) * (1 if compiled else _EAGER_BYTES) * shape.dtype.itemsize
    layer += seconds(work.elementwise(tokens * moved), device)
    head = linear_seconds(device, batch, shape.hidden, shape.vocab, shape.dtype)
    total = sympy.sympify(shape.layers * layer + head + _attention(shape, device, attention, length, length, batch))
    return total if compiled else work.largest(total, shape.layers * _EAGER_LAYER * device.launch)


def decode_seconds(
    shape: ModelShape,
    device: Device,
    key_len: Size,
    *,
    batch: Size = 1,
    attention: Any = None,
    ffn_share: Any = 1,
    skipping: bool = False,
    waited: bool = True,
) -> sympy.Expr:
    """Seconds of one decode step in a CUDA graph, each of `batch` sequences having `key_len` keys.

    Args:
        attention: as in `prefill_seconds`; `costs.seconds.decode_seconds(shape.attention(1, n), device, kept=budget)` is one over a cache.
        waited: the host waits for every token, as `generate` does; False: the device's time alone.
        ffn_share, skipping: share of the feed-forward blocks that is computed; `skipping` says that ffn_skip's kernels run them.
    """
    step = sympy.Add(*(linear_seconds(device, batch, i, o, shape.dtype) for i, o in shape.attention_matrices))
    if skipping or ffn_share != 1:
        size = sum(i * o for i, o in shape.ffn_matrices) * shape.dtype.itemsize
        step += seconds(work.skipped_ffn(batch, size, shape.dtype, ffn_share), device)
    else:
        step += sympy.Add(*(linear_seconds(device, batch, i, o, shape.dtype) for i, o in shape.ffn_matrices))
    small = seconds(work.elementwise(batch * _elements(shape, True) * shape.dtype.itemsize / SMALL_KERNELS), device)
    step += SMALL_KERNELS * small
    head = linear_seconds(device, batch, shape.hidden, shape.vocab, shape.dtype)
    host = STEP_LAUNCHES * device.launch if waited else 0
    return sympy.sympify(shape.layers * step + head + host + _attention(shape, device, attention, 1, key_len, batch))


def _attention(shape: ModelShape, device: Device, given: Any, query_len: Size, key_len: Size, batch: Size) -> sympy.Expr:
    if isinstance(given, Iterable):
        found = list(given)
        return sympy.Add(*(sympy.sympify(one) for one in found))
    if given is None:
        given = seconds(work.attention(shape.attention(query_len, key_len, batch), "sdpa"), device)
    return shape.layers * sympy.sympify(given)
