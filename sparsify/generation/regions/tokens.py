"""Single tokens on a CPU as one graph for all layers, where calling layers one by one would cost more than they compute.

A region costs the host some tenths of a millisecond a layer: guards, the layer's arguments, its cache. Beside the layers of a small model
that is most of a token, and nothing overlaps with it on a CPU. The whole graph is captured with sizes that vary, once for each form of
call, and takes as long to compile as it has layers.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed
from transformers.cache_utils import DynamicLayer

from sparsify import pipeline
from sparsify.costs import device as hardware
from sparsify.generation.caches.filled import filled, stored_one
from sparsify.generation.caches.layer import SparseLayer
from sparsify.generation.caches.sparse_cache import SparseCache
from sparsify.generation.regions import caches, left_out
from sparsify.generation.regions.layers import Beside, Layer, hooked
from sparsify.graph import compat
from sparsify.planning.config.config import Config

log = logging.getLogger(__name__)

# seconds of the host for each call of a layer's region (docs/decisions/0005-regions.md)
REGION = 2.5e-4
# share of a layer's seconds, which are those of reading its weights, that a region may cost
SHARE = 0.05
# layers that one graph may hold: layers of a kind share their code in it, but each is traced
MOST_LAYERS = 48

CAPTURE = "tokens: one graph for all layers"


def pays(layers: Sequence[Layer], config: Config) -> bool:
    """Whether tokens of these layers are worth a graph of their own."""
    if config.lower != "inductor" or len(layers) > MOST_LAYERS:
        return False
    parameters = [parameter for layer in layers for parameter in layer.module.parameters()]
    if any(parameter.device.type != "cpu" for parameter in parameters):
        return False
    seconds = sum(parameter.nbytes for parameter in parameters) / hardware.describe(torch.device("cpu")).bandwidth
    return len(layers) * REGION > SHARE * seconds


class Tokens:
    """Calls a model for one token of each row.

    Args:
        make: a region that captures a function, see `region.Region`.
        layers: the model's decoder layers.
        towers: those of encoders beside it, which no token calls.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[Layer],
        make: Callable[[Callable[..., Any]], Callable[..., Any]],
        towers: Sequence[Layer] = (),
    ):
        self.model, self.layers, self._make = model, layers, make
        self._beside = Beside(model, (*layers, *towers))  # whose hooks a graph has or lacks as they were when it was compiled
        self._compiled: dict[Any, Callable[..., Any]] = {}
        self._failed = False
        self._first = next(iter(inspect.signature(model.forward).parameters))

    def __call__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The call's result, for a call that `RegionalModel._check_call` has let pass; NotImplemented where layers serve it one by one, and
        nothing has run."""
        if self._failed or len(args) > 1 or torch.is_grad_enabled():
            return NotImplemented
        if args:
            kwargs = {self._first: args[0], **kwargs}
        form = self._form(kwargs)
        return NotImplemented if form is None else self._call(form, kwargs)

    def _form(self, kwargs: Mapping[str, Any]) -> Any:
        """What tells graphs of tokens apart; None for a call that is none, or that layers must serve one by one."""
        tokens = kwargs.get("input_ids")
        if type(tokens) is not Tensor or tokens.dim() != 2 or tokens.shape[1] != 1 or tokens.device.type != "cpu":
            return None
        form: list[Any] = [tokens.shape[0] == 1, torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")]
        cache: Any = None
        for name, value in kwargs.items():
            if name in caches.CACHES and value is not None:
                cache = value
                form.append(name)
            elif type(value) is Tensor:
                form.append((name, value.dim(), value.dtype))
            elif value is None or isinstance(value, bool | int | float | str):
                form.append((name, value if isinstance(value, bool | str) else type(value)))
            else:
                return None
        if cache is None or not all(map(_serves, cache.layers)) or any(map(hooked, self.layers)) or self._beside.hooked():
            return None
        form.extend(type(layer) for layer in cache.layers)
        return tuple(form)

    def _call(self, form: Any, kwargs: dict[str, Any]) -> Any:
        cache = next(value for name, value in kwargs.items() if name in caches.CACHES and value is not None)
        _make_ready(cache)
        count = filled(cache) if isinstance(cache, SparseCache) else None
        # a number that varies is a graph's operand where it is a size, and a constant of it elsewhere
        told = None if count is None else torch.empty(count, 0)
        form = (*form, told is None)
        run = self._compiled.get(form)
        if run is None:
            _mark_growing(cache, kwargs)
            if told is not None:
                torch._dynamo.maybe_mark_dynamic(told, 0)
            run = self._compiled.setdefault(form, self._make(_run))
        plans = pipeline.collector.get()
        before = 0 if plans is None else len(plans)
        try:
            result = run(cache.layers[0].keys.shape[0], self.model, kwargs, cache, told)
        except compat.CANNOT_CAPTURE as error:
            if isinstance(error, BackendCompilerFailed):
                raise
            log.info("tokens are not one graph", exc_info=error)
            self._failed = True
            return NotImplemented
        for plan in (plans or ())[before:]:
            plan.capture = CAPTURE
        if count is not None:
            stored_one(cache, count)
        return result


def _run(model: nn.Module, kwargs: dict[str, Any], cache: Any, told: Tensor | None) -> Any:
    """What a graph of a token is captured from. told: as many rows as slots of the cache are filled; None: nobody knows."""
    if told is None:
        return model._call_impl(**kwargs)
    cache.call.filled = told.shape[0]
    result = model._call_impl(**kwargs)
    cache.call.filled = None
    return result


def _serves(layer: Any) -> bool:
    """Whether a cache's layer holds a prompt, in buffers for which torch does not compile one by one."""
    if not layer.is_initialized or left_out.left_out(layer):
        return False
    if isinstance(layer, SparseLayer):
        return layer.started and layer.shard is None
    return isinstance(layer, DynamicLayer) and layer.keys is not None and layer.keys.numel() > 0


def _mark_growing(cache: Any, kwargs: Mapping[str, Any]) -> None:
    """Lets sizes that grow with the text vary in the graph that is captured now."""
    for layer in cache.layers:
        if not isinstance(layer, SparseLayer):  # whose buffers carry marks of their own
            torch._dynamo.maybe_mark_dynamic(layer.keys, 2)
            torch._dynamo.maybe_mark_dynamic(layer.values, 2)
    for value in kwargs.values():
        if isinstance(value, Tensor) and value.dim() and value.shape[-1] > 1:
            torch._dynamo.maybe_mark_dynamic(value, value.dim() - 1)


def _make_ready(cache: Any) -> None:
    """What regions do before each layer, for all of them: captured code changes no buffers' sizes and no layouts."""
    if isinstance(cache, SparseCache):
        cache.check_consistent(read_lengths=True)
    for layer in cache.layers:
        if not isinstance(layer, SparseLayer):
            caches.make_contiguous(layer)
        elif layer.grows:
            layer.make_room(1)
        elif layer.every:
            layer.make_way(1)
