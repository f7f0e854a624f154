"""duo: heads that a plan names see the first and the last tokens, the others what another policy keeps.

Xiao et al., "DuoAttention: Efficient Long-Context LLM Inference with Retrieval and Streaming Heads", arXiv 2410.10819, section 3.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field, Strict
from torch import Tensor

from sparsify.policies.adakv import whole
from sparsify.policies.base import Candidates, Integers, LayerFacts, Layout, Policy
from sparsify.policies.wrapper import Wrapper


class Duo(Wrapper):
    """Streaming heads keep `sinks` first and `window` last tokens; the slots that they leave go to the layer's other heads.

    A budget is the mean of a layer's heads, so that retrieval heads keep a whole text of n tokens where streaming heads and they together
    have that mean. Prompts are attended to in full by all heads.

    streaming: KV heads that stream, by layer of those that evict.
    of: name of the policy that chooses what retrieval heads keep when they are full.
    options: its options.
    sinks, window: tokens of streaming heads.
    heads: of the own layer; the cache says them.
    """

    name: ClassVar[str] = "duo"

    streaming: Annotated[tuple[Integers, ...], Strict(False)] = Field((), description="KV heads that stream, by layer")
    of: str = Field("snapkv", description="the policy that chooses for the other heads")
    options: dict[str, Any] = Field(default_factory=dict, description="its options")
    sinks: int = Field(16, ge=0, le=1 << 20, description="first tokens that streaming heads keep")
    window: int = Field(64, ge=1, le=1 << 20, description="last tokens that streaming heads keep")
    heads: Integers = Field((), description="of the own layer; the cache says them")

    def bind(self, layer: LayerFacts) -> Policy:
        if len(self.streaming) != layer.count:
            raise self.refuse(f"the plan names heads of {len(self.streaming)} layers, {layer.count} evict", "one list of heads a layer")
        if layer.kv_heads and (wrong := [head for heads in self.streaming for head in heads if not 0 <= head < layer.kv_heads]):
            raise self.refuse(f"the plan names KV head {wrong[0]}, layers have {layer.kv_heads}, from 0", "KV heads, not query heads")
        own, options = self.streaming[layer.index], self.inner.bind(layer).model_dump(mode="json")
        return Duo(streaming=(), of=self.of, options=options, sinks=self.sinks, window=self.window, heads=own)

    def layout(self, budget: int | None) -> Layout:
        layout = self.inner.layout(budget)
        if layout.capacity < self.sinks + self.window or layout.recent > self.window:
            what = f"{self.sinks} first and {self.window} last tokens, {layout.recent} of which {self.of} keeps in all heads"
            raise self.refuse(
                f"a budget of {budget} is not one of streaming heads with {what}", "other numbers of them, or a larger budget"
            )
        return layout

    def score(self, candidates: Candidates) -> Tensor:
        scores, at = self.inner.score(candidates).float(), candidates.positions
        own = self._own(at.shape[1], at.device)[:, None]
        return torch.where(own, at.float().masked_fill(at < self.sinks, 3e38), scores)

    @property
    def by_head(self) -> bool:
        return True

    def share(self, scores: Tensor, kept: int, recent: int) -> Tensor:
        batch, kv_heads, _ = scores.shape
        streaming = len(self.heads)
        if streaming in (0, kv_heads):
            few = self.sinks + self.window if streaming else kept
            return torch.full((batch, kv_heads), few, dtype=torch.int32, device=scores.device)
        rest = kept * kv_heads - streaming * (self.sinks + self.window)
        others = kv_heads - streaming
        own = self._own(kv_heads, scores.device)
        even = whole(scores.new_full((1, others), rest / others), rest)
        return torch.where(own, self.sinks + self.window, even.new_zeros(1, kv_heads).masked_scatter(~own[None], even)).expand(batch, -1)

    def _own(self, kv_heads: int, device: torch.device) -> Tensor:
        """Which heads stream, bool [kv_heads]."""
        own = torch.zeros(kv_heads, dtype=torch.bool, device=device)
        for head in self.heads:
            own[head] = True
        return own
