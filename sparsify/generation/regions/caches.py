"""What a region sees of a model's cache: one layer of it, under a stand-in for the layer's number.

A region serves many layers, so that its code must depend neither on a layer's number nor on the cache of another layer: `LayerNumber`
refuses to be computed with, and `LayerView` holds one layer only.
"""

from __future__ import annotations

from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    StaticLayer,
    StaticSlidingWindowLayer,
)

from sparsify.generation.caches.layer import SparseLayer
from sparsify.generation.caches.running_call import CallState, mark_packed
from sparsify.generation.caches.sparse_cache import SparseCache
from sparsify.generation.regions.left_out import NarrowedLayer, NarrowedSlidingLayer, as_held
from sparsify.generation.regions.packed import unpack_heads

# arguments by which models and layers take a cache
CACHES = ("cache", "past_key_values", "past_key_value", "layer_past")

# layers of ordinary caches whose update touches nothing but themselves
_ALONE = (DynamicLayer, NarrowedLayer, DynamicSlidingWindowLayer, NarrowedSlidingLayer, StaticLayer, StaticSlidingWindowLayer)


class LayerNumber:
    """Stands for the number of a decoder layer in code that serves all of them. It goes to the cache; whatever else is done with it
    fails, so that a layer whose result depends on its number is never taken for another."""

    def _refuse(self, *args: Any) -> Any:
        raise TypeError("the layer computes with its number")

    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __mod__ = __truediv__ = __floordiv__ = __index__ = __int__ = _refuse
    __float__ = __bool__ = __lt__ = __le__ = __gt__ = __ge__ = __eq__ = __ne__ = __hash__ = _refuse

    def __deepcopy__(self, memo: Any) -> LayerNumber:
        return self


LAYER = LayerNumber()


class _OneLayer:
    """Stands for a cache's list of layers: the region's own layer can be read, by `LAYER`, and no other."""

    def __init__(self, layer: Any):
        self.layer = layer

    def __getitem__(self, number: Any) -> Any:
        if number is not LAYER:
            raise TypeError("the layer asks for the cache of another one")
        return self.layer


class LayerView(Cache):
    """A cache of one layer, for code that knows it as `LAYER`."""

    def __init__(self, layer: Any):
        self.layers: Any = _OneLayer(layer)
        self.layer_class_to_replicate, self.offloading = None, False

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: Any, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return self.layers[layer_idx].update(key_states, value_states, *args, **kwargs)

    def get_seq_length(self, layer_idx: Any = None) -> Any:
        return self.layers[layer_idx].get_seq_length()

    def get_mask_sizes(self, query_length: int, layer_idx: Any = None) -> tuple[int, int]:
        return self.layers[layer_idx].get_mask_sizes(query_length)

    def get_max_length(self, layer_idx: Any = None) -> int:
        return self.layers[layer_idx].get_max_length()


class PackedView(LayerView):
    """The same in a call whose tokens are packed into fewer rows: the layer stores them as a padded batch, and attention is over the
    packed rows, which are all that the cache holds.

    packing: `Layout.operands`.
    """

    def __init__(self, layer: Any, packing: dict[str, Tensor]):
        super().__init__(layer)
        self.packing = packing

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: Any, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        layer = self.layers[layer_idx]
        super().update(unpack_heads(key_states, self.packing), unpack_heads(value_states, self.packing), layer_idx, *args, **kwargs)
        if isinstance(layer, SparseLayer):
            mark_packed(key_states, layer, self.packing)
        return key_states, value_states


