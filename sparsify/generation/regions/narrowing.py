"""Lets only some tokens of a prompt go on behind a layer, or before the first one, between two calls of regions.

A method of the kind `stream` says which. Here is what lets later layers follow: rows of the residual stream, rotary tables, positions,
masks and caches of a narrowed call, and why a call is not narrowed.

Rows keep their order and their rotary angles, so that causality among them is causality of their places. Whatever counts positions
otherwise is refused before a layer has run.
"""

from __future__ import annotations

import contextlib
import contextvars
import copy
import dataclasses
import logging
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicLayer

from sparsify import pipeline
from sparsify.costs import device as hardware
from sparsify.costs.sizes import AttentionSizes
from sparsify.distributed import collectives
from sparsify.distributed.shards import Shard
from sparsify.errors import UnsupportedError
from sparsify.generation.regions import following, images, left_out, prompts
from sparsify.generation.regions.caches import CACHES
from sparsify.generation.regions.layers import Layer
from sparsify.generation.regions.left_out import NarrowedSlidingLayer
from sparsify.generation.regions.masks import PostponedMask, Recipe, groups, kinds, of_columns
from sparsify.graph.module_paths import layer_number
from sparsify.matching.stream import StreamSite, sizes
from sparsify.planning.choose import named_methods
from sparsify.planning.config.config import Config
from sparsify.planning.decision import Decision
from sparsify.planning.method import ImagePass, ImageRows, Pass, Proposal
from sparsify.planning.plan import Plan
from sparsify.planning.saved_plan import SavedPlan

log = logging.getLogger(__name__)

# which columns of a call of this shape, (batch, tokens), stand for images, bool [batch, tokens]; None, and why that is not known
FindImages = Callable[[tuple[int, ...]], tuple[Tensor | None, str]]

# set while a prompt is read in parts, whose last rows are not the question
_in_parts: contextvars.ContextVar[bool] = contextvars.ContextVar("sparsify_in_parts", default=False)


# what a call of a model is for, whose method reads the chosen tokens anew, "" where nobody says; and how it chooses, where not as asked
_reading: contextvars.ContextVar[tuple[Literal["", "choosing", "anew"], Pass | None]] = contextvars.ContextVar(
    "sparsify_reading", default=("", None)
)


class Chosen(Exception):
    """Ends a call that was made to choose tokens.

    columns: int64 [batch, kept], rising; None where all of them go on.
    """

    def __init__(self, columns: Tensor | None):
        super().__init__("the tokens are chosen")
        self.columns = columns


@contextlib.contextmanager
def reading(what: Literal["", "choosing", "anew"], method: Pass | None = None) -> Generator[None]:
    """Within the block a call chooses tokens and ends by `Chosen`, or reads those that were chosen.

    Args:
        method: chooses instead of the model's, by the same layer.
    """
    token = _reading.set((what, method))
    try:
        yield
    finally:
        _reading.reset(token)


@contextlib.contextmanager
def reading_in_parts(parts: bool) -> Generator[None]:
    """Within the block a call may hold a part of a prompt only: none is narrowed."""
    token = _in_parts.set(parts)
    try:
        yield
    finally:
        _in_parts.reset(token)


def asked(config: Config, saved: SavedPlan | None = None, paths: Sequence[str] = ()) -> Pass | None:
    """The method of the kind `stream` that configuration or plan file asks for, None without one.

    Args:
        saved: the plan file, which decides where it is given.
        paths: of the layers, by number; rules may leave the method out of its layer.
    """
    return next(iter(all_asked(config, saved, paths)), None)


def all_asked(config: Config, saved: SavedPlan | None = None, paths: Sequence[str] = ()) -> list[Pass]:
    """The same, and others that are asked for beside it, which cannot act."""
    if config.exact:
        return []
    methods = {name: method for name, method in named_methods(config).items() if "stream" in method.kinds}
    if saved is not None:
        found = [d for d in saved.plan.rewritten if d.kind == "stream" and d.method in methods]
        return [methods[str(decision.method)](**decision.options) for decision in found]
    chosen: list[Pass] = []
    for name in methods:
        field = methods[name].model_fields.get("layer")
        number = config.methods.get(name, {}).get("layer", None if field is None else field.default)
        path = paths[number] if isinstance(number, int) and number < len(paths) else ""
        chosen += [methods[one](**options) for one, options in config.for_layer(path, number if path else None, {name})]
    return chosen


