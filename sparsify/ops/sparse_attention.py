"""`sparsify::sparse_attention`: selection and attention in one call, for block lists that are too large to exist at once.

It serves some heads after the others (`sparsify.ops.scratch`), with the results that `select_blocks` and `attention` have together.
"""

from __future__ import annotations

import dataclasses
from dataclasses import KW_ONLY, dataclass
from typing import Annotated, ClassVar, TypeVar

from torch import Tensor

from sparsify.ops.attention import AttentionCall, empty_outputs
from sparsify.ops.call import Operand
from sparsify.ops.library import define
from sparsify.ops.scratch import Part
from sparsify.ops.selection import SelectCall

_BY_KV_HEAD = ("key_mean", "prepared_keys", "prepared_scales")
_Numbers = TypeVar("_Numbers", tuple[int, ...], tuple[float, ...])


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
        rows, owners, served = (slice(*bounds) for bounds in (part.batch, part.kv_heads, part.heads))

        def per_head(numbers: _Numbers) -> _Numbers:
            return numbers[served] if len(numbers) == self.heads > 1 else numbers

        def per_row(operand: Tensor | None) -> Tensor | None:
            return operand if operand is None or operand.shape[0] == 1 else operand[rows]

        return dataclasses.replace(
            self,
            query=self.query[rows, served],
            key=self.key[rows, owners],
            value=self.value[rows, owners],
            key_flags=per_row(self.key_flags),
            segments=per_row(self.segments),
            windows=per_head(self.windows),
            threshold=per_head(self.threshold),
            head_thresholds=None if self.head_thresholds is None else self.head_thresholds[served],
            **{name: None if (one := getattr(self, name)) is None else one[rows, owners] for name in _BY_KV_HEAD},
        )


sparse_attention = define(SparseAttentionCall, SparseAttentionCall.empty_outputs)