def trouble(cache: Any, layers: int) -> str:
    """Why regions cannot serve a cache, in a clause; empty where each of its layers depends on nothing but itself.

    Args:
        layers: number of the model's decoder layers.
    """
    if not isinstance(cache, Cache):
        return f"a cache that is a {type(cache).__name__}"
    if getattr(cache, "offloading", False):
        return "a cache that is offloaded while layers run"
    if cache.layer_class_to_replicate is not None:
        while len(cache.layers) < layers:
            cache.layers.append(cache.layer_class_to_replicate())
    if len(cache.layers) != layers:
        return f"a cache of {len(cache.layers)} layers for {layers}"
    if why := next(filter(None, map(_foreign, cache.layers)), ""):
        return why
    layouts = {(layer.layout, layer.policy_text) for layer in cache.layers if isinstance(layer, SparseLayer) and not layer.is_sliding}
    return "a cache whose layers have budgets of their own, which are constants of a graph" if len(layouts) > 1 else ""


def keeps_past(cache: Any) -> bool:
    """Whether tokens of a call may be taken back from what evicts: they are kept apart by code that looks at values."""
    return isinstance(cache, SparseCache) and any(layer.record_past and not (layer.grows and layer.read is None) for layer in cache.layers)


def settle(cache: Any, tokens: int) -> None:
    """Before a call of a whole graph, which runs no Python of the cache: where there is no room for its tokens, the policy selects.

    While a CUDA graph is recorded nothing may be asked of the device; who records settles before.
    """
    if isinstance(cache, SparseCache) and cache.every and not (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()):
        cache.settle(tokens)


def _foreign(layer: Any) -> str:
    return "" if type(layer) in _ALONE or isinstance(layer, SparseLayer) else f"a cache with a {type(layer).__name__}"


class Known:
    """Caches of one call of a model. Each is asked for `trouble` once, before a layer has run over it: those that have may hold a budget
    that the next ones get later.

    Args:
        layers: number of the model's decoder layers.
    """

    def __init__(self, layers: int):
        self.layers = layers
        self._last: Any = None

    def trouble(self, cache: Any, number: int) -> str:
        """Why no region serves this layer's call over the cache, in a clause; empty where one may."""
        if cache is not self._last or len(cache.layers) != self.layers:
            self._last = None
            if why := trouble(cache, self.layers):
                return why
            self._last = cache
        return _foreign(cache.layers[number])


L = TypeVar("L", bound=CacheLayerMixin)


class LayerCall(Generic[L]):
    """One call of a layer over its cache.

    A region gets a copy of the layer, made for the call; what it changes there goes back to the layer. `begin`, `end` and `undo` stand
    around it.

    copy: the copy, without the attributes in `varying`.
    varying: the layer's tensors, and its numbers that grow with the text, by attribute.
    """

    def __init__(self, cache: Cache, layer: L, **instead: Any):
        """instead: attributes of the copy in place of the layer's own."""
        self.cache, self.layer = cache, layer
        values = {**vars(layer), **instead}
        self.given = {name: value for name, value in values.items() if isinstance(value, Tensor) or name in _GROWING}
        self.varying = {name: _alias(value) if isinstance(value, Tensor) else value for name, value in self.given.items()}
        self.copy: L = object.__new__(type(as_held(layer)))
        vars(self.copy).update({name: value for name, value in values.items() if name not in self.given})

    @property
    def key_len(self) -> int:
        """Keys that lie in the layer, or slots for them: a size of the call."""
        return self.layer.keys.shape[-2] if self.layer.is_initialized and self.layer.keys is not None else 0

    def kind(self) -> tuple[Any, ...]:
        """What tells graphs over such a layer apart, beside sizes."""
        return type(self.copy), not self.layer.is_initialized, self.layer.is_initialized

    def begin(self) -> None:
        pass

    def end(self) -> None:
        self._hand_back({})

    def undo(self) -> None:
        """Nothing has run: as before `begin`, but that lengths are read anew."""

    def _hand_back(self, kept: dict[str, Any]) -> None:
        """Gives the layer what its copy has now. kept: attributes that get these values instead."""
        for name, value in vars(self.copy).items():
            if name not in self.varying or value is not self.varying[name]:
                vars(self.layer)[name] = kept.get(name, value)


# attributes of a layer that its copy has otherwise
_OWN = ("index", "is_first", "is_last", "call", "used", "offloader", "rest")


