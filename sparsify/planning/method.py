"""The base class of all methods, and what they answer with. A method's file imports from here and from `sparsify.ops`, nothing else.

A method is a frozen pydantic model whose fields are its options, so that configuration, plan files and code share one validation:

    class SinkWindow(Pass):
        name: ClassVar[str] = "sink_window"
        sinks: int = Field(4, ge=0)

        def propose(self, site, context): ...   # Proposal or Refusal, nothing changed
        def rewrite(self, editor, site): ...    # replaces site.output
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self, cast

import sympy
import torch
from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, field_validator, model_validator
from torch import Tensor, fx

from sparsify.costs import compaction, crossovers, links, work
from sparsify.costs.device import Device
from sparsify.costs.seconds import expected_density, feed_forward_in_parts_seconds, feed_forward_seconds, formula, in_units, seconds
from sparsify.costs.sizes import AttentionSizes, FeedForwardSizes
from sparsify.costs.work import Work
from sparsify.distributed.shards import Shard
from sparsify.errors import UnsupportedError
from sparsify.masks.predicate import MaskKind, MaskPredicate
from sparsify.matching.base import Site, SiteKind
from sparsify.matching.layouts import length_dim
from sparsify.matching.padded import PaddedSite
from sparsify.matching.sites import AttentionSite, CacheSite, FeedForwardSite
from sparsify.matching.stream import StreamSite
from sparsify.matching.token import TokenSite
from sparsify.ops import scratch
from sparsify.ops.limits import MOST_BLOCKS
from sparsify.planning.config.values import is_sequence
from sparsify.planning.defaults import Computed, Defaults, settle
from sparsify.rewriting.editor import Editor, attention_call, empty_row_operands
from sparsify.rewriting.last_rows import with_last_rows

# All that a method's file imports of sparsify, beside `sparsify.ops`.
__all__ = [
    "AttentionSite",
    "AttentionSizes",
    "CacheSite",
    "Computed",
    "Context",
    "Defaults",
    "Device",
    "Editor",
    "FeedForwardSite",
    "FeedForwardSizes",
    "ImagePass",
    "ImageRows",
    "MaskKind",
    "MaskPredicate",
    "PaddedSite",
    "Pass",
    "PromptPass",
    "Proposal",
    "Refusal",
    "Site",
    "SiteKind",
    "StreamSite",
    "TokenSite",
    "UnsupportedError",
    "Work",
    "attention_call",
    "compaction",
    "crossovers",
    "empty_row_operands",
    "expected_density",
    "feed_forward_in_parts_seconds",
    "feed_forward_seconds",
    "formula",
    "in_units",
    "links",
    "lists_are_large",
    "missing_layer",
    "refuse_common",
    "seconds",
    "work",
]


@dataclass(frozen=True)
class Refusal:
    """Why a method does not act on a site.

    method: its name.
    reason: in plain words.
    hint: what the user could do about it.
    """

    method: str
    reason: str
    hint: str = ""

    def __str__(self) -> str:
        return f"{self.method}: {self.reason}" + (f" ({self.hint})" if self.hint else "")


@dataclass(frozen=True)
class Proposal:
    """What a method would do at a site.

    method: with the options that it would act with.
    seconds: expected time as an expression in the site's symbolic sizes.
    density: expected share of causal blocks, None when exact.
    min_key_len: key length in tokens from which the method is expected to pay; below it the site falls to the next candidate.
    solved: whether min_key_len comes from the costs, so that a nearby length that other sites ask for does as well.
    note: for reports.
    formula: the same seconds in letters, for reports.
    scratch: bytes of memory that it needs for a while beside its operands.
    """

    method: Pass
    seconds: sympy.Expr
    density: float | None = None
    min_key_len: int = 0
    solved: bool = False
    note: str = ""
    formula: str = ""
    scratch: sympy.Expr = sympy.S.Zero

    @classmethod
    def from_work(
        cls, method: Pass, site: AttentionSite | CacheSite, context: Context, works: Callable[[AttentionSizes], Iterable[Work]], **more: Any
    ) -> Proposal:
        """A proposal for an attention site from what it would do there, as kernels one after the other."""
        text = formula(works, site.example, context.device) if context.formulas else ""
        return cls(method, seconds(works(site.sizes), context.device), formula=text, **more)


@dataclass(frozen=True)
class Context:
    """What a proposal may depend on beside its site.

    device: where the site will run.
    kernels: what will serve the custom ops, "triton" or "reference"; some of them have a family of their own.
    min_length: configured crossover in tokens; None: solve it from the costs.
    family: kernel family of the attention op, the first half of a family in a device profile.
    obstacle: why it is no faster one.
    max_cost_ratio: largest share of dense attention's time for a lossy method that acts by default.
    formulas: whether costs are wanted in letters too, which takes longer than all else.
    costs: whether expected seconds are wanted where they decide nothing. A method that is asked at every call may leave them 0 where not.
    heads: which of the model's heads the sites have, where tensor parallelism divides them; None: all.
    sequence: name of the group of processes among which the text is divided, of which sites have a part; empty: they have all of it.
    tokens: of that text.
    processes: of that group.
    """

    device: Device
    kernels: str
    min_length: int | None = None
    family: str = "triton"
    max_cost_ratio: float = crossovers.MAX_COST_RATIO
    formulas: bool = True
    costs: bool = True
    obstacle: str = ""
    heads: Shard | None = None
    sequence: str = ""
    tokens: int = 0
    processes: int = 1

    def travels(self, what: str, site: AttentionSite, size: Callable[[AttentionSizes, int], int]) -> str:
        """For notes: what a process sends in a layer of a divided text, and how many bytes at most; empty where no text is divided.

        Args:
            size: bytes, from the site's sizes over the whole text and the number of processes.
        """
        if not self.sequence:
            return ""
        sizes = dataclasses.replace(site.example, query_len=self.tokens, key_len=self.tokens)
        most = f", at most {links.shown(size(sizes, self.processes))} of {self.tokens} tokens" if sizes.numeric else ""
        return f"; {what} travel{most}"


class Pass(BaseModel):
    """Base of all methods.

    name: by which configuration and plans know it.
    lossy: whether it changes results; then it acts only where configuration or a plan enables it.
    kinds: of sites that it is asked about: "attention", "cache" (a SparseCache's layer), "ffn", "stream" (the rows behind a layer, for
        which a method has `choose` and no `rewrite`, as `sparsify.passes.token_select` shows it), "batch" (a padded batch in front of
        all layers: no `rewrite` either, as `sparsify.passes.unpad` shows it), or "token" (the layers of a generated token, for which a
        method has `bypassed`, as `sparsify.passes.skip_layers` shows it).
    across_layers: whether what it does at a site depends on the model's other layers: they are captured in one graph.
    by_head: options that may hold a number for each query head.
    lists_blocks: whether its attention goes by block lists, which are observed where a tool asks.
    defaults: of options, those that depend on what else is given.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    name: ClassVar[str]
    lossy: ClassVar[bool] = True
    kinds: ClassVar[tuple[SiteKind, ...]] = ("attention",)
    across_layers: ClassVar[bool] = False
    by_head: ClassVar[tuple[str, ...]] = ()
    lists_blocks: ClassVar[bool] = False
    defaults: ClassVar[tuple[Defaults, ...]] = ()
    _whole: Pass | None = PrivateAttr(None)

    @model_validator(mode="after")
    def _settle_defaults(self) -> Self:
        settle(self, self.defaults)
        return self

    def looks_for_sites(self, device: Device | None) -> bool:
        """Whether sites are looked for because of this method alone. device: of the graph's attention; None without any."""
        return True

    def propose(self, site: Any, context: Context) -> Proposal | Refusal | tuple[Proposal, ...]:
        """What this method would do at a site; several proposals in order of preference, the first eligible one is taken."""
        raise NotImplementedError

    def rewrite(self, editor: Editor, site: Any) -> None:
        raise NotImplementedError

    def keep_all(self) -> Pass:
        """The same method with settings under which it must equal dense; used by verification."""
        return self

    def options(self) -> dict[str, Any]:
        """As configuration and plans write them: for all heads of the model."""
        return self.for_all_heads().model_dump(mode="json")

    def for_all_heads(self) -> Self:
        """The method as it was before `of_heads`."""
        return self if self._whole is None else cast("Self", self._whole)

    def of_heads(self, heads: Shard, local: int) -> Pass:
        """The same method for the heads of one process. local: how many query heads those are."""
        given: dict[str, tuple[Any, ...]] = {name: value for name in self.by_head if isinstance(value := getattr(self, name), tuple)}
        own = {name: heads.own(value, local) for name, value in given.items()}
        if own == given:
            return self
        narrowed = self.model_copy(update=own)
        narrowed._whole = self
        return narrowed

    def for_heads_alike(self, **values: Any) -> Self:
        """The method with other values, one for all heads in every option that may hold a number for each: a process has what all have."""
        alike = self.model_copy(update=values)
        alike._whole = None
        return alike

    def misfits(self, heads: Collection[int], layers: int) -> Iterator[tuple[str, str]]:
        """Options that fit no layer of a model, each with why.

        Args:
            heads: numbers of query heads that its layers may have; empty: not known.
            layers: how many decoder layers it has; 0: not known.
        """
        shown = " or ".join(map(str, sorted(heads)))
        for name in self.by_head:
            value: Any = getattr(self, name)
            count = len(value) if is_sequence(value) else 0
            one_for_all = not is_sequence(type(self).model_fields[name].default)
            if heads and count and count not in heads and not (one_for_all and count == 1):
                yield name, f"{count} numbers for {shown} query heads: one for each{', or one for all' if one_for_all else ''}"

    @classmethod
    def kind(cls, options: dict[str, Any]) -> dict[str, Any]:
        """The options without those in which layers of one compiled region may differ."""
        return options

    def head_numbers(self) -> dict[str, tuple[float, ...]]:
        """By option, what a region takes as operands instead: a number for each query head."""
        return {}

    def density_at(self, key_len: int) -> float | None:
        """Share of a prompt's causal blocks that it is expected to visit at this length; None where nothing is known of that."""
        return None

    def refuse(self, reason: str, hint: str = "") -> Refusal:
        return Refusal(self.name, reason, hint)


