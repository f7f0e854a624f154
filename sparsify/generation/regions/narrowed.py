"""A call of which some tokens go on alone behind a layer: their rows, rotary tables, positions and masks, and what its caches are told."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from sparsify import pipeline
from sparsify.errors import UnsupportedError
from sparsify.generation.regions import following, left_out
from sparsify.generation.regions.layers import Layer
from sparsify.generation.regions.left_out import NarrowedSlidingLayer
from sparsify.generation.regions.masks import PostponedMask, Recipe, groups, kinds, of_columns
from sparsify.matching.stream import StreamSite
from sparsify.planning.method import ImageRows, Proposal


class Owner(Protocol):
    """What a narrowed call asks of the model's `Narrowing`, which describes it."""

    method: Any

    @property
    def layer(self) -> int: ...

    def place(self, layer: Layer) -> str: ...

    def of_all_heads(self, mass: Tensor) -> Tensor: ...

    def tell(self, site: StreamSite, proposal: Proposal, kept: int) -> None: ...

    def refuse(self, reason: str) -> None: ...


class Chosen(Exception):
    """Ends a call that was made to choose tokens.

    columns: int64 [batch, kept], rising; None where all of them go on.
    """

    def __init__(self, columns: Tensor | None):
        super().__init__("the tokens are chosen")
        self.columns = columns


