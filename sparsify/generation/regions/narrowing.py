"""Lets only some tokens of a prompt go on behind a layer, or before the first one, between two calls of regions.

A method of the kind `stream` says which. Here is which one is asked for and why a call is not narrowed; what lets later layers follow,
`narrowed` has.

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
from sparsify.generation.regions import following, images, left_out, prompts, telling
from sparsify.generation.regions.caches import CACHES
from sparsify.generation.regions.layers import Layer
from sparsify.generation.regions.masks import PostponedMask
from sparsify.generation.regions.narrowed import Chosen, Narrowed
from sparsify.graph.module_paths import layer_number
from sparsify.matching.stream import StreamSite, sizes
from sparsify.planning.choose import named_methods
from sparsify.planning.config.config import Config
from sparsify.planning.decision import Decision
from sparsify.planning.method import ImagePass, Pass, Proposal
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
    telling.tell(
        Decision(path, layer_number(path), "prefill", sizes(), "", None, reason="no method acts", refusals=[refusal], kind="stream")
    )


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
        context = pipeline.context_of_call(hidden.device, self.config)
        answer = self.method.propose(site, context)
        rows: Any = longest if is_image is None else site.rows
        if not isinstance(answer, Proposal) and self.method.fits(rows):  # nothing is asked for that is not done
            if telling.is_new(self._told, "fits"):
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
        if not telling.is_new(self._told, (site.batch, site.tokens, kept)):
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

    def _record(self, decision: Decision, reason: str) -> None:
        decision.kind, decision.reason = "stream", reason
        telling.tell(decision, self._device.describe())

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
