"""What policies share that attend to a prompt in full and score its tokens once, at the end of each call of several tokens."""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from sparsify.ops import cache
from sparsify.policies.base import Candidates, Layout, Policy


def attention_mass(candidates: Candidates) -> Tensor:
    """What each key gets of the observed queries' attention, float32 [batch, query_heads, candidates]."""
    numbers = {"scale": candidates.scale, "softcap": candidates.softcap, "version": cache.VERSION}
    return cache.mass(candidates.queries, candidates.keys, candidates.positions, candidates.query_positions, **numbers)


class ScoredPolicy(Policy):
    """Base of such policies; they say `recent` and `score`.

    recent_share: share of the budget that tokens after the prompt may take over, worst-scored prompt tokens first; beyond it, the
        oldest of them go.
    """

    recent_share: float = Field(0.25, ge=0, le=1, description="share of the budget that tokens after the prompt may take over")

    @property
    def newest(self) -> int:
        """How many of the last tokens stay whatever their score."""
        raise NotImplementedError

    def layout(self, budget: int | None) -> Layout:
        if budget is None:
            raise self.refuse("no budget is given", "SparseCache(..., budget=4096)")
        if budget <= self.newest:
            kept = f"the last {self.newest}" if self.newest > 1 else "the last one"
            raise self.refuse(f"a budget of {budget} tokens leaves none beside {kept}", f"give at least {self.newest + 1}")
        ring = max(self.newest, int(budget * self.recent_share))
        return Layout(budget, pinned=budget - ring, recent=self.newest)


class KeyPolicy(ScoredPolicy):
    """Base of those that score keys alone.

    recent: last tokens that stay whatever their keys.
    """

    recent: int = Field(32, ge=1, le=1 << 20, description="last tokens that stay, in tokens")

    @property
    def newest(self) -> int:
        return self.recent
