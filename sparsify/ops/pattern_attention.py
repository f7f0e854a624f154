"""`sparsify::pattern_attention`: columns and diagonals chosen, and attention along them, in one call: over a text that is divided among
processes what is chosen decides what travels, and lists that are too large to exist at once are made for some heads after the others.
"""

from __future__ import annotations

import dataclasses
from dataclasses import KW_ONLY, dataclass
from typing import Annotated, ClassVar

from torch import Tensor

from sparsify.ops.attention import AttentionCall, empty_outputs
from sparsify.ops.call import Operand
from sparsify.ops.library import define
from sparsify.ops.patterns import SelectPatternCall
from sparsify.ops.scratch import Part


@dataclass(frozen=True, eq=False)
class PatternAttentionCall(SelectPatternCall):
    """One call of `sparsify::pattern_attention`: the fields of `SelectPatternCall`, and some of `sparsify.ops.attention.AttentionCall`.

    value: [batch, kv_heads, key_len, v_head_dim], in query's dtype.
    seq_major, empty_rows, lowest, sequence: as in `AttentionCall`.
    """

    windows: ClassVar[tuple[int, ...]] = ()
    sinks: ClassVar[int] = 0
    segments: ClassVar[None] = None
    NAME: ClassVar[str] = "pattern_attention"

    value: Annotated[Tensor, Operand("batch kv_heads key_len v_head_dim")]
    _: KW_ONLY
    seq_major: bool = False
    empty_rows: str = "zero"
    lowest: float = 0.0
    sequence: str = ""

    def selection(self) -> SelectPatternCall:
        """The call that makes its block lists."""
        return SelectPatternCall(**self.common(SelectPatternCall))

    def attention(self, counts: Tensor, indices: Tensor) -> AttentionCall:
        """Attention along block lists."""
        return AttentionCall(**self.common(AttentionCall), block_counts=counts, block_indices=indices)

    def empty_outputs(self) -> tuple[Tensor, Tensor]:
        return empty_outputs(self.query, self.value, self.seq_major)

    def part(self, part: Part) -> PatternAttentionCall:
        """The call as some of the heads and batch rows see it."""
        return dataclasses.replace(
            self,
            query=part.of_heads(self.query),
            key=part.of_kv_heads(self.key),
            value=part.of_kv_heads(self.value),
            key_flags=part.of_rows(self.key_flags),
            columns=part.numbers(self.columns, self.heads),
            diagonals=part.numbers(self.diagonals, self.heads),
            head_columns=None if self.head_columns is None else self.head_columns[slice(*part.heads)],
            blocks=part.numbers(self.blocks, self.heads),
            head_blocks=None if self.head_blocks is None else self.head_blocks[slice(*part.heads)],
            head_diagonals=None if self.head_diagonals is None else self.head_diagonals[slice(*part.heads)],
        )


pattern_attention = define(PatternAttentionCall, PatternAttentionCall.empty_outputs)
