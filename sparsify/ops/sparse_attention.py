"""`sparsify::sparse_attention`: selection and attention in one call, for block lists that are too large to exist at once.

It serves some heads after the others (`sparsify.ops.scratch`), with the results that `select_blocks` and `attention` have together.
"""

from __future__ import annotations

import dataclasses
from dataclasses import KW_ONLY, dataclass
from typing import Annotated, ClassVar

from torch import Tensor

from sparsify.ops.attention import AttentionCall, empty_outputs
from sparsify.ops.call import Operand
from sparsify.ops.library import define
from sparsify.ops.scratch import Part
from sparsify.ops.selection import SelectCall

_BY_HEAD = ("head_thresholds", "head_columns", "head_diagonals")
_BY_KV_HEAD = ("key_mean", "prepared_keys", "prepared_scales")


@dataclass(frozen=True, eq=False)
class SparseAttentionCall(SelectCall):
    """One call of `sparsify::sparse_attention`: the fields of `SelectCall`, and some of `sparsify.ops.attention.AttentionCall`.

    value: [batch, kv_heads, key_len, v_head_dim], in query's dtype.
    sinks, seq_major, empty_rows, lowest, sequence: as in `AttentionCall`.
    """

    NAME: ClassVar[str] = "sparse_attention"

    value: Annotated[Tensor, Operand("batch kv_heads key_len v_head_dim")]
    _: KW_ONLY
    sinks: int = 0
    seq_major: bool = False
    empty_rows: str = "zero"
    lowest: float = 0.0
    sequence: str = ""

    def selection(self) -> SelectCall:
        """The call that makes its block lists."""
        return SelectCall(**self.common(SelectCall))

    def attention(self, counts: Tensor, indices: Tensor) -> AttentionCall:
        """Attention along block lists."""
        return AttentionCall(**self.common(AttentionCall), block_counts=counts, block_indices=indices)

    def empty_outputs(self) -> tuple[Tensor, Tensor]:
        return empty_outputs(self.query, self.value, self.seq_major)

    def part(self, part: Part) -> SparseAttentionCall:
        """The call as some of the heads and batch rows see it."""
        return dataclasses.replace(
            self,
            query=part.of_heads(self.query),
            key=part.of_kv_heads(self.key),
            value=part.of_kv_heads(self.value),
            key_flags=part.of_rows(self.key_flags),
            segments=part.of_rows(self.segments),
            windows=part.numbers(self.windows, self.heads),
            threshold=part.numbers(self.threshold, self.heads),
            columns=part.numbers(self.columns, self.heads),
            diagonals=part.numbers(self.diagonals, self.heads),
            **{name: None if (one := getattr(self, name)) is None else one[slice(*part.heads)] for name in _BY_HEAD},
            **{name: None if (one := getattr(self, name)) is None else part.of_kv_heads(one) for name in _BY_KV_HEAD},
        )


sparse_attention = define(SparseAttentionCall, SparseAttentionCall.empty_outputs)
