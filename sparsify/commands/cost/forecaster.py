"""Prefill and decode time, memory and the choice by prompt length, from a model's configuration alone.

The sites of every length are those that the compiler would see (`sparsify.commands.cost.meta_model`), and the methods that it would ask
make the choice (`sparsify.planning.choose`), so that a forecast and a compilation cannot disagree. What lies between the sites is counted
from parameters.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from sparsify import policies
from sparsify.commands.cost import exchanged
from sparsify.commands.cost.meta_model import AnySite, CallSites, MetaModel, PromptAndToken, Weights, resized
from sparsify.commands.cost.records import DECODE, PREFILL, Crossover, Forecast, Group, Memory, Row, Seconds, Side
from sparsify.costs import work
from sparsify.costs.links import ALONE, Sharing
from sparsify.costs.seconds import SMALL_KERNELS, STEP_LAUNCHES, attention_seconds, linear_seconds, seconds
from sparsify.generation.regions import bypass, narrowing
from sparsify.matching.base import Site, SiteKind
from sparsify.matching.sites import CacheSite
from sparsify.matching.stream import StreamSite
from sparsify.matching.token import TokenSite
from sparsify.ops.limits import cdiv
from sparsify.planning.choose import acts_on, make_plan
from sparsify.planning.config.config import Config
from sparsify.planning.decision import Decision, Place, places
from sparsify.planning.method import Context, ImagePass, Proposal
from sparsify.planning.registry import discover
from sparsify.planning.saved_plan import load_saved_plan

# Launches with which a prompt's store chooses and copies, without scores and with them: what a layer takes on an H200 whatever its length.
_STORE_LAUNCHES = (30, 90)
# Observed queries whose logits cost no more than reading the keys, which is counted.
_FEW_QUERIES = 64


Decided = list[tuple[Any, Decision]]  # the sites of one call, each with what would be decided for it


def of_kind(decided: Decided, *kinds: SiteKind) -> Decided:
    return [(site, decision) for site, decision in decided if site.kind in kinds]


@dataclass(frozen=True)
class _LayerShape:
    """Of one layer: widths of all query heads and of all KV heads, of the feed-forward part for one token, and the matrices of a
    feed-forward block that the compiler reads."""

    query_width: int = 0
    kv_width: int = 0
    intermediate: int = 0
    blocks: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class Narrowed:
    """A prompt of which `kept` tokens of each row go on behind a layer. seconds: of choosing them."""

    layer: int
    kept: int
    seconds: float
    group: Group

    def applied(self, calls: PromptAndToken, length: int) -> PromptAndToken:
        """The calls of a prompt of `length` tokens in which later layers have the kept ones alone."""
        fewer = resized(calls, length, self.kept)

        def later(call: CallSites, few: CallSites) -> CallSites:
            kinds: list[Any] = [
                tuple(new if (old.layer or 0) > self.layer else old for old, new in zip(olds, news, strict=True))
                for olds, news in zip(call.by_kind, few.by_kind, strict=True)
            ]
            return dataclasses.replace(call, attention=kinds[0], cache=kinds[1], feed_forward=kinds[2])

        size = lambda layer, full: full if layer <= self.layer else full * self.kept // length
        held = tuple(size(layer, full) for layer, full in enumerate(calls.cache_bytes))
        return PromptAndToken(later(calls.prefill, fewer.prefill), later(calls.decode, fewer.decode), held)


@dataclass
class Forecaster:
    """Asks for a model what `config` would do on a device. cache: for budgets, makes a SparseCache from the model's configuration.

    images: image tokens of each prompt.
    sharing: how GPUs share the model; times and memory are those of one of them. What is chosen is what one GPU alone would choose.
    """

    model: MetaModel
    config: Config
    context: Context
    batch: int = 1
    make_cache: Callable[[Any], Any] | None = None
    sharing: Sharing = ALONE
    images: int = 0
    _plans: dict[Any, Decision] = field(default_factory=dict)
    _captured: dict[Any, dict[int, PromptAndToken]] = field(default_factory=dict)
    _shapes: dict[int, _LayerShape] = field(default_factory=dict)
    _latent: int = 0  # width of what a cache holds instead of keys and values, which each call rebuilds from it

    def __post_init__(self) -> None:
        exact = {"passes": ("dense",), "rules": (), "plan": None, "exact": True, "objective": None, "max_error": None, "methods": {}}
        self.exact = self.config.model_copy(update=exact)
        self.context = dataclasses.replace(self.context, formulas=False)
        self._linear = functools.cache(self._linear_seconds)

    def forecast(self, lengths: Iterable[int], cache: str = "", notes: Iterable[str] = ()) -> Forecast:
        """Raises UnsupportedError where the model or its cache cannot be captured."""
        if self.sharing.size > 1:
            notes = (*notes, *exchanged.notes(self.context.device))
        lengths = tuple(lengths)
        plain = self._calls(lengths, None)
        kept = self._calls(lengths, self.make_cache)
        first = next(iter(plain))
        self._shapes = self._layer_shapes(plain[first].prefill)
        self._latent = self._cached_latent(plain[first], first)
        rows = tuple(Row(n, self._side(plain[n], n, self.exact), self._side(kept[n], n, self.config)) for n in plain)
        device = self.context.device
        return Forecast(
            model=self.model.name,
            parameters=self.model.parameters,
            dtype=str(self.model.dtype).removeprefix("torch."),
            batch=self.batch,
            device=device.name,
            source=device.source,
            measured=device.measured,
            cache=cache,
            layers=len(self.model.kinds),
            rows=rows,
            crossovers=tuple(crossovers(self, kept)),
            notes=(*self.model.assumptions, *notes, *self._remarks(plain)),
            gpus=self.sharing.size,
            sharing=str(self.sharing),
        )

    def shared(self, sharing: Sharing) -> Forecaster:
        """The same of a model that GPUs share so; what was captured and planned is not captured and planned again."""
        return dataclasses.replace(self, sharing=sharing)

    def kv_heads(self, lengths: tuple[int, ...]) -> int:
        """The fewest KV heads of an attention in a prompt, which processes can share; 0 where there is none."""
        call = self._calls(lengths, None)[lengths[0]].prefill
        return min((int(site.kv_heads) for site in call.attention), default=0)

    def _calls(self, lengths: tuple[int, ...], make_cache: Callable[[Any], Any] | None) -> dict[int, PromptAndToken]:
        key = lengths, make_cache is None
        if key not in self._captured:
            self._captured[key] = self.model.at_lengths(lengths, self.batch, make_cache)
        return self._captured[key]

    def decide(self, call: CallSites, config: Config) -> Decided:
        """What the compiler would decide for every site of a call. Sites that differ in their name alone are planned once."""
        sites: list[AnySite] = [*call.attention, *call.cache, *(call.feed_forward if acts_on("ffn", config, self.context.device) else ())]
        found: Decided = []
        for site, at in zip(sites, places(sites), strict=True):
            asked = self.asked(site, config, at)
            sizes = (site.query_len, site.planned_length)
            assert site.layer is not None  # the meta model refuses a site outside of layers
            key = repr((config is self.exact, site.kind, self.model.kinds[site.layer], sizes, site.position, asked))
            if key not in self._plans:
                self._plans[key] = make_plan([site], config, self.context, [at])[0].decisions[0]
            found.append((site, dataclasses.replace(self._plans[key], site=site.name, layer=site.layer, ordinal=at.ordinal)))
        return found

    def asked(self, site: AnySite, config: Config, at: Place) -> Any:
        """What the configuration says of a site's place in the model."""
        return config.for_layer(site.name, site.layer, ordinal=at.ordinal), at if config.plan else ""

    # -- one length --------------------------------------------------------------------------------------------------------------------

    def _side(self, calls: PromptAndToken, length: int, config: Config) -> Side:
        narrowed = self._narrowed(calls.prefill, length, config)
        if narrowed is not None:
            calls = narrowed.applied(calls, length)
        prefill = self.decide(calls.prefill, config)
        decode = self.decide(filled(calls.decode, length), config)
        beside = max((_scratch(*one) for one in of_kind(prefill, "attention", "cache")), default=0) // self.sharing.tp
        scratch = self._activations(length, prefill) + beside + exchanged.scratch(self._attentions(prefill), self.sharing)
        memory = Memory(self.model.weight_bytes // self.sharing.tp, sum(calls.cache_bytes) // self.sharing.size, scratch)
        groups = (*grouped(PREFILL, prefill, length, self.context), *grouped(DECODE, decode, length + 1, self.context))
        if narrowed is not None:
            groups = (*groups, narrowed.group)
        if (skipping := self._bypassed(calls.decode, length, config)) is not None:
            groups = (*groups, skipping)
            gone = {*skipping.layers}
            decode = [(site, decision) for site, decision in decode if site.layer not in gone]
        bypassed = () if skipping is None else skipping.layers
        times = self._seconds(prefill, length, length, narrowed), self._seconds(decode, 1, length + 1, narrowed, bypassed)
        return Side(*times, memory, groups, exchanged.sent(self._attentions(prefill), self.sharing, self._stream_bytes(length)))

    def _narrowed(self, call: CallSites, length: int, config: Config) -> Narrowed | None:
        """What becomes of a prompt of which only some tokens go on behind a layer; None where all do, or the text decides how many."""
        count = len(self.model.kinds)
        names = {site.layer: site.name for site in call.attention}
        paths = [names.get(layer, "").partition(f".{layer}.")[0] + f".{layer}" for layer in range(count)]
        method: Any = narrowing.asked(config, load_saved_plan(config.plan), paths)
        if method is None or method.mode == "prompt" or self.sharing.cp > 1:
            return None
        number: int | None = method.layer  # -1: before the first layer
        if number is None:
            return None
        first = max(number, 0)
        site = next((one for one in call.attention if one.layer == first), None)
        if site is None or narrowing.counting_places(self.model.config, range(first, count)):
            return None
        sizes = dataclasses.replace(site.sizes, query_len=length, key_len=length, dtype=self.model.dtype)
        stream = StreamSite(site.name, number, count, self.batch, length, length, sizes, self.model.hidden, ())
        asked: Any = length
        if isinstance(method, ImagePass):  # the last token is text
            asked = ((length, min(self.images, length - 1)),) * self.batch
            stream = dataclasses.replace(stream, rows=asked)
        proposal = method.propose(stream, self.context)
        if not isinstance(proposal, Proposal) or (kept := method.most(asked)) >= length:
            return None
        sees = f"{kept} tokens from it on" if number < 0 else f"{kept} tokens behind it"
        group = Group(PREFILL, "stream", (first,), sees, method.name, proposal.note)
        return Narrowed(number, kept, float(proposal.seconds), group)

    def _bypassed(self, call: CallSites, length: int, config: Config) -> Group | None:
        """The layers that generated tokens bypass at their schedule's end; None where they run all of them."""
        site = next((one for one in call.attention or call.cache if one.layer == 0), None)
        method: Any = None if site is None else bypass.asked(config, load_saved_plan(config.plan), site.name.partition(".0.")[0])
        if site is None or method is None or self.sharing.cp > 1:
            return None
        sizes = dataclasses.replace(site.sizes, query_len=1, key_len=length + 1, dtype=self.model.dtype)
        proposal = method.propose(TokenSite(site.name, sizes, tuple(one.matrices for one in self.model.layers)), self.context)
        end = method.bypassed(method.warmup + method.length, len(self.model.layers))
        if not isinstance(proposal, Proposal) or narrowing.counting_places(self.model.config, end):
            return None
        return Group(DECODE, "token", tuple(end), "bypassed", method.name, proposal.note)

    def _seconds(self, decided: Decided, tokens: int, keys: int, narrowed: Narrowed | None = None, bypassed: Sequence[int] = ()) -> Seconds:
        """tokens, keys: of a row in layers that have all of them. bypassed: layers that do not run."""
        attention = 0.0 if narrowed is None or tokens == 1 else narrowed.seconds
        cache = feed_forward = other = elementwise = 0.0
        blocks_of: dict[int | None, list[Decision]] = {}  # several feed-forward blocks may lie in one layer
        for site, decision in of_kind(decided, "ffn"):
            blocks_of.setdefault(site.layer, []).append(decision)
        for site, decision in of_kind(decided, "attention", "cache"):
            if site.offers_choice:
                attention += self._shared((decision.dense_seconds or 0.0) if decision.seconds is None else decision.seconds)
        attended = {site.layer for site, _ in of_kind(decided, "attention")}
        for site, _ in of_kind(decided, "cache"):
            if not site.offers_choice:
                cache += self._shared(self._store(site))
                attention += 0.0 if site.layer in attended else self._shared(self._windowed(site))
        for layer, weights in enumerate(self.model.layers):
            if layer in bypassed:
                continue
            gone = 0 if narrowed is None or layer <= narrowed.layer else keys - (tokens == 1) - narrowed.kept
            here = tokens if tokens == 1 else cdiv(tokens - gone, self.sharing.cp)
            rows = self.batch * here
            blocks = self._shapes[self.model.kinds[layer]].blocks
            whole = sum(self._linear(self.batch * (keys - gone) if pair[0] == self._latent else rows, *pair) for pair in weights.matrices)
            block = sum(self._linear(rows, *pair) for pair in blocks)
            other += whole - block
            decisions = blocks_of.get(layer, [])
            skips = any(one.method is not None for one in decisions)
            asked = sum((one.dense_seconds if one.method is None else one.seconds) or 0.0 for one in decisions)
            chosen = asked / (self.sharing.tp * (1 if tokens == 1 else self.sharing.cp)) if skips else block
            feed_forward += chosen + self._routed(rows, weights)
            elementwise += self._elementwise_seconds(self.model.kinds[layer], rows, here)
        head = self._linear(self.batch, self.model.hidden, self.model.head // self.model.hidden) if self.model.head else 0.0
        host = STEP_LAUNCHES * self.context.device.launch if tokens == 1 else 0.0
        rows = self._stream_bytes(1 if tokens == 1 else cdiv(tokens, self.sharing.cp))
        sites = self._attentions(decided)
        waited = exchanged.seconds(sites, self.sharing, rows, len(self.model.layers), self.context.device, step=tokens == 1)
        return Seconds(attention, feed_forward, other, elementwise, cache, head, host, waited)

    def _attentions(self, decided: Decided) -> list[exchanged.Attended]:
        """The sites whose operands travel, and what is expected of each."""
        found = []
        for site, decision in of_kind(decided, "attention"):
            spent = (decision.dense_seconds or 0.0) if decision.seconds is None else decision.seconds
            found.append(exchanged.Attended(site.sizes, decision.method or "dense", decision.options, self._shared(spent)))
        return found

    def _stream_bytes(self, tokens: int) -> int:
        """Of the residual stream of so many tokens a row."""
        return self.batch * tokens * self.model.hidden * self.model.dtype.itemsize

    def _shared(self, alone: float) -> float:
        """Seconds of one GPU of what all of them divide by heads and by tokens, where it takes one `alone` seconds: launches stay."""
        return alone if self.sharing.size == 1 else min(alone, alone / self.sharing.size + self.context.device.launch)

    def _linear_seconds(self, rows: int, inputs: int, outputs: int) -> float:
        return float(linear_seconds(self.context.device, rows, inputs, cdiv(outputs, self.sharing.tp), self.model.dtype))

    def _routed(self, rows: int, weights: Weights) -> float:
        """Experts: products for the active ones of every row; weights of all that some row takes when each is as likely as another."""
        if not weights.experts:
            return 0.0
        touched = weights.experts * (1 - (1 - weights.active / weights.experts) ** rows)
        total = 0.0
        for inputs, outputs in weights.expert:
            streamed = touched * inputs * cdiv(outputs, self.sharing.tp) * self.model.dtype.itemsize / self.context.device.bandwidth
            total += max(self._linear(rows * weights.active, inputs, outputs), streamed)
        return total

    def _elementwise_seconds(self, kind: int, rows: int, tokens: int) -> float:
        """Norms, sums, rotation, activation and the cache's store, fused as Inductor fuses them: each operand read or written once."""
        shape = self._shapes[kind]
        divided = 2 * (shape.query_width + shape.kv_width) + 4 * shape.kv_width + 3 * shape.intermediate
        elements = 8 * self.model.hidden + divided / self.sharing.tp
        kernels = SMALL_KERNELS if tokens == 1 else 1
        size = rows * elements * self.model.dtype.itemsize / kernels
        return kernels * float(seconds(work.elementwise(size), self.context.device))

    def _store(self, site: CacheSite) -> float:
        """A prompt's keys scored, where the policy looks at them, and what stays of keys and values copied."""
        observed = site.store.args[0] is not None
        keys = site.batch * site.kv_heads * site.query_len * site.qk_head_dim
        kept = site.batch * site.kv_heads * site.key_len * (site.qk_head_dim + site.v_head_dim)
        moved = (2 * keys * observed + 2 * kept) * site.dtype.itemsize
        device = self.context.device
        found = float(seconds(work.elementwise(moved), device)) + _STORE_LAUNCHES[observed] * device.launch
        queries = min(policies.parse(str(site.store.kwargs["policy"])).observed, int(site.query_len))
        if queries > _FEW_QUERIES:  # logits twice, for each row's sum and for each key's: as many products as attention
            sizes = dataclasses.replace(site.sizes, query_len=queries, key_len=site.query_len, causal=True)
            found += float(attention_seconds(sizes, device, kernel=self.context.family))
        return found

    def _windowed(self, site: CacheSite) -> float:
        """A prompt's attention under a policy whose rows see sinks and a window."""
        call = site.output.kwargs
        band = cast(int, call.get("window", 0)) + cast(int, call.get("sinks", 0))
        sizes = dataclasses.replace(site.sizes, key_len=site.query_len, causal=True)
        return float(attention_seconds(sizes, self.context.device, window=band or None, kernel=self.context.family))

    def _activations(self, length: int, prefill: Decided) -> int:
        """What a layer's widest moment holds for all rows, and the logits of the last ones: two wide rows and four of the stream, as
        measured on a compiled model of Llama's shape. A feed-forward block that is computed in parts holds what its method says instead."""
        rows = self.batch * cdiv(length, self.sharing.cp) * self.model.dtype.itemsize
        parts = {site.layer: int(decision.scratch) for site, decision in of_kind(prefill, "ffn") if decision.scratch}
        wide = (parts.get(layer, rows * 2 * self._shapes[kind].intermediate) for layer, kind in enumerate(self.model.kinds))
        return max(wide) // self.sharing.tp + rows * 4 * self.model.hidden + 4 * self.batch * self.model.vocabulary

    def _layer_shapes(self, call: CallSites) -> dict[int, _LayerShape]:
        shapes = {}
        for kind, weights in self.model.weights.items():
            attention = [site for site in call.attention if site.layer == kind]
            blocks = [site for site in call.feed_forward if site.layer == kind and not site.near_miss]
            fallback = int(getattr(self.model.config, "intermediate_size", None) or 4 * self.model.hidden)
            routed = weights.active * sum(i * o for i, o in weights.expert) // (3 * self.model.hidden)
            shapes[kind] = _LayerShape(
                sum(int(s.query_heads * s.qk_head_dim) for s in attention),
                sum(int(s.kv_heads * (s.qk_head_dim + s.v_head_dim) // 2) for s in attention),
                sum(int(s.intermediate) for s in blocks) or routed or fallback,
                tuple(pair for s in blocks for pair in s.products),
            )
        return shapes

    def _cached_latent(self, calls: PromptAndToken, length: int) -> int:
        latent = int(getattr(self.model.config, "kv_lora_rank", None) or 0)
        whole = sum(2 * self._shapes[kind].kv_width for kind in self.model.kinds) * self.batch * length * self.model.dtype.itemsize
        return latent if sum(calls.cache_bytes) < whole / 2 else 0

    def _remarks(self, calls: dict[int, PromptAndToken]) -> Iterator[str]:
        method: Any = narrowing.asked(self.config, load_saved_plan(self.config.plan))
        if method is not None and method.mode == "prompt":
            yield f"{method.name} reads the chosen tokens anew in generate(), which is not counted: its costs are those of the whole prompt"
        skipping: Any = bypass.asked(self.config, load_saved_plan(self.config.plan), "")
        for one in filter(None, (method, skipping)) if self.sharing.cp > 1 else ():
            yield f"{one.name} does not serve prompts that processes share: it is not counted"
        if isinstance(method, ImagePass) and not self.images:
            yield f"{method.name} leaves image tokens out, and these prompts have none: --image-tokens says how many"
        routed = [w for w in self.model.layers if w.experts]
        if routed:
            yield (
                f"{len(routed)} layers route each token to {routed[0].active} of {routed[0].experts} experts: products of the active ones, "
                "weights of all that the batch is expected to touch"
            )
        other = sum(not self._shapes[kind].query_width for kind in self.model.kinds)
        if other:
            yield f"{other} layers have no attention that the compiler sees: their matrix products and elementwise work alone count"
        if self._latent:
            yield "the cache holds latents: each step rebuilds all keys and values from them, as the model's code does"
        if self.model.tied:
            yield "the output matrix is the embedding: counted once in memory, read once a step"
        if any(call.graphs > 1 for one in calls.values() for call in (one.prefill, one.decode)):
            yield "torch captures this model in several graphs"


def filled(call: CallSites, length: int) -> CallSites:
    """A decode step over caches that hold no more than the prompt and the step's token."""
    cache = tuple(dataclasses.replace(site, key_len=min(int(site.key_len), length + 1)) for site in call.cache)
    return dataclasses.replace(call, cache=cache)


def label(site: Site, decision: Decision, context: Context) -> str:
    """The choice in a word or two."""
    if decision.method is None:
        return "as it is"
    kernel = decision.options.get("kernel")
    if decision.method == "dense" and kernel in ("sdpa", "attention"):
        return f"dense ({'SDPA' if kernel == 'sdpa' else context.family})"
    return decision.method


def grouped(phase: str, decided: Decided, keys: int, context: Context) -> Iterator[Group]:
    """Layers that see the same keys, with the same choice and reasons, together, in the order of their first layer.

    keys: that a layer of full attention has.
    """
    found: dict[tuple[Any, ...], list[int]] = {}
    methods = discover()
    for site, decision in decided:
        if not site.offers_choice:
            continue
        density = decision.density
        if density is None and decision.method is not None and site.kind == "attention":
            density = methods[decision.method](**decision.options).density_at(int(site.key_len))
        key = (site.kind, site.sees(keys), label(site, decision, context), decision.reason, density, tuple(decision.refusals))
        found.setdefault(key, []).append(site.layer)
    for (what, sees, choice, reason, density, refusals), layers in found.items():
        yield Group(phase, what, tuple(layers), sees, choice, reason, density, refusals)


def crossovers(forecaster: Forecaster, calls: dict[int, PromptAndToken], longest: int = 1 << 20) -> Iterator[Crossover]:
    """The lengths at which the configuration's choice changes, looked up at powers of two and bisected to the token."""
    lengths = sorted(calls)
    longest = max(longest, lengths[-1])

    def labelled(phase: str, length: int) -> list[tuple[AnySite, str]]:
        near = min((n for n in lengths if n >= length), default=lengths[-1])
        call = getattr(resized(calls[near], near, length), phase)
        decided = forecaster.decide(filled(call, length), forecaster.config)
        return [(site, label(site, decision, forecaster.context)) for site, decision in decided]

    def choices(phase: str, length: int) -> list[str]:
        return [choice for _, choice in labelled(phase, length)]

    for phase in (PREFILL, DECODE):
        low = min(1024, lengths[0])
        while low < longest:
            high = min(2 * low, longest)
            before = choices(phase, low)
            if choices(phase, high) == before:
                low = high
                continue
            below, above = low, high
            while above - below > 1:
                middle = (below + above) // 2
                below, above = (middle, above) if choices(phase, middle) == before else (below, middle)
            changed: dict[tuple[str, str, str], list[int]] = {}
            for (site, after), was in zip(labelled(phase, above), before, strict=True):
                if after != was:
                    sees = site.sees(above + (phase == DECODE))
                    changed.setdefault((sees, was, after), []).append(cast(int, site.layer))
            for (sees, was, after), layers in changed.items():
                yield Crossover(phase, tuple(layers), sees, above, was, after)
            low = above


def _scratch(site: Site, decision: Decision) -> int:
    """Bytes beside operands: the method's own, or the mask tensor of a site that stays as it is."""
    return site.mask_bytes if decision.method is None else int(decision.scratch or 0)
