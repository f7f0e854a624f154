"""What an eviction policy is: which tokens a full cache keeps.

A policy is a frozen pydantic model whose fields are its options. It says how a budget is laid out and scores candidates; storing,
padding, positions and the tokens that always stay are the cache's business.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Strict
from torch import Tensor

from sparsify.errors import ConfigError
from sparsify.ops.cache import NEVER_OVERWRITTEN

# tuples, for which files and callers give lists
Integers = Annotated[tuple[int, ...], Strict(False)]
Numbers = Annotated[tuple[float, ...], Strict(False)]

# as `observed`: more queries than a call can have
EVERY_QUERY = 1 << 30


@dataclass(frozen=True)
class Layout:
    """How a layer's slots are used (see `sparsify.ops.cache`).

    capacity: slots per KV head, all of them.
    pinned: slots that later tokens never overwrite. NEVER_OVERWRITTEN (`sparsify.ops.cache`): no token is evicted, and `capacity` is what
        the buffers hold at first.
    recent: newest tokens that stay whatever their score.
    room: slots beyond the budget, which tokens fill until the policy selects anew; 0: tokens replace others one by one.
    window: last keys that a query sees besides the sinks, 0: all that are kept.
    sinks: first tokens of each row that a window does not hide.
    rotate_sinks: sinks stand directly before the window, as positions inside the cache (arXiv 2309.17453, section 3.2).
    """

    capacity: int
    pinned: int
    recent: int
    room: int = 0
    window: int = 0
    sinks: int = 0
    rotate_sinks: bool = False

    @property
    def grows(self) -> bool:
        """Whether buffers are made larger where another policy would evict."""
        return self.pinned == NEVER_OVERWRITTEN and not self.room

    @property
    def kept(self) -> int:
        """Slots that a selection fills."""
        return self.capacity - self.room

    def with_room(self, tokens: int) -> Layout:
        """The same with room for so many tokens beyond the budget."""
        return Layout(self.capacity + tokens, NEVER_OVERWRITTEN, self.recent, room=tokens)


@dataclass(frozen=True)
class Candidates:
    """All tokens that could stay, side by side in order of position, behind what is no token.

    keys: [batch, kv_heads, candidates, head_dim].
    values: [batch, kv_heads, candidates, v_head_dim].
    positions: int32 [batch, kv_heads, candidates], -1 where there is no token (padding, empty slots).
    queries: [batch, query_heads, up to `Policy.observed`, head_dim], the last real queries of each row; None when none are asked for.
    query_positions: int32 [batch, queries], -1 where a row has fewer.
    newest: int32 [batch], position of each row's last token.
    scale: of the logits, as the layer's attention applies it.
    softcap: bound of the logits, likewise; 0: none.
    carried: fp32 [batch, kv_heads, candidates], what `Policy.carry` gave each token when the policy selected last, 0 for those that came
        since; None for policies that carry nothing, and where tokens replace others one by one.
    """

    keys: Tensor
    values: Tensor
    positions: Tensor
    queries: Tensor | None
    query_positions: Tensor | None
    newest: Tensor
    scale: float
    softcap: float
    carried: Tensor | None = None


@dataclass(frozen=True)
class LayerFacts:
    """What a policy may ask of the layer that it serves.

    index: number of the layer among those that evict, from 0.
    count: how many there are.
    inverse_frequencies: gives the angle per position of each pair that the rotary embedding turns, fp32 [rotated dimensions / 2], the first
        dimensions of a head in half-split layout. Raises UnsupportedError where the model's is not known to do that.
    kv_heads: of the layer, those of all processes; 0: not known.
    """

    index: int
    count: int
    inverse_frequencies: Callable[[], Tensor]
    kv_heads: int = 0


class Policy(BaseModel):
    """Base of all policies.

    name: by which `SparseCache`, configuration and the op know it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, strict=True)
    name: ClassVar[str]

    @property
    def observed(self) -> int:
        """How many of the last queries `score` reads; 0 for policies that read none."""
        return 0

    def bind(self, layer: LayerFacts) -> Policy:
        """The policy for one layer of a model; most are the same for all.

        Raises:
            UnsupportedError: the policy cannot serve the model.
        """
        return self

    @property
    def scorer(self) -> Policy:
        """What scores the tokens: one policy for all layers where it can be, so that compiled code of one layer serves the others."""
        return self

    @property
    def carries(self) -> bool:
        """Whether tokens keep a number from one selection to the next: `Candidates.carried`."""
        return False

    def carry(self, candidates: Candidates, scores: Tensor) -> Tensor | None:
        """What each token takes along, fp32 [batch, kv_heads, candidates], given what `score` said; also of tokens that go."""
        return candidates.carried

    @property
    def by_head(self) -> bool:
        """Whether KV heads keep different numbers of tokens, as `share` says; such policies need room (`every`)."""
        return False

    def share(self, scores: Tensor, kept: int, recent: int) -> Tensor:
        """How many tokens each KV head keeps, int [batch, kv_heads], `kept` on the mean of a row.

        Args:
            scores: fp32 [batch, kv_heads, candidates]: inf for the `recent` tokens that stay, -inf for what is no token.
        """
        raise NotImplementedError

    @property
    def awaits(self) -> bool:
        """Whether tokens are scored by what `SparseCache.observe` is told after each call; such policies need room (`every`)."""
        return False

    @property
    def scores_once(self) -> bool:
        """Whether a token's score is known only when it comes, and has to be carried from then on; such policies need room (`every`)."""
        return False

    @property
    def turns_back(self) -> bool:
        """Whether queries or keys are turned back by their places in the layer, which have to be those of the text."""
        return False

    @property
    def decay(self) -> float:
        """By which what tokens carry is multiplied after each turn."""
        return 1.0

    def layout(self, budget: int | None) -> Layout:
        """How `budget` slots per KV head are used.

        Raises:
            ConfigError: the budget is too small for what the policy must keep.
        """
        raise NotImplementedError

    def score(self, candidates: Candidates) -> Tensor:
        """Floating [batch, kv_heads, candidates], higher = keep. What it says of `recent` tokens and of -1 positions is ignored."""
        raise NotImplementedError

    def describe(self) -> str:
        """The policy as text that `parse` reads: constant in a compiled graph."""
        return json.dumps({"name": self.name, **self.model_dump(mode="json")}, sort_keys=True)

    def refuse(self, what: str, hint: str = "") -> ConfigError:
        return ConfigError(what, where=f"policy {self.name}", hint=hint)


def parse_options(text: str) -> dict[str, Any]:
    """Name and options of `Policy.describe`'s text."""
    return json.loads(text)
