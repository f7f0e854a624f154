"""Predicted seconds of one layer's attention by the cost model, as a sum over heads: what the heads of a layer share, and what each adds.

Time over block lists is linear in density but for what its launch costs, so that two points of it say all.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from sparsify.commands.calibrate.attention.settings import Way
from sparsify.costs import work
from sparsify.costs.device import Device
from sparsify.costs.seconds import seconds
from sparsify.costs.sizes import AttentionSizes

_LOW, _HIGH = 0.02, 0.5  # densities between which time over block lists is taken to be a line


@dataclass(frozen=True)
class LayerSeconds:
    """Of one attention at one length.

    sizes: numbers. kernel: family of the attention op. device: whose profile.
    """

    sizes: AttentionSizes
    kernel: str
    device: Device

    @property
    def heads(self) -> int:
        return int(self.sizes.query_heads)

    def dense(self) -> float:
        """The fastest exact kernel."""
        return min(self._of(work.attention(self.sizes, kernel)) for kernel in dict.fromkeys(("sdpa", self.kernel)))

    def estimate(self, way: Way, density: float) -> float:
        """What making the lists of all heads takes, where attention visits this share of the blocks."""
        return sum(self._of(one) for one in way.works(self.sizes, self.kernel, density))

    def lists(self) -> tuple[float, float]:
        """Attention along block lists: what it takes at no density, and what a density of 1 of one head adds."""
        low, high = (self._of(work.attention(self.sizes, self.kernel, share=d, listed=True)) for d in (_LOW, _HIGH))
        slope = (high - low) / (_HIGH - _LOW)
        return max(0.0, low - _LOW * slope), slope / self.heads

    def along_lists(self, way: Way, density: Sequence[float], chooses: Sequence[bool]) -> float:
        """Everything that a layer of block lists takes.

        Args:
            density: of each head. chooses: whether it has lists of the way, and is neither dense nor has a window beside others.
        """
        own = [one for one, is_so in zip(density, chooses, strict=True) if is_so]
        mean = sum(density) / len(density)
        return self.estimate(way, sum(own) / len(own)) + self._of(work.attention(self.sizes, self.kernel, share=mean, listed=True))

    def window(self, tokens: int) -> float:
        """One head that sees so many tokens, sinks included."""
        return self._of(work.attention(self.sizes, self.kernel, window=tokens)) / self.heads

    def every_key(self) -> float:
        """One dense head beside others with windows, by the same kernel."""
        return self._of(work.attention(self.sizes, self.kernel)) / self.heads

    def at(self, length: int) -> LayerSeconds:
        return dataclasses.replace(self, sizes=dataclasses.replace(self.sizes, query_len=length, key_len=length))

    def _of(self, one: work.Work) -> float:
        return float(seconds(one, self.device))