def missing_layer(number: Any, layers: int) -> Iterator[tuple[str, str]]:
    """For `Pass.misfits`: that an option `layer` names none of so many layers; nothing where it does, or where that is not known."""
    if layers and isinstance(number, int) and number >= layers:
        yield "layer", f"layer {number} does not exist: the model has {layers}, from 0"


class PromptPass(Pass):
    """Base of the methods that hide keys from a prompt's rows: the last ones may see all of them, see `sparsify.rewriting.last_rows`."""

    last_rows: int = Field(
        0,
        ge=0,
        le=1 << 20,
        description="last tokens of a call whose rows see every key, as in Tri-shape (arXiv 2412.10319); of a padded batch each row's own. "
        "A call of no more rows, single tokens too, is then left to dense attention",
    )

    def refuse_last_rows(self, site: AttentionSite, context: Context) -> Refusal | None:
        """Why the last rows cannot see every key here. Asking for a symbolic number of rows installs a guard."""
        if not self.last_rows:
            return None
        if not site.mask.causal:
            return self.refuse("attention is not causal: no rows are the last ones", "set last_rows = 0")
        if site.mask.documents is not None:
            return self.refuse("the last rows of packed documents are those of one of them", "set last_rows = 0")
        if context.sequence:
            return self.refuse("the last rows of a prompt that is divided among processes are another's", "set last_rows = 0")
        length = site.query.meta["example_value"].shape[length_dim(site.layouts.query)]
        if bool(length <= self.last_rows):
            return self.refuse(f"a call of at most {self.last_rows} rows sees every key")
        beside = site.mask.window or site.bias or site.alibi_slopes is not None or site.sink_logits is not None
        if site.mask.padding is not None and beside:
            return self.refuse("the last tokens of padded rows beside a window, a bias or sink logits", "set last_rows = 0")
        return None

    def last_rows_works(self, sizes: AttentionSizes, kernel: str) -> tuple[Work, ...]:
        """Attention of the last rows over all keys."""
        return (work.attention(dataclasses.replace(sizes, query_len=self.last_rows), kernel),) if self.last_rows else ()

    @property
    def last_rows_note(self) -> str:
        return f", the last {self.last_rows} rows dense" if self.last_rows else ""

    def replace(self, editor: Editor, site: AttentionSite, output: fx.Node) -> None:
        """Replaces the site by what the method computes, its last rows computed over all keys."""
        editor.replace(site, with_last_rows(editor, site, output, self.last_rows) if self.last_rows else output)


