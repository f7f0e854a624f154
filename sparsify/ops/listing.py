"""What calls that make block lists have in common: sizes of their operands, in tokens and in blocks."""

from __future__ import annotations

from torch import Tensor

from sparsify.ops.call import OpCall
from sparsify.ops.limits import MOST_BLOCKS, cdiv


class ListingCall(OpCall):
    """A call with `query` [batch, query_heads, query_len, head_dim], `key` [batch, kv_heads, key_len, head_dim], `query_start` and
    `block_size`."""

    query: Tensor
    key: Tensor
    query_start: Tensor | None
    block_size: int

    @property
    def batch(self) -> int:
        return self.query.shape[0]

    @property
    def heads(self) -> int:
        return self.query.shape[1]

    @property
    def kv_heads(self) -> int:
        return self.key.shape[1]

    @property
    def group(self) -> int:
        """Query heads per KV head."""
        return self.heads // self.kv_heads

    @property
    def query_len(self) -> int:
        return self.query.shape[2]

    @property
    def key_len(self) -> int:
        return self.key.shape[2]

    @property
    def query_blocks(self) -> int:
        return cdiv(self.query_len, self.block_size)

    @property
    def key_blocks(self) -> int:
        return cdiv(self.key_len, self.block_size)

    @property
    def start(self) -> int | Tensor:
        """Key position of query row 0: a number, or a tensor of no dimensions when it is known at run time only."""
        if self.query_start is None:
            return self.key_len - self.query_len
        return self.query_start.reshape(())

    def check_length(self) -> None:
        """Raises UnsupportedError where lists cannot name all key blocks."""
        fits = self.key_blocks <= MOST_BLOCKS
        self.need(fits, f"{self.key_len} keys at block size {self.block_size}", f"at most {MOST_BLOCKS} blocks: int16 indices")