def refuse(config: Config, method: Pass, reason: str, hint: str = "", path: str = "") -> None:
    """Says why a prompt is not narrowed. path: of the layer that would choose, where it is known.

    Raises:
        UnsupportedError: under `strict`.
    """
    if config.strict:
        raise UnsupportedError(reason, where=method.name, hint=hint)
    refusal = str(method.refuse(reason, hint))
    log.warning("%s", refusal)
    _record(Decision(path, layer_number(path), "prefill", sizes(), "", None, reason="no method acts", refusals=[refusal], kind="stream"))


def _record(decision: Decision, device: str = "") -> None:
    if (plans := pipeline.collector.get()) is not None:
        plans.append(Plan([decision], device=device, serves=1))


def counting_places(text: Any, numbers: Iterable[int], windows: Iterable[int] = ()) -> str:
    """Why rows cannot be left out of some layers, by a text configuration; empty where nothing in it speaks against it.

    Args:
        windows: of these layers, those that may have a sliding window, which keeps a place for what is left out.
    """
    types, kept = getattr(text, "layer_types", None), set(windows)
    for number in numbers:
        if types is not None and types[number] == "sliding_attention" and number in kept:
            continue
        if types is not None and types[number] != "full_attention":
            return f"layer {number} is one of {types[number].replace('_', ' ')}, which counts places that are left out"
    window = next((name for name in ("sliding_window", "attention_chunk_size") if getattr(text, name, None)), None)
    if types is None and window is not None:
        return f"layers have a {window.replace('_', ' ')}, which counts places that are left out"
    return ""


