"""skip_layers: a generated token bypasses whole layers, attention and feed-forward block, by a schedule over generated tokens.

SkipDecode (Del Corro et al., arXiv 2307.02628): how many layers a token runs falls linearly with its position, the same for every row of a
batch. The first layers always run, then lower ones are bypassed, and the top ones always run. The bypassed sets nest: a layer that a
token runs was run by all tokens before it, so that its cache has their keys, and a bypassed layer stores none for the token. Later prompts
run every layer over what each one holds.

`ffn_skip` leaves out feed-forward blocks alone, which keeps caches complete.
"""

from __future__ import annotations

from typing import ClassVar

import sympy
from pydantic import Field

from sparsify.planning.method import Context, Pass, Proposal, Refusal, SiteKind, TokenSite


class SkipLayers(Pass):
    """See the options' descriptions; `bypassed` says which layers."""

    name: ClassVar[str] = "skip_layers"
    kinds: ClassVar[tuple[SiteKind, ...]] = ("token",)

    first: int = Field(1, ge=1, description="first layers of the model, which every token runs")
    last: int = Field(1, ge=1, description="last layers of the model, which every token runs")
    most: float = Field(0.25, ge=0, le=1, description="share of the layers between that a token bypasses at the schedule's end")
    warmup: int = Field(16, ge=0, le=1 << 30, description="first generated tokens that run every layer")
    length: int = Field(512, ge=0, le=1 << 30, description="generated tokens until the schedule's end; 0: it begins there")

    def propose(self, site: TokenSite, context: Context) -> Proposal | Refusal:
        if site.count <= self.first + self.last:
            return self.refuse(f"none of {site.count} layers lies between the first {self.first} and the last {self.last}")
        end = self.bypassed(self.warmup + self.length, site.count)
        if not end:
            return self.refuse(f"{self.most:.0%} of {site.count - self.first - self.last} layers is none")
        seconds = 0.0
        if context.costs:
            seconds = site.layer_seconds(context.device, range(site.count)) - site.layer_seconds(context.device, end)
        note = f"layers {end[0]} to {end[-1]} bypassed after {max(self.warmup, self.length)} tokens, none for {self.warmup}"
        return Proposal(self, sympy.Float(seconds), note=note)

    def bypassed(self, age: int, count: int) -> range:
        """The layers that a generated token bypasses, of `count`. age: generated tokens of its row before it."""
        most = round(self.most * max(0, count - self.first - self.last))
        if age < self.warmup:
            return range(0)
        gone = most * min(age, self.length) // self.length if self.length else most
        return range(self.first, self.first + gone) if gone else range(0)

    def keep_all(self) -> SkipLayers:
        return self.model_copy(update={"most": 0.0})
