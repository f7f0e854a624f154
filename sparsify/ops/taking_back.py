"""What is told of layers from which the last tokens are taken back, all of them at once (`sparsify.backends.cache.take_back`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Counters:
    """What says which tokens a layer holds; `sparsify.ops.cache` describes it.

    positions: int32 [batch, kv_heads, capacity]. counts: int32 [batch, kv_heads]. seen: int32 [batch]. length: int64 [].
    """

    positions: Tensor
    counts: Tensor
    seen: Tensor
    length: Tensor

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.positions, self.counts, self.seen, self.length


class Places:
    """Where the counters of a cache's layers lie, on the device, so that one launch finds them all. It belongs to the cache: CUDA graphs
    that were recorded over the cache's buffers read it at every replay."""

    # numbers of a layer: four addresses, KV heads, slots of each
    WIDTH = 6

    def __init__(self) -> None:
        self._known: tuple[int, ...] = ()
        self._table: Tensor | None = None

    def of(self, layers: Sequence[Counters]) -> Tensor:
        """int64 [layers * WIDTH] on the layers' device; the same tensor until a buffer has moved, which waits for the device."""
        known = tuple(number for layer in layers for number in (*(t.data_ptr() for t in layer.tensors), *layer.positions.shape[1:]))
        if self._table is None or known != self._known:
            self._table, self._known = torch.tensor(known, dtype=torch.int64).to(layers[0].positions.device), known
        return self._table

    def __reduce__(self) -> tuple[type[Places], tuple[()]]:
        """A copy's buffers lie elsewhere."""
        return Places, ()