class Narrowing:
    """How a model narrows its prompts.

    Args:
        model: in transformers' form.
        layers: its decoder layers.
        method: of the kind `stream`; `method.layer` is the one that chooses, -1 stands for what lies before the first one.
        beside: other such methods, which do not act beside it.
        heads: which of the heads are this process's, where tensor parallelism divides them.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[Layer],
        config: Config,
        method: Any,
        beside: Sequence[Pass] = (),
        heads: Shard | None = None,
    ):
        self.layers, self.config, self.method, self.beside, self.heads = layers, config, method, beside, heads
        self.text = cast(Any, model.config).get_text_config(decoder=True)
        self.obstacle = "" if method.layer is None else self._obstacle(layers[max(method.layer, 0) :])
        if isinstance(self.method, ImagePass):
            self.obstacle = images.added_later(model.config) or self.obstacle
        matrices = [tuple((p.shape[1], p.shape[0]) for p in layer.module.parameters() if p.dim() == 2) for layer in layers]
        at = (method.layer or 0) + 1
        self.earlier, self.matrices = tuple(matrices[:at]), tuple(matrices[at:])
        self._told: set[Any] = set()
        self._device = hardware.describe(torch.device("cpu"))

    @property
    def layer(self) -> int:
        """Number of the layer that chooses; -1 before the first one, or where none is named."""
        return -1 if self.method.layer is None else self.method.layer

    def place(self, layer: Layer) -> str:
        """Where a layer stands: "before" the one that "chooses", or "behind" it."""
        return "chooses" if layer.number == self.layer else "before" if layer.number < self.layer else "behind"

    def of_all_heads(self, mass: Tensor) -> Tensor:
        """What keys get by head, [batch, query_heads, tokens], of the whole model's heads: all processes choose the same tokens."""
        if self.heads is None or self.heads.size == 1:
            return mass
        return collectives.gathering(mass, self.heads.size, self.heads.group)().movedim(0, 1).flatten(1, 2)

    def _obstacle(self, later: Sequence[Layer]) -> str:
        """Why rows cannot be left out before these layers, from their structure; empty where they can. The first of them chooses."""
        if self.method.mode == "prompt":  # later layers read a prompt like any other
            return counting_places(self.text, [layer.number for layer in later[:1]])
        numbers = [layer.number for layer in later]
        if why := counting_places(self.text, numbers, numbers if self.layer < 0 else numbers[1:]):
            return why
        for layer in later:
            if mixing := [type(part).__name__ for part in layer.module.modules() if isinstance(part, nn.modules.conv._ConvNd)]:
                return f"layer {layer.number} mixes neighbouring tokens ({mixing[0]})"
        return ""

    def begin(self, hidden: Tensor, given: Mapping[str, Any], shows_rows: bool, find_images: FindImages) -> Narrowed | None:
        """Called before the first layer of a call runs, with its arguments. None where the call is not narrowed.

        Args:
            shows_rows: the caller gets what each layer gave, for all rows.
            find_images: `images.find` for this call, of the stream's shape.

        Raises:
            UnsupportedError: it cannot be, under `strict`.
            Chosen: the call was made to choose, and all tokens go on.
        """
        what, method = _reading.get()
        if self.method.mode == "prompt" and what != "choosing":
            if hidden.shape[1] > 1 and not what:
                self.refuse("tokens that are read anew are so by generate()", "mode = 'narrow' serves calls of the model")
            return None
        chooser = self
        if method is not None:
            chooser = copy.copy(self)
            chooser.method = method
        narrowed = chooser._begin(hidden, given, shows_rows, find_images)
        if narrowed is None and self.method.mode == "prompt":
            raise Chosen(None)
        return narrowed

    def _begin(self, hidden: Tensor, given: Mapping[str, Any], shows_rows: bool, find_images: FindImages) -> Narrowed | None:
        cache = next((given[name] for name in CACHES if given.get(name) is not None), None)
        if hidden.shape[1] == 1 or (cache is not None and not prompts.is_empty(cache)):
            return None
        if cache is not None:
            left_out.forget(cache)
        for other in self.beside:
            self.refuse(f"{self.method.name} chooses already which tokens go on", "name one of them", other)
        if _in_parts.get():
            return self.refuse("a prompt that is read in parts: the last rows of a part are not the question")
        if shows_rows:
            return self.refuse("the hidden states of all rows are asked for")
        is_token = _tokens_of(given.get("attention_mask"), hidden.shape[1])
        counts = None if is_token is None else is_token.sum(-1)
        longest = hidden.shape[1] if counts is None else int(counts.max())
        site, is_image = self._site(hidden, longest), None
        run = self.method.window if is_token is None and not isinstance(self.method, ImagePass) else None
        if isinstance(self.method, ImagePass):
            is_image, reason = find_images(tuple(hidden.shape[:2]))
            if is_image is None:
                return self.refuse(reason)
            is_image = _may_be_left_out(is_image, is_token)
            lengths = [longest] * site.batch if counts is None else counts.tolist()
            images_in, end = _count_images(is_image)
            site = dataclasses.replace(site, rows=tuple(zip(lengths, images_in, strict=True)))
            run = hidden.shape[1] - end if is_token is None else None
        context = dataclasses.replace(pipeline.make_context(hidden.device, self.config), formulas=False)
        answer = self.method.propose(site, context)
        rows: Any = longest if is_image is None else site.rows
        if not isinstance(answer, Proposal) and self.method.fits(rows):  # nothing is asked for that is not done
            if self._is_new("fits"):
                self._record(self._decision(site, longest), answer.reason)
            return None
        if reason := self.obstacle or self._trouble(hidden, given, cache):
            return self.refuse(reason)
        if not isinstance(answer, Proposal):
            return self.refuse(answer.reason, answer.hint)
        dynamic = cache is not None and isinstance(cache.layers[self.layer + 1], DynamicLayer)
        if counts is not None and dynamic and int(counts.min()) < self.method.most(rows):
            return self.refuse("a row has fewer tokens than are kept, and an ordinary cache does not know its padding")
        return Narrowed(self, site, answer, hidden, is_token, is_image, cache, run)

    def refuse(self, reason: str, hint: str = "", method: Pass | None = None) -> None:
        """method: that is refused, where it is another one than what narrows."""
        if self.config.strict or reason not in self._told:
            self._told.add(reason)
            path = self.layers[self.layer].path if 0 <= self.layer < len(self.layers) else ""
            refuse(self.config, method or self.method, reason, hint, path)

    def tell(self, site: StreamSite, proposal: Proposal, kept: int) -> None:
        """Records that a call was narrowed, once for each number of tokens. Later layers' sites count as they run, over fewer rows: what
        they are spared counts here."""
        if not self._is_new((site.batch, site.tokens, kept)):
            return
        spared = site.later_seconds(self._device, site.tokens) - site.later_seconds(self._device, kept)
        if self.method.mode == "prompt":  # the layers up to the one that chooses read what was chosen, too
            earlier = dataclasses.replace(site, matrices=self.earlier)
            spared -= earlier.later_seconds(self._device, kept)
        decision = self._decision(site, kept)
        decision.method, decision.options = self.method.name, self.method.options()
        decision.seconds, decision.dense_seconds = float(proposal.seconds), spared
        self._record(decision, proposal.note)

    def _decision(self, site: StreamSite, kept: int) -> Decision:
        """That nothing is left out, of a stream of which so many tokens go on."""
        return Decision(site.name, None if site.layer < 0 else site.layer, "prefill", sizes(site, kept), "", None)

    def _is_new(self, key: Any) -> bool:
        """Whether nobody was told of this yet; from now on somebody was."""
        known = key in self._told
        self._told.add(key)
        return not known

    def _record(self, decision: Decision, reason: str) -> None:
        decision.kind, decision.reason = "stream", reason
        _record(decision, self._device.describe())

    def _site(self, hidden: Tensor, longest: int) -> StreamSite:
        (batch, tokens, width), before = hidden.shape, isinstance(self.method, ImagePass) and self.layer < 0
        number = -1 if before else max(self.layer, 0)
        self._device = pipeline.make_context(hidden.device, self.config).device
        heads = int(self.text.num_attention_heads)
        head_dim = int(getattr(self.text, "head_dim", None) or width // heads)
        attention = AttentionSizes(
            batch=batch,
            query_heads=heads,
            kv_heads=int(getattr(self.text, "num_key_value_heads", None) or heads),
            query_len=tokens,
            key_len=tokens,
            qk_head_dim=head_dim,
            v_head_dim=head_dim,
            dtype=hidden.dtype,
        )
        path = self.layers[0].path.rpartition(".")[0] if before else self.layers[number].path if number < len(self.layers) else ""
        return StreamSite(path, number, len(self.layers), batch, tokens, longest, attention, width, self.matrices)

    def _trouble(self, hidden: Tensor, given: Mapping[str, Any], cache: Any) -> str:
        """Why this call cannot be narrowed; empty where it can."""
        if torch.is_grad_enabled() and hidden.requires_grad:
            return "gradients are required"
        if cache is not None and (why := following.cache_trouble(cache, self.layer)):
            return why
        tokens = hidden.shape[1]
        if self.method.mode == "prompt":  # a mask of the first layer says nothing about the one that chooses
            mask = given.get("attention_mask")
            return "" if isinstance(mask, PostponedMask) else following.mask_trouble(mask, tokens, {"causal"})
        tables = given.get("position_embeddings")
        if not prompts.is_rotary(tables, tokens):
            return "its layers are not given rotary tables, one angle for each token"
        for name, value in given.items():
            if name == "attention_mask":
                if why := following.mask_trouble(value, tokens, {"causal", "window", "groups"}):
                    return why
            elif name == "position_ids" or name == "cache_position":
                if isinstance(value, Tensor) and (
                    value.dim() > 2 or value.shape[-1] != tokens or (value.dim() == 1 and hidden.shape[0] > 1)
                ):
                    return f"its layers are given {name} in a form that is not known"
            elif name not in ("position_embeddings", "hidden_states") and prompts.holds_tensors(value):
                return f"its layers are given {name}, of which it is not known what belongs to which token"
        return ""


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
        owner: Narrowing,
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
            mask = {**dict(zip(layer.arguments, args, strict=False)), **given}.get("attention_mask")
            if why := following.mask_trouble(mask, self.site.tokens, {"causal"}):
                self.give_up(why)
        if layer.number == self.owner.layer and not self.given_up:
            self._see_ahead({**dict(zip(layer.arguments, args, strict=False)), **given}.get("attention_mask"))
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


def _tokens_of(mask: Any, tokens: int) -> Tensor | None:
    """Which columns hold a token, as `prompts.find_tokens`; None too where a mask has another form, which is refused."""
    padding = mask.recipe.call.get("attention_mask") if isinstance(mask, PostponedMask) else mask
    return prompts.find_tokens(padding, tokens) if type(padding) is Tensor and padding.dim() == 2 and padding.shape[1] == tokens else None


def _may_be_left_out(is_image: Tensor, is_token: Tensor | None) -> Tensor:
    """Image tokens, bool [batch, tokens], but for each row's last token, whose logits are asked for."""
    columns = torch.arange(is_image.shape[1], device=is_image.device)
    last = (columns if is_token is None else columns * is_token).amax(-1, keepdim=True)
    return is_image & (columns != last) if is_token is None else is_image & is_token & (columns != last)


def _count_images(is_image: Tensor) -> tuple[list[int], int]:
    """How many tokens of each row are set in bool [batch, tokens], and behind which column none is. The host waits for it, once."""
    places = torch.arange(1, is_image.shape[1] + 1, device=is_image.device)
    counts, ends = torch.stack((is_image.sum(-1), (places * is_image).amax(-1))).tolist()
    return counts, max(ends, default=0)


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