@dataclass(frozen=True)
class ImageRows:
    """A prompt in which image tokens are to be left out.

    hidden: the residual stream, [batch, tokens, width].
    mass: fp32 [batch, query_heads, tokens], what each key gets of the last queries' attention; None where none is observed.
    is_token: bool [batch, tokens], False for padding.
    is_image: bool [batch, tokens], True for image tokens that may be left out.
    kept: tokens of each row that go on.
    """

    hidden: Tensor
    mass: Tensor | None
    is_token: Tensor
    is_image: Tensor
    kept: int


def tokens_or_share(value: int | float | None) -> int | float | None:
    """Checks a field that says how many tokens go on. Raises ValueError: a share of more than all."""
    if isinstance(value, float) and value > 1:
        raise ValueError("a share is at most 1; an integer gives tokens")
    return value


class ImagePass(Pass):
    """Base of methods that leave image tokens out of a prompt, by a rule of their own, `rank`; all other tokens go on.

    Rows of a batch go on with as many tokens as the row that needs most: another one keeps more of its images.

    layer: the decoder layer behind which they are left out, from 0; -1: before the first one. A field or a class variable.
    queries: last tokens of each row whose attention in that layer is observed; 0 where none is. A field or a class variable.
    """

    kinds: ClassVar[tuple[SiteKind, ...]] = ("stream",)
    mode: ClassVar[Literal["narrow"]] = "narrow"

    keep: int | float | None = Field(None, gt=0, description="image tokens of each row that go on; a float is a share of them")

    _share = field_validator("keep", mode="before")(tokens_or_share)

    def misfits(self, heads: Collection[int], layers: int) -> Iterator[tuple[str, str]]:
        yield from super().misfits(heads, layers)
        yield from missing_layer(getattr(self, "layer", None), layers)

    def rank(self, rows: ImageRows) -> Tensor:
        """The order in which image tokens go on: float32 [batch, tokens], finite, the highest first. Nothing else of it is looked at."""
        raise NotImplementedError

    def ranking_seconds(self, site: StreamSite, context: Context) -> float:
        """Expected seconds of `rank`, beside observing attention and gathering rows."""
        return 0.0

    def propose(self, site: StreamSite, context: Context) -> Proposal | Refusal:
        if self.keep is None:
            return self.refuse("no keep given: how many image tokens are needed depends on model and images", "name a share or a number")
        if site.layer + 1 >= site.count:
            return self.refuse(f"no layer follows layer {site.layer}")
        images = max((images for _, images in site.rows), default=0)
        if self.fits(site.rows):
            return self.refuse(f"all {images} image tokens go on" if images else "the prompt has no image tokens")
        queries: int = getattr(self, "queries", 0)
        seconds = 0.0
        if context.costs:
            seconds = site.choosing_seconds(context.device, queries, self.most(site.rows)) + self.ranking_seconds(site, context)
        behind = f"behind layer {site.layer}" if site.layer >= 0 else "before the first layer"
        note = f"{self.images_kept(images)} of {images} image tokens go on {behind}, {site.count - 1 - site.layer} layers"
        return Proposal(self, sympy.Float(seconds), note=note)

    def images_kept(self, images: int) -> int:
        """Image tokens that go on of so many in a row."""
        if self.keep is None:
            return images
        return min(images, self.keep if isinstance(self.keep, int) else math.ceil(self.keep * images))

    def most(self, rows: Sequence[tuple[int, int]]) -> int:
        """Tokens of each row that go on. rows: of each one its tokens and, of those, the image tokens."""
        return max(tokens - images + self.images_kept(images) for tokens, images in rows)

    def fits(self, rows: Sequence[tuple[int, int]]) -> bool:
        """Whether nothing is left out of these rows."""
        return self.keep is not None and (not rows or self.most(rows) >= max(tokens for tokens, _ in rows))

    def choose(self, rows: ImageRows) -> Tensor:
        """The columns that go on, int64 [batch, kept], rising."""
        order = self.rank(rows).masked_fill(~rows.is_image, torch.inf).masked_fill(~rows.is_token, -torch.inf)
        return order.topk(rows.kept, dim=-1).indices.sort(-1).values

    def keep_all(self) -> Pass:
        return self.model_copy(update={"keep": 1.0})


