"""A model without its weights: built on the meta device from its configuration alone, and captured as torch.compile captures it.

The sites are the compiler's own, found by the compiler's matchers in the graph of a call at the asked length. Layers that are alike
are captured once: the model is cut behind the first layer of its last kind, and each kind's sites stand for all layers of that kind.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import logging
import re
import threading
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import fx, nn

from sparsify.errors import UnsupportedError
from sparsify.generation.caches.running_call import link_layers
from sparsify.generation.caches.sparse_cache import SparseCache
from sparsify.generation.compat import with_cache
from sparsify.graph import isolated
from sparsify.matching.attention import find_attention
from sparsify.matching.cache import CacheSite, find_cache
from sparsify.matching.feed_forward import find_feed_forward
from sparsify.matching.sites import AttentionSite, FeedForwardSite

AnySite = AttentionSite | CacheSite | FeedForwardSite

# attributes of a layer's modules that say which layer it is and nothing of what it does
_NUMBERS = {"layer_idx", "layer_id", "layer_index", "layer_number", "training"}
_ACTIVE = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "top_k", "num_selected_experts")


@dataclass(frozen=True)
class CallSites:
    """The sites of one call of the whole model, every layer's, in order. graphs: how many graphs torch captured it in."""

    attention: tuple[AttentionSite, ...]
    cache: tuple[CacheSite, ...]
    feed_forward: tuple[FeedForwardSite, ...]
    graphs: int = 1

    @property
    def by_kind(self) -> tuple[tuple[AnySite, ...], ...]:
        return self.attention, self.cache, self.feed_forward


@dataclass(frozen=True)
class PromptAndToken:
    """A prompt and the token after it. cache_bytes: of the cache after the prompt, by layer."""

    prefill: CallSites
    decode: CallSites
    cache_bytes: tuple[int, ...]


@dataclass(frozen=True)
class Weights:
    """What one layer multiplies with. matrices: (inputs, outputs) of everything but routed experts. expert: those of one routed expert.
    experts, active: how many there are, and how many a token takes."""

    matrices: tuple[tuple[int, int], ...]
    expert: tuple[tuple[int, int], ...] = ()
    experts: int = 0
    active: int = 0