class Narrowed:
    """A call that is being narrowed: `enter` and `leave` stand around each layer.

    columns: int64 [batch, kept], rising: the tokens that go on; None until they are chosen.
    mass: what the region of the choosing layer gave, fp32 [batch, query_heads, tokens], until the choice; None where it gave nothing.
    given_up: all rows go on.

    Args:
        is_token: bool [batch, tokens], False for padding; None without any.
        is_image: bool [batch, tokens], which tokens are images that may be left out; None where all tokens may be.
        run: tokens at the end of the prompt that all go on; None where that is not known before the choice.
    """

    def __init__(
        self,
        owner: Owner,
        site: StreamSite,
        proposal: Proposal,
        hidden: Tensor,
        is_token: Tensor | None,
        is_image: Tensor | None,
        cache: Any,
        run: int | None = None,
    ):
        self.owner, self.site, self.proposal, self.is_token, self.is_image, self.cache = owner, site, proposal, is_token, is_image, cache
        self.run = run
        self.device = hidden.device
        self.columns: Tensor | None = None
        self.given_up = False
        self.mass: Tensor | None = None
        self._handed_on: Tensor | None = None
        self._groups: Tensor | None = None
        self._gathered: dict[int, tuple[Any, Any]] = {}

    def enter(self, layer: Layer, args: tuple[Any, ...], given: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The layer's arguments, those that are given by position and the others, for the rows that go on."""
        hidden = args[0] if args else given["hidden_states"]
        if layer.number and hidden is not self._handed_on:
            what = f"the model changes the residual stream before layer {layer.number}"
            if self.columns is not None:
                raise UnsupportedError(f"{what}, which is narrowed", where=self.owner.method.name, hint="choose by a later layer")
            self.give_up(what)
        if layer.number == self.owner.layer and self.owner.method.mode == "prompt":
            mask = layer.by_name(args, given).get("attention_mask")
            if why := following.mask_trouble(mask, self.site.tokens, {"causal"}):
                self.give_up(why)
        if layer.number == self.owner.layer and not self.given_up:
            self._see_ahead(layer.by_name(args, given).get("attention_mask"))
        if layer.number == 0 and self.owner.place(layer) == "behind":
            rows = self._choose(hidden)
            if args:
                args = (rows, *args[1:])
            else:
                given = {**given, "hidden_states": rows}
        if self.columns is None:
            return args, given
        rest = dict(zip(layer.arguments[1:], args[1:], strict=False))
        return args[:1], {name: self._narrow(name, value) for name, value in {**rest, **given}.items()}

    def _see_ahead(self, mask: Any) -> None:
        """Finds how far tokens of the choosing layer see that see others behind them, of an image or a prefix."""
        condition = mask.recipe.call.get("mask_function") if isinstance(mask, PostponedMask) else None
        if condition is None or kinds(condition) == {"causal"}:
            return
        found = groups(condition)
        if kinds(condition) != {"causal", "groups"} or len(found) != 1:
            self.give_up("the mask says more than causality, padding and groups of tokens that see each other")
            return
        self._groups = found[0].to(self.device).expand(self.site.batch, -1)[:, : self.site.tokens]
        if not bool(following.side_by_side(self._groups)):
            self._groups = None
            self.give_up("tokens that see each other to both sides do not stand side by side")

    def take_back(self) -> None:
        """The call ends before a layer has run, and may begin again elsewhere."""
        if self.cache is not None and self.columns is not None:
            left_out.forget(self.cache)

    def _choose(self, hidden: Tensor) -> Tensor:
        """The rows of the residual stream that go on, [batch, kept, width]."""
        method, mass = self.owner.method, None if self.mass is None else self.owner.of_all_heads(self.mass)
        if self.is_image is None:
            columns: Tensor = method.choose(mass, self.is_token, self.site.longest)
        else:
            is_token = torch.ones_like(self.is_image) if self.is_token is None else self.is_token
            columns = method.choose(ImageRows(hidden, mass, is_token, self.is_image, method.most(self.site.rows)))
        self.owner.tell(self.site, self.proposal, columns.shape[1])
        if method.mode == "prompt":
            raise Chosen(columns)
        if self.cache is not None:
            # the host waits for the choice where padding may stand behind a row's last token
            run = _last_run(columns, self.site.tokens) if self.run is None else min(self.run, columns.shape[1])
            left_out.narrow(self.cache, self.owner.layer + 1, self.site.tokens, columns, run)
        self.columns, self.mass = columns, None
        return _gather_rows(hidden, columns)

    def part(self, layer: Layer) -> str:
        """Of which part of the call the layer's region is, as `Narrowing.place` names it; empty for a region that serves all calls. Layers
        before and behind the choice run the same code, and are told apart where sizes are to be shown."""
        place = self.owner.place(layer)
        return place if not self.given_up and (place == "chooses" or pipeline.costs_beside.get()) else ""

    def observation(self, layer: Layer) -> dict[str, Tensor]:
        """What the region of the layer that chooses needs to know of the call: `columns` of the last queries, int64 [batch, queries], their
        `query_positions` and all `positions`, int32, -1 for what is no token. Empty for other layers."""
        if layer.number != self.owner.layer or self.given_up:
            return {}
        batch, tokens, device = self.site.batch, self.site.tokens, self.device
        at = torch.arange(tokens, device=device).expand(batch, tokens)
        queries = min(self.owner.method.queries, tokens)
        if self.is_token is None:
            columns = at[:, -queries:].contiguous()
            return {"columns": columns, "query_positions": self._reach(columns, at).int(), "positions": at.int().contiguous()}
        positions = (self.is_token.cumsum(-1) - 1).masked_fill(~self.is_token, -1).int()
        order = self.is_token.to(torch.uint8).argsort(dim=-1, descending=True, stable=True)
        places = self.is_token.sum(-1, keepdim=True) - queries + torch.arange(queries, device=device)
        columns = order.gather(1, places.clamp(min=0))
        seen = places if self._groups is None else torch.where(places < 0, places, self._reach(columns, positions))
        return {"columns": columns, "query_positions": seen.clamp(min=-1).int(), "positions": positions}

    def _reach(self, columns: Tensor, positions: Tensor) -> Tensor:
        """Up to which position tokens see, those of an image up to its end: int64 [batch, queries].

        Args:
            columns: int64 [batch, queries]. positions: [batch, tokens].
        """
        own = positions.gather(1, columns).long()
        if self._groups is None:
            return own
        group = self._groups.gather(1, columns)
        alike = (self._groups[:, None] == group[:, :, None]) & (group[:, :, None] >= 0)
        return torch.maximum(own, positions[:, None].masked_fill(~alike, -1).amax(-1))

    def leave(self, layer: Layer, result: Any) -> Any:
        """The layer's result: behind the one that chooses narrowed, behind the last one as long as the prompt again."""
        hidden = result[0] if type(result) is tuple else result
        if layer.number == self.owner.layer and not self.given_up:
            if self.mass is None:
                self.give_up("its attention does not tell what its queries look at")
            else:
                hidden = self._choose(hidden)
        if self.columns is not None and self.cache is not None and self.owner.place(layer) == "behind":
            held_by = self.cache.layers[layer.number]
            if isinstance(held_by, NarrowedSlidingLayer):
                held_by.spread(self.site.tokens)
        if self.columns is not None and layer.number + 1 == self.site.count:
            full = hidden.new_full((hidden.shape[0], self.site.tokens, hidden.shape[2]), torch.nan)
            hidden = full.scatter_(1, self.columns[:, :, None].expand_as(hidden), hidden)
            self._gathered.clear()
        self._handed_on = hidden
        return (hidden, *result[1:]) if type(result) is tuple else hidden

    def give_up(self, reason: str) -> None:
        """All rows go on, in this call."""
        if not self.given_up:
            self.given_up = True
            self.owner.refuse(reason)
            if self.owner.method.mode == "prompt":
                raise Chosen(None)

    def _narrow(self, name: str, value: Any) -> Any:
        found = self._gathered.get(id(value))
        if found is None:  # kept beside the value, so that no other object takes its id
            found = self._gathered[id(value)] = (value, self._made_narrow(name, value))
        return found[1]

    def _made_narrow(self, name: str, value: Any) -> Any:
        columns = self.columns
        assert columns is not None
        if isinstance(value, PostponedMask):
            return self._narrow_mask(value, columns)
        if name == "position_embeddings":
            return tuple(_gather_rows(table, columns) for table in value)
        if name in ("attention_mask", "position_ids", "cache_position") and isinstance(value, Tensor):
            if value.dim() == 1:
                return value[columns[0]]
            return _same_kind_of_view(value.expand(columns.shape[0], -1).gather(1, columns), value)
        return value

    def _narrow_mask(self, mask: PostponedMask, columns: Tensor) -> PostponedMask | None:
        kept, call = columns.shape[1], dict(mask.recipe.call)
        call["q_length"], call["kv_length"] = kept, kept
        if call.get("attention_mask") is not None:
            call["attention_mask"] = call["attention_mask"].gather(1, columns)
        recipe = Recipe(mask.recipe.function, call)
        if kinds(call.get("mask_function")) != {"causal"}:  # causality of places is that of their order, and nothing else is
            recipe = of_columns(recipe, 0, columns)
        return PostponedMask(recipe, (*mask.shape[:2], kept, kept), mask.dtype, mask.device)


def _last_run(columns: Tensor, tokens: int) -> int:
    """Tokens at the end of a prompt between which no row of columns, int64 [batch, kept], has a gap. The host waits for it."""
    ends = torch.arange(tokens - columns.shape[1], tokens, device=columns.device)
    return int((columns == ends).flip(-1).int().cumprod(-1).sum(-1).min())


def _gather_rows(rows: Tensor, columns: Tensor) -> Tensor:
    """Rows [batch or 1, tokens, width] at columns [batch, kept]."""
    rows = rows.expand(columns.shape[0], *rows.shape[1:])
    return rows.gather(1, columns[:, :, None].expand(-1, -1, rows.shape[2]))


def _same_kind_of_view(made: Tensor, like: Tensor) -> Tensor:
    """The same numbers, [batch, kept], as a view where `like` is one: Dynamo guards on what a view is of, and would compile again."""
    base = like._base
    if base is None:
        return made
    return made[0].clone()[None] if base.dim() == 1 and made.shape[0] == 1 else made.view(made.shape)
