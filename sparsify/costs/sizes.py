"""The numbers of a site that its cost depends on, with or without a graph around it: integers, or sympy expressions where symbolic."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import sympy
import torch

Size = int | sympy.Expr


@dataclass(frozen=True)
class AttentionSizes:
    """Sizes of an attention.

    batch: sequences.
    query_heads, kv_heads: heads; query_heads is a multiple of kv_heads.
    query_len: query rows, tokens.
    key_len: keys that a row could see, tokens.
    qk_head_dim, v_head_dim: elements of a query or key vector, and of a value vector.
    dtype: of queries, keys, values and output.
    causal: the last row sees every key, the row before it one less.
    window: keys that a row sees, tokens; None: all.
    """

    NAMES: ClassVar[tuple[str, ...]] = ("batch", "query_heads", "kv_heads", "query_len", "key_len", "qk_head_dim", "v_head_dim")

    batch: Size = 1
    query_heads: Size = 32
    kv_heads: Size = 8
    query_len: Size = 1
    key_len: Size = 1
    qk_head_dim: Size = 128
    v_head_dim: Size = 128
    dtype: torch.dtype = torch.bfloat16
    causal: bool = True
    window: int | None = None

    @property
    def numeric(self) -> bool:
        """Whether every size is a number."""
        return all(isinstance(getattr(self, name), int) for name in self.NAMES)

    @property
    def operand_bytes(self) -> sympy.Expr:
        """Bytes of queries, keys, values and output, each moved once."""
        dims = self.qk_head_dim + self.v_head_dim
        elements = self.batch * (self.query_heads * self.query_len * dims + self.kv_heads * self.key_len * dims)
        return sympy.sympify(elements * self.dtype.itemsize)


@dataclass(frozen=True)
class FeedForwardSizes:
    """Sizes of a feed-forward block.

    rows: tokens of all sequences.
    hidden: elements of the residual stream.
    intermediate: elements between the projections.
    matrices: weights of [intermediate, hidden]: 3 with a gate, 2 without.
    dtype: of weights and activations.
    """

    NAMES: ClassVar[tuple[str, ...]] = ("rows", "hidden", "intermediate")

    rows: Size = 0
    hidden: Size = 0
    intermediate: Size = 0
    matrices: int = 2
    dtype: torch.dtype = torch.bfloat16

    @property
    def weight_bytes(self) -> Size:
        """Bytes of the block's weights, which a decode step streams from memory."""
        return self.matrices * self.hidden * self.intermediate * self.dtype.itemsize

    @property
    def operand_bytes(self) -> Size:
        """Bytes that the block reads whatever its rows are: its weights."""
        return self.weight_bytes


def as_text(sizes: AttentionSizes | FeedForwardSizes) -> dict[str, str]:
    """The sizes by name, as plans record them."""
    return {name: str(getattr(sizes, name)) for name in sizes.NAMES}