@dataclass(frozen=True)
class MetaModel:
    """config: of the model's text part. model: on the meta device, cut. kinds: for each layer of the whole model the one that stands
    for it.

    weights: by standing layer. parameters: elements in the whole model, shared ones once. head: elements of the output matrix.
    tied: whether that is the embedding too. assumptions: what the configuration left open, in words.
    """

    name: str
    config: Any
    model: nn.Module
    dtype: torch.dtype
    kinds: tuple[int, ...]
    weights: dict[int, Weights]
    parameters: int
    head: int
    tied: bool
    assumptions: tuple[str, ...] = ()

    @property
    def weight_bytes(self) -> int:
        return self.parameters * self.dtype.itemsize

    @property
    def hidden(self) -> int:
        return int(self.config.hidden_size)

    @property
    def vocabulary(self) -> int:
        return int(self.config.vocab_size)

    @property
    def layers(self) -> tuple[Weights, ...]:
        return tuple(self.weights[kind] for kind in self.kinds)

    @torch.no_grad()
    def calls(self, length: int, batch: int = 1, make_cache: Callable[[Any], Any] | None = None) -> PromptAndToken:
        """The sites of a prompt of `length` tokens in `batch` rows without padding, and of the token after it.

        make_cache: a cache from the model's configuration, such as a SparseCache; None: an ordinary one.

        Raises:
            UnsupportedError: the model's code cannot be captured without weights, or `make_cache` refuses the model.
        """
        implementation = self.config._attn_implementation
        try:
            cache = _growing(self.config) if make_cache is None else make_cache(self.config)
            if isinstance(cache, SparseCache):  # of the layers that were cut away nothing is stored: the last one left ends a call
                del cache.layers[max(self.kinds) + 1 :]
                cache.call = link_layers(cache.layers)
            with _capture(self.model) as (forward, graphs):
                prefill = self._call(forward, graphs, length, batch, cache)
                filled = {kind: _bytes(cache.layers[kind]) if kind < len(cache.layers) else 0 for kind in set(self.kinds)}
                decode = self._call(forward, graphs, 1, batch, cache)
        finally:
            self.config._attn_implementation = implementation  # a SparseCache sets its own
        return PromptAndToken(prefill, decode, tuple(filled[kind] for kind in self.kinds))

    def at_lengths(
        self, lengths: Iterable[int], batch: int = 1, make_cache: Callable[[Any], Any] | None = None
    ) -> dict[int, PromptAndToken]:
        """`calls` at many lengths. Between two lengths at which the model does the same but for sizes, nothing is captured again.

        What changes with the length, such as a window that a short prompt does not fill, changes once: equal ends mean an equal middle.
        """
        wanted = sorted(set(lengths))
        found = {length: self.calls(length, batch, make_cache) for length in {wanted[0], wanted[-1]}}
        pending = [(0, len(wanted) - 1)]
        while pending:
            low, high = pending.pop()
            between = wanted[low + 1 : high]
            if not between:
                continue
            ends = found[wanted[low]], found[wanted[high]]
            if _same(resized(ends[0], wanted[low], wanted[high], ends[1].cache_bytes), ends[1]):
                for length in between:
                    found[length] = resized(ends[1], wanted[high], length, _interpolated(ends, wanted[low], wanted[high], length))
                continue
            middle = (low + high) // 2
            found[wanted[middle]] = self.calls(wanted[middle], batch, make_cache)
            pending += [(low, middle), (middle, high)]
        return dict(sorted(found.items()))

    def _call(self, forward: Callable[..., Any], graphs: list[CallSites], tokens: int, batch: int, cache: Any) -> CallSites:
        graphs.clear()
        ids = torch.zeros(batch, tokens, dtype=torch.int64, device="meta")
        try:
            forward(input_ids=ids, use_cache=True, logits_to_keep=1, **with_cache(self.model, cache))
        except UnsupportedError:
            raise
        except Exception as error:
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            reason = f"{type(error).__name__}: {lines[0] if lines else ''}"
            raise UnsupportedError(f"its code cannot be captured without weights: {reason}", where=self.name) from error
        return CallSites(
            self._spread([site for graph in graphs for site in graph.attention]),
            self._spread([site for graph in graphs for site in graph.cache]),
            self._spread([site for graph in graphs for site in graph.feed_forward]),
            len(graphs),
        )

    def _spread(self, sites: list[Any]) -> tuple[Any, ...]:
        """Every layer's sites, from those of the layer that stands for it."""
        if outside := [site for site in sites if site.layer is None or site.layer not in range(len(self.kinds))]:
            raise UnsupportedError(f"{outside[0].name or 'an attention'} belongs to no layer", where=self.name)
        spread = [(site, layer) for layer, kind in enumerate(self.kinds) for site in sites if site.layer == kind]
        return tuple(
            site.renumbered(_renumbered(site.name, site.layer, layer), layer, index, len(spread))
            for index, (site, layer) in enumerate(spread)
        )


def resized(calls: PromptAndToken, old: int, new: int, cache_bytes: tuple[int, ...] | None = None) -> PromptAndToken:
    """The calls of a prompt of `old` tokens as those of one of `new` tokens: lengths that are the prompt's change, others stay."""

    def resize_call(call: CallSites, old: int, new: int) -> CallSites:
        moved: list[Any] = [tuple(site.resized(old, new) for site in sites) for sites in call.by_kind]
        attention, cache, feed_forward = moved
        return CallSites(attention, cache, feed_forward, call.graphs)

    return PromptAndToken(
        resize_call(calls.prefill, old, new), resize_call(calls.decode, old + 1, new + 1), cache_bytes or calls.cache_bytes
    )


def _same(one: PromptAndToken, other: PromptAndToken) -> bool:
    facts = lambda call: (call.graphs, [_facts(site) for sites in call.by_kind for site in sites])
    return facts(one.prefill) == facts(other.prefill) and facts(one.decode) == facts(other.decode)


