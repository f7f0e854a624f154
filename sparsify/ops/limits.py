"""What kernels serve and how they cut their work, said once: for the kernels, for methods that choose between them and for the cost model.

Nothing here imports a kernel.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

# lowest compute capability that any generated kernel runs on
MIN_CAPABILITY = (8, 0)
# from which there are tensor descriptors; compacted feed-forward blocks need them
DESCRIPTOR_CAPABILITY = (9, 0)
# rows of the residual stream that the feed-forward kernels for few rows take
FFN_MAX_ROWS = 32
# rows of linear layers that share one stream of the weights
LINEAR_MAX_ROWS = 16
# query and key cells of a tile of the estimate's product, and tiles at a time on a multiprocessor, on devices with tensor descriptors
SCORE_TILE, SCORE_TILES_AT_ONCE = (128, 256), 1
SCORE_TILE_INT8, SCORE_TILES_AT_ONCE_INT8 = (128, 128), 2

# bytes of a query or key cell up to which, in 8 bits and under the row rule, tiles whose query cells stay while keys pass by are the faster
STREAMED_CELL = 256

# query cells of a block, of each head, from which a kernel scores listed blocks alone: the fewest rows that tensor cores take
LEAST_LISTED_CELLS = 16

# key blocks of a row that the choice keeps in registers
WIDEST_ROW = 8192

# key blocks that the indices of block lists, int16, can name
MOST_BLOCKS = 32767


@dataclass(frozen=True)
class KernelLimits:
    """What an attention kernel serves.

    capability: major compute capability.
    dtypes: of query, key and value.
    min_head_dim, max_head_dim, head_dim_step: of query and key, and of value.
    min_query_len: with fewer rows another kernel is faster.
    block_size: of block lists.
    fast_head_dims: at which it was measured to be faster than SDPA in long plain prefill.
    """

    capability: int
    dtypes: tuple[torch.dtype, ...]
    min_head_dim: int
    max_head_dim: int
    head_dim_step: int
    min_query_len: int
    block_size: int
    fast_head_dims: tuple[int, ...]

    def obstacle(self, dtype: torch.dtype, head_dims: Sequence[int]) -> str | None:
        """Why no call of this dtype and these head dims is served; None when some are."""
        if dtype not in self.dtypes:
            return f"{dtype} operands"
        low, high = min(head_dims), max(head_dims)
        if low < self.min_head_dim or high > self.max_head_dim or any(dim % self.head_dim_step for dim in head_dims):
            return f"head dims {low} and {high}"
        return None

    def faster_than_sdpa(self, dtype: torch.dtype, head_dim: int) -> bool:
        """Whether long plain prefill may be faster than by SDPA; from which length on is the cost model's to say."""
        return self.obstacle(dtype, (head_dim,)) is None and head_dim in self.fast_head_dims


# with fewer than 64 rows most of a tile is empty, and the plain kernel packs the heads of a group into one
HOPPER = KernelLimits(9, (torch.bfloat16, torch.float16), 40, 256, 8, min_query_len=64, block_size=128, fast_head_dims=(64, 128))


def cdiv(size: int, tile: int) -> int:
    """How many tiles cover a size."""
    return -(-size // tile)


def score_tile(int8: bool) -> tuple[int, int, int]:
    """Query cells and key cells of a tile of the estimate's product, and how many tiles a multiprocessor works on at a time."""
    return (*SCORE_TILE_INT8, SCORE_TILES_AT_ONCE_INT8) if int8 else (*SCORE_TILE, SCORE_TILES_AT_ONCE)
