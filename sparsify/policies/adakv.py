"""adakv: another policy's scores, compared across the heads of a layer.

Feng et al., "Ada-KV: Optimizing KV Cache Eviction by Adaptive Budget Allocation for Efficient LLM Inference", arXiv 2407.11550, algorithm 1
and section 3.3.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from sparsify.policies.base import Candidates, LayerFacts, Layout, Policy
from sparsify.policies.wrapper import Wrapper


class AdaKV(Wrapper):
    """KV heads share the budget of their layer: each gets as many tokens as it has among the best of all heads together.

    Every head keeps the last tokens that the policy `of` keeps, and of what is left of its even share at least `floor`; a budget is the
    mean of the heads. Slots lie packed: memory is that of the budget, and a head reads what it keeps.

    of: name of the policy that scores.
    options: its options.
    floor: share of an even budget that each head has whatever its scores (the paper's safeguard).
    """

    name: ClassVar[str] = "adakv"

    of: str = Field("snapkv", description="the policy that scores")
    options: dict[str, Any] = Field(default_factory=dict, description="its options")
    floor: float = Field(0.2, ge=0, le=1, description="share of an even budget that each head has whatever its scores")

    def bind(self, layer: LayerFacts) -> Policy:
        return AdaKV(of=self.of, options=self.inner.bind(layer).model_dump(mode="json"), floor=self.floor)

    def layout(self, budget: int | None) -> Layout:
        return self.inner.layout(budget)

    def score(self, candidates: Candidates) -> Tensor:
        return self.inner.score(candidates)

    @property
    def by_head(self) -> bool:
        return True

    def share(self, scores: Tensor, kept: int, recent: int) -> Tensor:
        batch, kv_heads, count = scores.shape
        free = kept - recent  # of a head on the mean, beside its last tokens
        pool = scores.masked_fill(scores == torch.inf, -torch.inf).flatten(1)
        best = pool.argsort(dim=-1, descending=True, stable=True)[:, : free * kv_heads]
        exist = pool.gather(1, best) > -torch.inf
        wanted = scores.new_zeros(batch, kv_heads).scatter_add_(1, best // count, exist.to(scores.dtype))
        # what a short row does not fill goes to all alike
        wanted = wanted + (free * kv_heads - wanted.sum(1, keepdim=True)) / kv_heads
        return recent + whole(self.floor * free + (1 - self.floor) * wanted, free * kv_heads)


def whole(shares: Tensor, total: int) -> Tensor:
    """Shares [batch, heads] that add up to `total` as integers that do: those with the largest remainders are rounded up."""
    down = (shares + 1e-4).floor()  # fp32 sums of whole numbers
    missing = total - down.sum(1, keepdim=True)
    order = (shares - down).argsort(dim=-1, descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(-1, order, torch.arange(order.shape[1], device=order.device).expand_as(order))
    return (down + (rank < missing)).to(torch.int32)
