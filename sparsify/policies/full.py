"""full: every token stays. An exact cache, for decoding at the memory's bandwidth without a copy of all keys at every token."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from sparsify.ops.cache import NEVER_OVERWRITTEN
from sparsify.ops.limits import cdiv
from sparsify.policies.base import Candidates, Layout, Policy

# Capacities are whole multiples, so that one compiled kernel, which may rely on the buffers' alignment, serves all of them.
STEP = 64


class Full(Policy):
    """Every token stays, in order of position. A budget is the number of tokens that room is made for at once (prompt and new tokens);
    beyond it the buffers grow, which copies what they hold."""

    name: ClassVar[str] = "full"

    def layout(self, budget: int | None) -> Layout:
        return Layout(cdiv(budget or 0, STEP) * STEP, pinned=NEVER_OVERWRITTEN, recent=0)

    def score(self, candidates: Candidates) -> Tensor:
        return candidates.positions.float()
