"""h2o: heavy hitters, what all queries of a prompt together look at, beside the last tokens.

Zhang et al., "H2O: Heavy-Hitter Oracle for Efficient Generative Inference of Large Language Models", arXiv 2306.14048, algorithm 1.
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field
from torch import Tensor

from sparsify.policies.base import EVERY_QUERY, Candidates, Layout, Policy
from sparsify.policies.scored import attention_mass


class H2O(Policy):
    """Keys with the largest sums of attention over the queries of a call stay, chosen per KV head, and the last tokens.

    The sums are computed anew from keys and queries, never as a matrix of queries by keys; that takes about as long as the prompt's own
    attention. Where the cache has room to select anew (`every`), sums go on from call to call and from token to token, as in the paper.
    Otherwise queries of earlier calls, and of tokens one by one, do not count: after the prompt the last tokens take turns.

    heavy_share: share of the budget that heavy hitters take; the last tokens have the rest.
    """

    name: ClassVar[str] = "h2o"

    heavy_share: float = Field(0.5, gt=0, lt=1, description="share of the budget that heavy hitters take")

    @property
    def observed(self) -> int:
        return EVERY_QUERY

    def layout(self, budget: int | None) -> Layout:
        if budget is None:
            raise self.refuse("no budget is given", "SparseCache(..., budget=4096)")
        heavy = round(budget * self.heavy_share)
        if not 0 < heavy < budget:
            raise self.refuse(f"a budget of {budget} tokens cannot be split into heavy hitters and last tokens", "give a larger budget")
        return Layout(budget, pinned=heavy, recent=budget - heavy)

    def score(self, candidates: Candidates) -> Tensor:
        mass = attention_mass(candidates)
        batch, kv_heads, count = candidates.positions.shape
        mass = mass.view(batch, kv_heads, -1, count).mean(2)
        return mass if candidates.carried is None else candidates.carried + mass

    @property
    def carries(self) -> bool:
        return True

    def carry(self, candidates: Candidates, scores: Tensor) -> Tensor:
        return scores
