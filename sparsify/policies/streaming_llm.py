"""streaming_llm: the first tokens and the last ones.

Xiao et al., "Efficient Streaming Language Models with Attention Sinks", arXiv 2309.17453.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor

from sparsify.policies.base import Candidates, Layout, Policy


class StreamingLLM(Policy):
    """The first and the last tokens stay.

    Each query sees its sinks and its own window, in prefill and in later turns too, so the result does not depend on how a text is cut
    into calls.

    sinks: first real tokens of each row that stay.
    window: last tokens that stay, the query's own included; None takes what the budget leaves.
    positions: "absolute" keeps every key where the model put it; "in_cache" is the published scheme, in which the sinks move along so that
        they always stand directly before the window.
    """

    name: ClassVar[str] = "streaming_llm"

    sinks: int = Field(4, ge=0, le=1 << 20, description="first real tokens of each row that stay, in tokens")
    window: int | None = Field(None, ge=1, le=1 << 30, description="last tokens that stay; None: what the budget leaves")
    positions: Literal["absolute", "in_cache"] = Field("absolute", description="where the sinks stand relative to the window")

    def layout(self, budget: int | None) -> Layout:
        if self.window is not None:
            window = self.window
        elif budget is not None:
            window = budget - self.sinks
        else:
            raise self.refuse("neither a budget nor a window is given", "SparseCache(..., budget=4096) or window=...")
        if window < 1 or (budget is not None and self.sinks + window > budget):
            needs = f"{self.sinks} sinks + window {max(window, 1)}"
            raise self.refuse(f"a budget of {budget} tokens is smaller than {needs}", f"give at least {self.sinks + max(window, 1)}")
        rotate = self.positions == "in_cache" and self.sinks > 0
        return Layout(self.sinks + window, pinned=self.sinks, recent=window, window=window, sinks=self.sinks, rotate_sinks=rotate)

    def score(self, candidates: Candidates) -> Tensor:
        return -candidates.positions.float()
