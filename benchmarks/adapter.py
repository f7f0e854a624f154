"""The few places where the benchmarks look inside sparsify: realised densities, and which blocks were chosen."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def densities() -> Iterator[list[float]]:
    """Fills with the realised share of causal blocks of every block selection inside the context, in order of execution."""
    from sparsify.api import record_density

    with record_density() as found:
        yield found


@contextmanager
def chosen_blocks() -> Iterator[list[torch.Tensor]]:
    """Fills with bool maps [batch, query_heads, query_blocks, key_blocks] of the chosen blocks, one a selection, in order of execution."""
    from sparsify.testing import record_blocks

    maps: list[torch.Tensor] = []
    with record_blocks() as calls:
        yield maps
        maps.extend(block_map(counts, indices) for counts, indices in calls)


def block_map(counts: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """Block lists (counts [b, h, q], indices [b, h, q, k], entries past a row's count mean nothing) -> bool [b, h, q, k] on the CPU."""
    counts, indices = counts.cpu(), indices.cpu().long()
    listed = torch.arange(indices.shape[-1]) < counts[..., None]
    # unlisted entries all point one past the end, into a column that is cut off
    places = torch.where(listed, indices, indices.shape[-1])
    chosen = torch.zeros(*indices.shape[:-1], indices.shape[-1] + 1, dtype=torch.bool)
    return chosen.scatter_(-1, places, True)[..., :-1]


def causal_density(chosen: torch.Tensor) -> float:
    """Share of the causal blocks of a prefill's map [..., query_blocks, key_blocks] that were chosen."""
    rows, columns = chosen.shape[-2:]
    causal = torch.ones(rows, columns, dtype=torch.bool).tril(columns - rows)
    return float((chosen & causal).sum() / (causal.sum() * chosen[..., 0, 0].numel()))


def sink_window_density(length: int, sinks: int, window: int) -> float:
    """Share of the causal (query, key) pairs of a prefill that sinks and a window of last keys leave, by token."""
    visible = sum(min(row + 1, sinks + window) for row in range(length))
    return visible / (length * (length + 1) / 2)
