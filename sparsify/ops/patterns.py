"""`sparsify::select_pattern`: block lists from columns and diagonals of keys that the last queries look at.

A column is one key block, which every later query block visits; a diagonal is a distance, in blocks, at which each query block visits a
key block. MInference (arXiv 2407.02490, algorithm 2) takes both by the token; here they are blocks, so that they are lists like any others.
"""

from __future__ import annotations

from collections.abc import Sequence
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


def most_together(*numbers: Sequence[int]) -> int:
    """The highest sum that a head has of several numbers, each one for all heads or one per query head."""
    count = max(map(len, numbers))
    every = (one if len(one) == count else [*one] * count for one in numbers)
    return max(map(sum, zip(*every, strict=True)), default=0)


def operand_room(most: int) -> int:
    """Entries beside those that are always visited that lists have room for where numbers are operands: a power of two, so that layers
    whose heads need about as many are of one kind."""
    return 1 << (most - 1).bit_length() if most else 0


@dataclass(frozen=True, eq=False)
class SelectPatternCall(ListingCall):
    """One call of `sparsify::select_pattern`, over causal attention.

    query: [batch, query_heads, query_len, head_dim], floating point; key has its dtype.
    key: [batch, kv_heads, key_len, head_dim].
    key_flags, query_start, scale: as in `sparsify.ops.attention.AttentionCall`.
    columns: key blocks that all query blocks visit, beside the first: one number for all heads or one per query head.
    diagonals: distances in blocks, beside 0 and 1: the same.
    blocks: key blocks that each query block chooses by itself, beside the first, its own and the one before: by the means of its queries
        and of the blocks' keys (MInference's block-sparse pattern). One number for all heads or one per query head; empty: none.
    head_columns, head_diagonals, head_blocks: these per query head as tensors, where one graph serves layers that differ in them; then
        `most` is the highest sum of them that a head may have, which lists have room for. Without head_blocks: none.
    mass: share of what the choosing rows look at; where positive, a head visits as few columns as hold so much of it, and as few distances,
        each no more than `columns` and `diagonals` say, and query blocks likewise of their own estimates. What is visited in any case
        counts. FlexPrefill (arXiv 2502.20766).
    divergence: where positive, a head visits either what its query blocks choose or its columns and diagonals: the former where the means
        of the choosing rows estimate what these look at, by block, to less than this square root of the Jensen-Shannon divergence, in nats.
        A head without `blocks` keeps its columns and diagonals.
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
    head_columns: Annotated[Tensor | None, Operand("query_heads", "integers")] = None
    head_diagonals: Annotated[Tensor | None, Operand("query_heads", "integers")] = None
    head_blocks: Annotated[Tensor | None, Operand("query_heads", "integers")] = None
    scale: float
    columns: tuple[int, ...] = ()
    diagonals: tuple[int, ...] = ()
    blocks: tuple[int, ...] = ()
    most: int = 0
    mass: float = 0.0
    divergence: float = 0.0
    queries: int = 64
    block_size: int = 128

    @property
    def causal(self) -> bool:
        return True

    @property
    def width(self) -> Any:
        """Entries of a list: as many as the head with most may visit."""
        return SYMBOLIC_MIN(self.key_blocks, self.room + ALWAYS)

    @property
    def room(self) -> int:
        """Columns, diagonals and blocks of the head that has most of them together."""
        return self.most if self.head_columns is not None else most_together(self.columns, self.diagonals, self.blocks or (0,))

    @property
    def by_block(self) -> bool:
        """Whether some query blocks choose by themselves."""
        return self.head_blocks is not None or any(self.blocks)

    def check(self) -> None:
        """Checks that the arguments fit together.

        Raises:
            UnsupportedError: says what is wrong and what would do.
        """
        super().check()
        both = (self.head_columns is None) == (self.head_diagonals is None)
        self.need(both, "head_columns without head_diagonals, or the reverse", "both or none")
        self.need(self.head_blocks is None or self.head_columns is not None, "head_blocks without head_columns", "all three")
        self.need(self.divergence >= 0, f"a divergence of {self.divergence}", "0 or more")
        if self.head_columns is None:
            for name, numbers in (("columns", self.columns), ("diagonals", self.diagonals), ("blocks", self.blocks or (0,))):
                fits = len(numbers) in (1, self.heads) and all(number >= 0 for number in numbers)
                self.need(fits, f"{name} {numbers[:4]} for {self.heads} query heads", "one, or one per query head, 0 or more")
        self.need(self.most >= 0, f"room for {self.most} blocks", "0 or more")
        self.need(0 <= self.mass <= 1, f"a mass of {self.mass}", "0 (numbers alone decide) to 1")
        self.need(self.queries > 0, f"{self.queries} queries", "1 or more")
        self.check_length()
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
