"""pyramidkv: another policy's choice, under budgets that fall from the first layer to the last.

Cai et al., "PyramidKV: Dynamic KV Cache Compression based on Pyramidal Information Funneling", arXiv 2406.02069, section 4.2.
"""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import Field
from torch import Tensor

from sparsify.policies.base import Candidates, LayerFacts, Layout, Policy
from sparsify.policies.wrapper import Wrapper


class PyramidKV(Wrapper):
    """Layers keep different numbers of tokens, by the choice of the policy `of`; a budget is their mean.

    Beside the last tokens, which every layer keeps, the last layer has 1/beta of the mean, the first one twice the mean less that, and
    those between them lie on a line. Layers with a sliding window of the model's own do not count.

    of: name of the policy that chooses.
    options: its options.
    beta: steepness; 1 gives every layer the same.
    layer, layers: number of the layer and how many there are; the cache says them.
    """

    name: ClassVar[str] = "pyramidkv"

    of: str = Field("snapkv", description="the policy that chooses")
    options: dict[str, Any] = Field(default_factory=dict, description="its options")
    beta: float = Field(20, ge=1, le=1000, description="steepness of the pyramid")
    layer: int = Field(0, ge=0, description="number of the layer; the cache says it")
    layers: int = Field(1, ge=1, description="layers of the cache; the cache says it")

    def bind(self, layer: LayerFacts) -> Policy:
        inner = self.inner.bind(layer).model_dump(mode="json")
        return type(self)(of=self.of, options=inner, beta=self.beta, layer=layer.index, layers=layer.count)

    @property
    def scorer(self) -> Policy:
        return self.inner.scorer

    def layout(self, budget: int | None) -> Layout:
        whole = self.inner.layout(budget)
        if self.layers == 1:
            return whole
        mean = whole.capacity - whole.recent
        least = mean / self.beta
        most, last = 2 * mean - least, self.layers - 1
        # of the first n layers together, so that rounding neither adds a token nor loses one
        upto = lambda n: round(n * most - (most - least) * n * (n - 1) / (2 * last))
        own = upto(self.layer + 1) - upto(self.layer)
        return self.inner.layout(whole.recent + own)

    def score(self, candidates: Candidates) -> Tensor:
        return self.inner.score(candidates)
