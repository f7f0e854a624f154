"""Key blocks that query blocks choose by themselves, from the means of queries and keys in a block, in PyTorch's own operations.

MInference (arXiv 2407.02490, algorithm 3) takes the highest of each row; FlexPrefill (arXiv 2502.20766) lets a head do so where the means
estimate well what its last rows look at.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparsify.ops.limits import cdiv
from sparsify.ops.patterns import SelectPatternCall


def means(values: Tensor, tokens: Tensor | None, block: int) -> Tensor:
    """Of the tokens in each block, fp32 [batch, heads, blocks, head_dim]; 0 where there is none.

    Args:
        values: [batch, heads, length, head_dim].
        tokens: which of them count, bool [batch or 1, length]; None: all.
    """
    if tokens is not None:
        values = values.masked_fill(~tokens[:, None, :, None], 0)
    length, whole = values.shape[2], values.shape[2] // block * block
    found = values[:, :, :whole].unflatten(2, (-1, block)).sum(3, dtype=torch.float32)
    if whole < length:
        found = torch.cat((found, values[:, :, whole:].sum(2, keepdim=True, dtype=torch.float32)), 2)
    if tokens is None:
        counts = torch.full((found.shape[2],), block, device=values.device)
        counts[-1] = length - (found.shape[2] - 1) * block
        return found / counts[:, None]
    return found / _counts(tokens, block).clamp(min=1)[:, None, :, None]


def _counts(tokens: Tensor, block: int) -> Tensor:
    """Tokens in each block, [batch or 1, blocks]."""
    blocks = cdiv(tokens.shape[1], block)
    return torch.nn.functional.pad(tokens.int(), (0, blocks * block - tokens.shape[1])).unflatten(1, (-1, block)).sum(-1)


def estimate(call: SelectPatternCall, query: Tensor, key: Tensor, own: Tensor) -> Tensor:
    """What rows look at by block, as the means say, fp32 [batch, heads, rows, key_blocks]; nothing behind a row's own block.

    Args:
        query: fp32 [batch, heads, rows, head_dim]. key: of `means`, [batch, kv_heads, key_blocks, head_dim].
        own: the block of each row, int64 [rows] or [batch, rows].
    """
    grouped = query.unflatten(1, (key.shape[1], -1)).flatten(2, 3)
    found = (grouped @ key.mT).view(*query.shape[:3], key.shape[2]).mul_(call.scale)
    hidden = torch.arange(key.shape[2], device=key.device) > own[..., None]
    hidden = hidden if hidden.dim() == 2 else hidden[:, None]
    if call.key_flags is not None:
        hidden = hidden | (_counts(call.key_flags & 1 != 0, call.block_size) == 0)[:, None, None]
    return found.masked_fill_(hidden, -torch.inf).softmax(-1).nan_to_num_(0.0)


def divergence(first: Tensor, second: Tensor) -> Tensor:
    """Square root of the Jensen-Shannon divergence, in nats, of distributions over the last dimension."""
    middle = (first + second) / 2
    side = lambda one: torch.special.xlogy(one, one) - torch.special.xlogy(one, middle)
    return ((side(first) + side(second)).sum(-1) / 2).clamp(min=0).sqrt()
