"""A padded batch in front of a model's layers, a site that lies between graphs: its tokens may lie in fewer rows."""

from __future__ import annotations

import dataclasses
from collections import Counter
from dataclasses import dataclass
from typing import ClassVar

import torch

from sparsify.costs import seconds, work
from sparsify.costs.device import Device
from sparsify.costs.sizes import AttentionSizes
from sparsify.matching.base import SiteKind


@dataclass(frozen=True)
class PaddedSite:
    """A padded batch [batch, columns], and the packed rows [rows, length] that would hold its tokens.

    name: path of the list of layers, such as `model.layers`.
    count: layers.
    tokens: of all rows together, without padding.
    attention: sizes of a layer's attention over the padded batch.
    hidden: elements of a row of the residual stream.
    matrices: (inputs, outputs) of the layers' matrices, and how many layers have such a one; routed experts do not count.
    cached: whether keys and values go to a cache, padded.
    """

    kind: ClassVar[SiteKind] = "batch"

    name: str
    count: int
    batch: int
    columns: int
    tokens: int
    rows: int
    length: int
    attention: AttentionSizes
    hidden: int
    matrices: tuple[tuple[tuple[int, int], int], ...]
    cached: bool

    @property
    def dtype(self) -> torch.dtype:
        return self.attention.dtype

    def layer_seconds(self, device: Device, rows: int, length: int) -> float:
        """Expected seconds of all layers' attention and matrix products over rows of this length."""
        sizes = dataclasses.replace(self.attention, batch=rows, query_len=length, key_len=length)
        attention = float(seconds.attention_seconds(sizes, device, kernel="sdpa"))
        products = sum(
            count * float(seconds.linear_seconds(device, rows * length, inputs, outputs, self.dtype))
            for (inputs, outputs), count in self.matrices
        )
        return self.count * attention + products

    def packing_seconds(self, device: Device) -> float:
        """Expected seconds of what packing adds: rows gathered in front and behind, and each layer's keys and values on their way to the
        cache."""
        rows, padded = self.rows * self.length, self.batch * self.columns
        stream = 2 * self.hidden * (rows + padded)
        cached = self.count * int(self.attention.kv_heads) * int(self.attention.qk_head_dim + self.attention.v_head_dim) * (rows + padded)
        moved = self.dtype.itemsize * (stream + (cached if self.cached else 0))
        launches = _LAUNCHES + (2 * self.count if self.cached else 0)
        return float(seconds.seconds(work.elementwise(moved), device)) + launches * device.launch


def count_matrices(layers: list[list[tuple[int, int]]]) -> tuple[tuple[tuple[int, int], int], ...]:
    """`PaddedSite.matrices` of the matrices of each layer."""
    return tuple(Counter(one for layer in layers for one in layer).items())


def sizes(site: PaddedSite | None = None) -> dict[str, str]:
    """What a plan records of a batch; question marks where nothing is known."""
    if site is None:
        return dict.fromkeys(("batch", "columns", "tokens", "rows", "length", "layers"), "?")
    return {name: str(getattr(site, name)) for name in ("batch", "columns", "tokens", "rows", "length")} | {"layers": str(site.count)}


# kernels that gather rows, tables and positions, and the copies of where they lie
_LAUNCHES = 12