class SparseLayerCall(LayerCall[SparseLayer]):
    """The same over a layer of a SparseCache, whose copy is neither the first nor the last one; keeps what the cache knows of the call."""

    def __init__(self, cache: Cache, layer: SparseLayer, query_len: int):
        super().__init__(cache, layer, index="any", is_first=False, is_last=False, call=CallState(), used=None, offloader=None, rest=None)
        self.query_len = query_len

    def kind(self) -> tuple[Any, ...]:
        layer = self.layer
        return type(layer), not layer.started, layer.is_initialized, layer.shard, layer.read_text, layer.grows

    def begin(self) -> None:
        layer = self.layer
        if layer.is_first and isinstance(self.cache, SparseCache):
            self.cache.check_consistent(self.query_len > 1 or not layer.is_initialized or layer.keys.device.type == "cpu")
        if layer.grows and layer.is_initialized:
            before = layer.keys
            layer.make_room(self.query_len)
            if layer.keys is not before:
                for name in ("keys", "values", "positions", *layer.growing()):
                    self.given[name] = self.varying[name] = getattr(layer, name)
        elif layer.every and layer.is_initialized:
            layer.make_way(self.query_len)
        if layer.offloader is not None and layer.rest is not None:
            layer.offloader.bring(layer)
        layer.call.storing = True

    def end(self) -> None:
        layer, fresh = self.layer, not self.layer.is_initialized
        self._hand_back({name: vars(layer)[name] for name in _OWN})
        if fresh and layer.is_initialized:
            layer.used = None if layer.every else self.query_len
            layer.mark_static()
        if layer.offloader is not None and layer.is_initialized:
            if layer.rest is None:
                layer.offloader.take(layer)
            else:  # a graph does not tell which columns were padding
                layer.offloader.put_back(layer, self.query_len, False)
        if layer.is_last:
            layer.call.storing = False

    def undo(self) -> None:
        self.layer.used = None
        if self.layer.offloader is not None and self.layer.rest is not None:
            self.layer.offloader.forget(self.layer)
        if self.layer.is_first:
            self.layer.call.storing = False


def layer_call(cache: Cache, number: int, query_len: int) -> LayerCall[Any]:
    """A call over the layer `number` of a cache in which `trouble` finds none."""
    layer = cache.layers[number]
    if isinstance(layer, SparseLayer):
        return SparseLayerCall(cache, layer, query_len)
    if not isinstance(layer, CacheLayerMixin):
        raise TypeError(f"a {type(layer).__name__} holds no keys")
    make_contiguous(layer)
    return LayerCall(cache, layer)


# numbers of ordinary layers that grow with the text
_GROWING = ("cumulative_length", "cumulative_length_int")


def _alias(tensor: Tensor) -> Tensor:
    """The tensor itself, or another of the same memory where transformers asks torch to compile for this very tensor."""
    return tensor.detach() if getattr(tensor, "_dynamo_static_input_type", "") == "guarded" else tensor


def view(copy: Any, varying: dict[str, Any], packing: dict[str, Tensor]) -> LayerView:
    """The cache that the decoder layer is given within a region.

    Args:
        copy: `LayerCall.copy`.
        varying: `LayerCall.varying`, as inputs of the region's graph.
        packing: `Layout.operands` of a call whose tokens are packed, else empty.
    """
    for name, value in varying.items():
        setattr(copy, name, value)
    return PackedView(copy, packing) if packing else LayerView(copy)


def make_contiguous(layer: CacheLayerMixin) -> None:
    """Gives the keys of an ordinary layer one layout for all calls, so that they have one graph: a prompt leaves the transpose of what the
    projection wrote, `cat` leaves contiguous keys, and a window's slice neither."""
    if not isinstance(layer, DynamicLayer) or not layer.is_initialized:
        return
    if layer.keys is not None and layer.values is not None and layer.keys.dim() == 4:
        layer.keys, layer.values = layer.keys.contiguous(), layer.values.contiguous()