def lists_are_large(site: AttentionSite, block: int, width: int = MOST_BLOCKS) -> bool:
    """Whether the block lists of a site are, or may become, so large that one op makes and uses them, a part of the heads after the
    other; else they can be looked at.

    Args:
        block: tokens. width: key blocks that a list holds at most.
    """
    sizes: list[sympy.Expr] = [sympy.sympify(size) for size in (site.batch, site.query_heads, site.query_len, site.key_len)]
    if width == MOST_BLOCKS and any(size.free_symbols for size in sizes):
        return True
    longest = MOST_BLOCKS * block
    most = (1, 1, longest, longest)
    batch, heads, query_len, key_len = (bound if size.free_symbols else int(size) for size, bound in zip(sizes, most, strict=True))
    each = scratch.list_bytes(query_len, min(key_len, width * block), block)
    return batch * heads * each > scratch.LIST_BYTES


def refuse_common(method: Pass, site: AttentionSite) -> Refusal | None:
    """Reasons that hold for every attention method."""
    if site.mask.opaque:
        return method.refuse(f"the mask could not be read: {site.mask.reason}")
    if site.needs_grad:
        return method.refuse("gradients are required", "run under torch.no_grad() or torch.inference_mode()")
    if site.dropout:
        return method.refuse(f"attention dropout of {site.dropout:g}", "call model.eval()")
    if site.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return method.refuse(f"dtype {site.dtype} is not served", "use float32, float16 or bfloat16")
    return None
