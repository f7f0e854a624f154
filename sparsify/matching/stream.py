"""The residual stream behind a decoder layer, a site that lies between graphs: which rows of it later layers compute."""

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
class StreamSite:
    """A prompt's residual stream behind a layer, [batch, tokens, hidden].

    name: the layer's path, such as `model.layers.12`; before the first layer that of all layers.
    layer, count: its number, -1 before the first one, and how many layers the model has.
    batch, tokens: of the call.
    longest: tokens of the longest row without padding.
    attention: sizes of a layer's attention in this call.
    hidden: elements of a row.
    matrices: of every later layer, (inputs, outputs) of its matrices; routed experts do not count.
    rows: of each row the tokens and, of those, the image tokens; empty where nobody asks for them.
    """

    kind: ClassVar[SiteKind] = "stream"

    name: str
    layer: int
    count: int
    batch: int
    tokens: int
    longest: int
    attention: AttentionSizes
    hidden: int
    matrices: tuple[tuple[tuple[int, int], ...], ...]
    rows: tuple[tuple[int, int], ...] = ()

    @property
    def dtype(self) -> torch.dtype:
        return self.attention.dtype

    def choosing_seconds(self, device: Device, queries: int, kept: int) -> float:
        """Expected seconds of the last queries' attention, which reads the layer's keys twice, of the choice and of gathering rows.
        queries: 0 where no attention is asked."""
        heads, kv_heads, dim = (int(size) for size in (self.attention.query_heads, self.attention.kv_heads, self.attention.qk_head_dim))
        keys = self.batch * self.tokens * kv_heads * dim * self.dtype.itemsize if queries else 0
        masses = 4 * self.batch * self.tokens * (heads if queries else 1)
        rows = self.batch * kept * self.hidden * self.dtype.itemsize
        flops = 4 * self.batch * heads * queries * self.tokens * dim  # logits, twice
        moved = seconds.seconds(work.elementwise(2 * keys + 3 * masses + 2 * rows), device)
        return float(moved) + flops / device.matrix_flops(self.dtype) + _LAUNCHES * device.launch

    def later_seconds(self, device: Device, tokens: int) -> float:
        """Expected seconds of the later layers' dense attention and matrix products over so many rows of each sequence."""
        sizes = dataclasses.replace(self.attention, query_len=tokens, key_len=tokens)
        attention = float(seconds.attention_seconds(sizes, device, kernel="sdpa"))
        # every call asks again, and layers are alike: each shape is counted, not predicted anew
        shapes = Counter(shape for layer in self.matrices for shape in layer)
        products = sum(
            times * float(seconds.linear_seconds(device, self.batch * tokens, inputs, outputs, self.dtype))
            for (inputs, outputs), times in shapes.items()
        )
        return len(self.matrices) * attention + products


def sizes(site: StreamSite | None = None, kept: int = 0) -> dict[str, str]:
    """What a plan records of a stream of which so many tokens of each row go on; question marks where nothing is known."""
    if site is None:
        return dict.fromkeys(("batch", "tokens", "kept", "layers"), "?")
    return {"batch": str(site.batch), "tokens": str(site.tokens), "kept": str(kept), "layers": str(site.count - 1 - site.layer)}


# kernels of the sums, smoothing, sorting and gathering
_LAUNCHES = 30
