"""token_select: behind one layer only some tokens of a prompt go on; later layers compute, and store, no others.

Which ones, the attention says that the prompt's last queries give in that layer, by heads that are known to find what a text is asked
for: LazyLLM (arXiv 2407.14057) leaves tokens out from layer to layer, and so do we: the chosen rows of the residual stream go on from where
they are, at their own positions. GemFilter (arXiv 2409.17422) reads the tokens that an early layer chose anew, as a prompt of their own:
`mode = "prompt"`.

Layer, heads and number are the model's own and have no defaults: a layer that does not know yet what is asked for loses it.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from typing import ClassVar, Literal

import sympy
import torch
import torch.nn.functional as F
from pydantic import Field, field_validator
from torch import Tensor

from sparsify.planning.method import Context, Pass, Proposal, Refusal, SiteKind, StreamSite, missing_layer, tokens_or_share


class TokenSelect(Pass):
    """See the options' descriptions; `choose` says which tokens."""

    name: ClassVar[str] = "token_select"
    kinds: ClassVar[tuple[SiteKind, ...]] = ("stream",)

    layer: int | None = Field(
        None, ge=0, description="decoder layer whose attention chooses, from 0; those behind it compute the chosen tokens"
    )
    heads: tuple[int, ...] | Literal["all"] | None = Field(None, description="query heads of that layer that choose, or `all`")
    keep: int | float | None = Field(
        None, gt=0, description="tokens of each row that go on, sinks and window included; a float is a share of the longest row's"
    )
    mass: float | None = Field(
        None,
        gt=0,
        le=1,
        description="share of the chosen heads' attention, outside of sinks and window, that the tokens must hold; `keep` is then the most",
    )
    queries: int = Field(32, ge=1, le=4096, description="last queries of each row whose attention chooses")
    window: int = Field(64, ge=1, le=1 << 20, description="last tokens of each row, which always go on")
    sinks: int = Field(4, ge=0, le=1 << 20, description="first tokens of each row, which always go on")
    kernel: int = Field(7, ge=1, le=255, description="tokens over which the attention is smoothed, odd; 1: none")
    pool: Literal["avg", "max"] = Field("avg", description="how it is smoothed")
    group: Literal["mean", "max"] = Field("mean", description="how the heads agree")
    mode: Literal["narrow", "prompt"] = Field(
        "narrow",
        description="`narrow`: the tokens go on through the later layers; `prompt`: `generate()` reads them anew, as a prompt of their own",
    )

    @field_validator("kernel")
    @classmethod
    def _odd(cls, value: int) -> int:
        if value % 2 == 0:
            raise ValueError("must be odd")
        return value

    _share = field_validator("keep", mode="before")(tokens_or_share)

    @field_validator("heads")
    @classmethod
    def _some(cls, value: tuple[int, ...] | str | None) -> tuple[int, ...] | str | None:
        if value == () or (isinstance(value, tuple) and min(value) < 0):
            raise ValueError("names no heads")
        return value

    def misfits(self, heads: Collection[int], layers: int) -> Iterator[tuple[str, str]]:
        yield from super().misfits(heads, layers)
        yield from missing_layer(self.layer, layers)
        if heads and isinstance(self.heads, tuple) and max(self.heads) >= max(heads):
            yield "heads", f"head {max(self.heads)} does not exist: layers have {' or '.join(map(str, sorted(heads)))} query heads, from 0"

    def propose(self, site: StreamSite, context: Context) -> Proposal | Refusal:
        if self.layer is None or self.heads is None or (self.keep is None and self.mass is None):
            names = {"layer": self.layer, "heads": self.heads, "keep": self.keep if self.mass is None else self.mass}
            missing = ", ".join(name for name, value in names.items() if value is None)
            return self.refuse(f"no {missing} given: which tokens matter depends on the model", "name the layer, its heads and keep")
        heads = int(site.attention.query_heads)
        if self.heads != "all" and max(self.heads) >= heads:
            return self.refuse(f"head {max(self.heads)} does not exist: layer {site.layer} has {heads}")
        if site.layer + 1 >= site.count and self.mode == "narrow":
            return self.refuse(f"no layer follows layer {site.layer}")
        most = self.most(site.longest)
        if self.fits(site.longest):
            return self.refuse(f"the longest row has {site.longest} tokens: all of them go on")
        if most <= self.sinks + self.window:
            what = f"{most} tokens leave none beside {self.sinks} sinks and a window of {self.window}"
            return self.refuse(what, f"keep more than {self.sinks + self.window}")
        seconds = site.choosing_seconds(context.device, self.queries, most) if context.costs else 0.0
        words = (
            f"{most} of {site.longest} tokens"
            if self.mass is None
            else f"tokens that hold {self.mass:.0%} of the attention, at most {most},"
        )
        where = f"go on behind layer {site.layer}, {site.count - 1 - site.layer} layers"
        if self.mode == "prompt":
            where = f"are the prompt that {site.count} layers read, chosen by layer {site.layer}"
        return Proposal(self, sympy.Float(seconds), note=f"{words} {where}")

    def most(self, longest: int) -> int:
        """The most tokens of a row that go on, where the longest one has so many."""
        if self.keep is None:
            return longest
        return min(longest, self.keep if isinstance(self.keep, int) else math.ceil(self.keep * longest))

    def fits(self, longest: int) -> bool:
        """Whether nothing is left out of rows of so many tokens."""
        return longest <= self.sinks + self.window or (self.keep is not None and self.most(longest) >= longest and self.mass is None)

    def choose(self, mass: Tensor, is_token: Tensor | None, longest: int) -> Tensor:
        """The columns that go on.

        Args:
            mass: fp32 [batch, query_heads, tokens], what each key gets of the last queries' attention, 0 for padding.
            is_token: bool [batch, tokens], False for padding; None without any.
            longest: tokens of the longest row.

        Returns:
            int64 [batch, kept], rising. Rows with fewer tokens than `kept` have padding among them. Under `mass` the host waits
            for the number.
        """
        if self.heads is None:
            raise ValueError("no heads are named")
        score = mass if self.heads == "all" else mass[:, list(self.heads)]
        score = score.mean(1) if self.group == "mean" else score.amax(1)
        batch, tokens = score.shape
        order = None
        if is_token is not None:  # what stands side by side is tokens: padding goes behind them
            order = is_token.to(torch.uint8).argsort(dim=-1, descending=True, stable=True)
            score = score.gather(1, order)
        rank = torch.arange(tokens, device=mass.device).expand(batch, tokens)
        count = torch.full((batch, 1), tokens, device=mass.device) if is_token is None else is_token.sum(-1, keepdim=True)
        fixed = (rank < self.sinks) | (rank >= count - self.window)
        # sinks hold most of the attention and, like the window, stay anyway: they must not smear into their neighbours
        score = self._smoothed(score.masked_fill(fixed, 0)).masked_fill(fixed, 0)
        kept = self.most(longest)
        if self.mass is not None:
            kept = min(kept, _holding(score, (fixed & (rank < count)).sum(-1), self.mass))
        score = score.masked_fill(fixed, torch.inf).masked_fill(rank >= count, -torch.inf)
        columns = score.topk(kept, dim=-1).indices
        if order is not None:
            columns = order.gather(1, columns)
        return columns.sort(-1).values

    def _smoothed(self, score: Tensor) -> Tensor:
        pool = F.avg_pool1d if self.pool == "avg" else F.max_pool1d
        return pool(score[:, None], self.kernel, stride=1, padding=self.kernel // 2)[:, 0]

    def keep_all(self) -> TokenSelect:
        return self.model_copy(update={"keep": 1.0, "mass": None})


def _holding(score: Tensor, fixed: Tensor, share: float) -> int:
    """The fewest tokens, as many in all rows, that hold a share of each row's score, and `fixed`, int64 [batch], that stay anyway."""
    held = score.sort(-1, descending=True).values.cumsum(-1)
    needed = (held < share * held[:, -1:]).sum(-1) + 1
    return min(int((fixed + needed).max()), score.shape[1])