def _facts(site: AnySite) -> tuple[Any, ...]:
    """All that a record says but which nodes it is about."""
    plain = {f.name: getattr(site, f.name) for f in dataclasses.fields(site)}
    facts = tuple((name, value) for name, value in plain.items() if isinstance(value, int | float | str | None | torch.dtype))
    return (site.kind, site.phase, site.mask_text, *facts)


def _interpolated(ends: tuple[PromptAndToken, PromptAndToken], low: int, high: int, length: int) -> tuple[int, ...]:
    """Bytes of a cache that grows by the token or not at all."""
    pairs = zip(ends[0].cache_bytes, ends[1].cache_bytes, strict=True)
    return tuple(small + (large - small) * (length - low) // (high - low) for small, large in pairs)


def build(name: str, *, config: Any = None, dtype: torch.dtype | None = None, attention: str = "sdpa", cut: bool = True) -> MetaModel:
    """The model that a folder or hub name configures; no weights are read or made.

    Args:
        config: instead of what `name` leads to. dtype: None takes the configuration's own, or bfloat16 where it names none.
        attention: transformers' implementation; a model that lacks it takes "eager". cut: False keeps all layers, for tests.

    Raises:
        UnsupportedError: there is no such configuration, or it is no causal language model's.
    """
    try:
        import transformers
    except ImportError:
        raise UnsupportedError("transformers is not installed", hint='pip install "sparsify-compiler[hf]"') from None
    assumptions = []
    try:
        config = transformers.AutoConfig.from_pretrained(name) if config is None else copy.deepcopy(config)
        found = dtype or getattr(config, "dtype", None) or getattr(config.get_text_config(decoder=True), "dtype", None)
        if found is None:
            assumptions.append("the configuration names no dtype: bfloat16")
        dtype = cast(torch.dtype, getattr(torch, found) if isinstance(found, str) else found or torch.bfloat16)
        model: Any
        model, used = _on_meta(transformers.AutoModelForCausalLM, config, dtype, attention)
    except (OSError, ValueError, KeyError, ImportError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise UnsupportedError(f"cannot build the model: {lines[0] if lines else type(error).__name__}", where=name) from error
    if used != attention:
        assumptions.append(f"attention {used!r}, since the model has no {attention!r}")
    text = model.config.get_text_config(decoder=True)
    if getattr(model.config, "quantization_config", None):
        assumptions.append(f"quantisation is not modelled: weights count as {str(dtype).removeprefix('torch.')}")
    if text is not model.config:
        assumptions.append("weights of other modalities count in memory alone")
    parameters = sum(p.numel() for p in model.parameters())
    head = model.get_output_embeddings()
    tied = head is not None and head.weight is model.get_input_embeddings().weight
    kinds, weights = _cut(model, text, cut)
    return MetaModel(
        name, text, model, dtype, kinds, weights, parameters, head.weight.numel() if head is not None else 0, tied, tuple(assumptions)
    )


def _on_meta(factory: Any, config: Any, dtype: torch.dtype, attention: str) -> tuple[nn.Module, str]:
    for implementation in (attention, "eager"):
        try:
            with torch.device("meta"):  # every tensor has a shape and no content
                model = factory.from_config(config, attn_implementation=implementation, dtype=dtype).eval()
            for module in model.modules():
                if getattr(module, "rope_type", None) in ("dynamic", "longrope"):
                    module.rope_type = "default"  # they read positions to choose frequencies, which costs nothing
            return model, implementation
        except (ValueError, ImportError):
            if implementation == "eager":
                raise
    raise AssertionError  # pragma: no cover


def _cut(model: nn.Module, config: Any, cut: bool) -> tuple[tuple[int, ...], dict[int, Weights]]:
    """Removes the layers behind the first of the last kind; for each layer the one that stands for it, and what those weigh."""
    count = config.num_hidden_layers
    found = [(path, module) for path, module in model.named_modules() if isinstance(module, nn.ModuleList) and len(module) == count]
    if not found:
        raise UnsupportedError(f"no list of {count} layers in the model", where=type(model).__name__)
    path, layers = found[0]
    types = getattr(config, "layer_types", None) or [None] * count
    first: dict[Any, int] = {}
    kinds = tuple(first.setdefault((types[i], _signature(layer)), i) for i, layer in enumerate(layers))
    weights = {kind: _weights(layers[kind], config) for kind in set(kinds)}
    if not cut:
        return tuple(range(count)), {i: weights[kind] for i, kind in enumerate(kinds)}
    parent, _, attribute = path.rpartition(".")
    setattr(model.get_submodule(parent), attribute, nn.ModuleList(layers[: max(kinds) + 1]))
    return kinds, weights


def _signature(layer: nn.Module) -> str:
    """Equal for layers that compute the same with other weights."""
    parts = []
    for path, module in layer.named_modules():
        plain = {k: v for k, v in vars(module).items() if k not in _NUMBERS and isinstance(v, int | float | str | None)}
        parts.append((path, type(module).__name__, sorted(plain.items())))
    return repr((parts, [(name, tuple(p.shape)) for name, p in layer.named_parameters()]))


def _weights(layer: nn.Module, config: Any) -> Weights:
    matrices, expert, experts, numbers = [], [], 0, set()
    for name, parameter in layer.named_parameters():
        inside = re.search(r"(?:^|\.)experts\.(?:(\d+)\.)?", name)
        if inside is None:
            if parameter.dim() == 2:
                matrices.append((parameter.shape[1], parameter.shape[0]))
        elif inside[1] is None and parameter.dim() == 3:  # all experts in one parameter
            expert.append((parameter.shape[2], parameter.shape[1]))
            experts = parameter.shape[0]
        elif inside[1] is not None and parameter.dim() == 2:
            numbers.add(inside[1])
            if len(numbers) == 1:
                expert.append((parameter.shape[1], parameter.shape[0]))
    experts = experts or len(numbers)
    active = next((int(value) for key in _ACTIVE if (value := getattr(config, key, None))), 1)
    return Weights(tuple(matrices), tuple(expert), experts, min(active, experts))


def _renumbered(name: str, old: int, new: int) -> str:
    """The layer's number is the last one in the path."""
    return re.sub(rf"(^|\.){old}(?=\.|$)(?!.*\.{old}(?=\.|$))", rf"\g<1>{new}", name)


def _bytes(layer: Any) -> int:
    return sum(t.numel() * t.element_size() for t in vars(layer).values() if isinstance(t, torch.Tensor) and t.dim() > 1)


def _growing(config: Any) -> Any:
    """An ordinary cache. Its layers begin with no tokens instead of with no dimensions, which meta tensors cannot be appended to."""
    from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

    cache = DynamicCache(config=config)
    for layer in cache.layers:
        if type(layer) in (DynamicLayer, DynamicSlidingWindowLayer):
            layer.__class__ = _empty_at_first(type(layer))
    return cache


@functools.cache
def _empty_at_first(layer_type: type) -> type:
    class Layer(layer_type):  # pyright: ignore[reportUntypedBaseClass]  # a class that is chosen at run time
        def lazy_initialization(self, key_states: torch.Tensor, *rest: torch.Tensor) -> None:
            super().lazy_initialization(key_states, *rest)
            self.keys, self.values = (states[..., :0, :] for states in (key_states, rest[0] if rest else key_states))

    return Layer


@contextmanager
def _capture(model: nn.Module) -> Generator[tuple[Callable[..., Any], list[CallSites]]]:
    """The model's forward under torch.compile, and the sites of each graph that the last call was captured in."""
    graphs: list[CallSites] = []

    def backend(gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        attention, cache = find_attention(gm), find_cache(gm)
        graphs.append(CallSites(tuple(attention), tuple(cache), tuple(find_feed_forward(gm, [*attention, *cache]))))
        return gm.forward

    logger = logging.getLogger("torch._subclasses.fake_tensor")  # prints every error that is handled above it
    here = threading.get_ident()
    others = lambda record: record.thread != here
    logger.addFilter(others)
    try:
        with isolated.compiled(model.forward, backend, dynamic=False) as forward:
            yield forward, graphs
    finally:
        logger.removeFilter(others)
