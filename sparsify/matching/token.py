"""A generated token in front of a model's layers, a site that lies between graphs: which layers it runs."""

from __future__ import annotations

import dataclasses
from collections import Counter
from dataclasses import dataclass
from typing import ClassVar

from sparsify.costs import seconds
from sparsify.costs.device import Device
from sparsify.costs.sizes import AttentionSizes
from sparsify.matching.base import SiteKind


@dataclass(frozen=True)
class TokenSite:
    """One token of each row, behind a prompt.

    name: path of the list of layers, such as `model.layers`.
    attention: sizes of a layer's attention: one query row over the prompt's keys.
    matrices: of every layer, (inputs, outputs) of its matrices; routed experts do not count.
    """

    kind: ClassVar[SiteKind] = "token"

    name: str
    attention: AttentionSizes
    matrices: tuple[tuple[tuple[int, int], ...], ...]

    @property
    def count(self) -> int:
        """Layers of the model."""
        return len(self.matrices)

    def layer_seconds(self, device: Device, layers: range) -> float:
        """Expected seconds of these layers' dense attention and matrix products."""
        sizes = dataclasses.replace(self.attention, query_len=1)
        attention = float(seconds.attention_seconds(sizes, device, kernel="sdpa"))
        rows, dtype = int(sizes.batch), sizes.dtype
        shapes = Counter(pair for layer in layers for pair in self.matrices[layer])  # layers are alike
        products = sum(count * float(seconds.linear_seconds(device, rows, *pair, dtype)) for pair, count in shapes.items())
        return len(layers) * attention + products


def sizes(site: TokenSite | None = None, bypassed: int = 0) -> dict[str, str]:
    """What a plan records of the tokens behind a prompt, of which the last ones bypass so many layers; question marks where nothing is
    known."""
    if site is None:
        return dict.fromkeys(("batch", "keys", "layers", "bypassed"), "?")
    found = {"batch": site.attention.batch, "keys": site.attention.key_len, "layers": site.count, "bypassed": bypassed}
    return {name: str(size) for name, size in found.items()}
