"""sirllm: tokens that the model did not expect.

Yao, Li, Zhao, "SirLLM: Streaming Infinite Retentive LLM", arXiv 2405.12528, section 3.
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field
from torch import Tensor

from sparsify.policies.base import Candidates, Layout, Policy


class SirLLM(Policy):
    """The first tokens stay, the last ones, and those of which the model had thought least likely: by -log p(token | text before it).

    `SparseCache.observe` is told the model's logits after every call; all layers and heads keep the same tokens. After each turn
    (`SparseCache.end_turn`) these numbers are multiplied by `turn_decay`, so that what is said later counts for more.

    sinks: first real tokens of each row that stay.
    recent: last tokens that stay; the paper's experiments keep none beside the others, here one at least.
    turn_decay: of a token's number at the end of each turn, 1: nothing is forgotten.
    """

    name: ClassVar[str] = "sirllm"

    sinks: int = Field(4, ge=0, le=1 << 20, description="first real tokens of each row that stay, in tokens")
    recent: int = Field(1, ge=1, le=1 << 20, description="last tokens that stay, in tokens")
    turn_decay: float = Field(1.0, gt=0, le=1, description="of a token's number at the end of each turn")

    def layout(self, budget: int | None) -> Layout:
        stay = self.sinks + self.recent
        if budget is None or budget <= stay:
            what = f"{self.sinks} first and {self.recent} last tokens"
            raise self.refuse(f"a budget of {budget} leaves none beside {what}", f"give at least {stay + 1}")
        return Layout(budget, pinned=budget - self.recent, recent=self.recent)

    def score(self, candidates: Candidates) -> Tensor:
        surprise, at = candidates.carried, candidates.positions
        if surprise is None:
            raise self.refuse("what the model expected is not known", "SparseCache(..., every=...) and cache.observe(logits, input_ids)")
        return surprise.masked_fill((at >= 0) & (at < self.sinks), float("inf"))

    @property
    def carries(self) -> bool:
        return True

    @property
    def awaits(self) -> bool:
        return True

    @property
    def decay(self) -> float:
        return self.turn_decay
