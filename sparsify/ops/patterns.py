"""`sparsify::select_pattern`: block lists from columns and diagonals of keys that the last queries look at.

A column is one key block, which every later query block visits; a diagonal is a distance, in blocks, at which each query block visits a
key block. MInference (arXiv 2407.02490, algorithm 2) takes both by the token; here they are blocks, so that they are lists like any others.
"""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor

from sparsify.graph.typed_torch import SYMBOLIC_MIN
from sparsify.ops.attention import VERSION
from sparsify.ops.call import Operand
from sparsify.ops.library import define
from sparsify.ops.listing import ListingCall

# of each query block, whatever is chosen: the block of the first visible key, that of its own rows, and the one before
ALWAYS = 3


@dataclass(frozen=True, eq=False)
class SelectPatternCall(ListingCall):
    """One call of `sparsify::select_pattern`, over causal attention.

    query: [batch, query_heads, query_len, head_dim], floating point; key has its dtype.
    key: [batch, kv_heads, key_len, head_dim].
    key_flags, query_start, scale: as in `sparsify.ops.attention.AttentionCall`.
    columns: key blocks that all query blocks visit, beside the first: one number for all heads or one per query head.
    diagonals: distances in blocks, beside 0 and 1: the same.
    queries: last query rows whose attention chooses; where key_flags hide keys, the last ones that are visible.
    block_size: query rows and keys of a block.
    """

    NAME: ClassVar[str] = "select_pattern"
    VERSION: ClassVar[int] = VERSION

    query: Annotated[Tensor, Operand("batch query_heads query_len head_dim")]
    key: Annotated[Tensor, Operand("batch kv_heads key_len head_dim")]
    _: KW_ONLY
    key_flags: Annotated[Tensor | None, Operand("batch|1 key_len", "integers")] = None
    query_start: Annotated[Tensor | None, Operand("", "integers", anywhere=True)] = None
    scale: float
    columns: tuple[int, ...]
    diagonals: tuple[int, ...]
    queries: int = 64
    block_size: int = 128

    @property
    def causal(self) -> bool:
        return True

    @property
    def width(self) -> Any:
        """Entries of a list: as many as the head with most may visit."""
        return SYMBOLIC_MIN(self.key_blocks, max(self.columns) + max(self.diagonals) + ALWAYS)

    def check(self) -> None:
        """Checks that the arguments fit together.

        Raises:
            UnsupportedError: says what is wrong and what would do.
        """
        super().check()
        for name, numbers in (("columns", self.columns), ("diagonals", self.diagonals)):
            fits = len(numbers) in (1, self.heads) and all(number >= 0 for number in numbers)
            self.need(fits, f"{name} {numbers[:4]} for {self.heads} query heads", "one, or one per query head, 0 or more")
        self.need(self.queries > 0, f"{self.queries} queries", "1 or more")
        self.need(self.block_size in (32, 64, 128), f"block size {self.block_size}", "64 or 128")

    def empty_lists(self) -> tuple[Tensor, Tensor]:
        """Uninitialised block lists (`sparsify.ops.block_lists`), of `width` entries.

        Returns:
            counts: int32, [batch, query_heads, query_blocks].
            indices: int16, [batch, query_heads, query_blocks, width].
        """
        counts = self.query.new_empty(self.query.shape[0], self.heads, self.query_blocks, dtype=torch.int32)
        return counts, self.query.new_empty(*counts.shape, self.width, dtype=torch.int16)


select_pattern = define(SelectPatternCall, SelectPatternCall.empty_lists)
