"""A call of a model that is under way: each of its layers through a region, the layer's own hooks around it."""

from __future__ import annotations

import contextvars
import logging
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.exc import BackendCompilerFailed

from sparsify import pipeline
from sparsify.generation.regions import bypass, caches, documents
from sparsify.generation.regions.arguments import Arguments, made, uncompiled
from sparsify.generation.regions.layers import Layer, NotShared
from sparsify.generation.regions.narrowed import Narrowed
from sparsify.generation.regions.narrowing import FindImages
from sparsify.generation.regions.packed import Layout
from sparsify.generation.regions.packing import PackedCall
from sparsify.generation.regions.region import Held, before_graphs
from sparsify.generation.regions.shared import SharedLayers
from sparsify.generation.regions.towers import texts
from sparsify.graph import compat
from sparsify.planning.plan import Plan

log = logging.getLogger(__name__)

# the call of a model that this thread is in
active: contextvars.ContextVar[Call | None] = contextvars.ContextVar("sparsify_regions", default=None)


class Call:
    """A call of the model that is under way.

    ran: whether a region has run, so that the call cannot start again elsewhere.
    compiled: whether a region was compiled in it.
    shows_rows: whether the caller gets what each layer gave, for all rows.
    narrowed: what lets some tokens go on alone; None where nothing does.
    packed: what packs a padded batch; None where nothing does.
    tower_trouble: why towers run as they are in this call; None before one was asked.

    Args:
        find_images: says which of its tokens stand for images.
    """

    def __init__(self, shared: SharedLayers, find_images: FindImages):
        self.shared, self.find_images = shared, find_images
        self.ran = self.compiled = self.shows_rows = False
        self.narrowed: Narrowed | None = None
        self.packed: PackedCall | None = None
        self.tower_trouble: str | None = None
        self._caches = caches.Known(len(shared.layers))
        self._before: Any = None  # the result of the layer before

    def run(self, layer: Layer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The layer's result, its own hooks around it."""
        module = layer.module
        if layer.number in bypass.bypassed() and not layer.tower:
            return bypass.handed_on(args[0] if args else kwargs["hidden_states"], self._before)
        if module._forward_pre_hooks or module._forward_hooks:
            args, kwargs = made(args, kwargs)
        for key, hook in module._forward_pre_hooks.items():
            if key in module._forward_pre_hooks_with_kwargs:
                args, kwargs = hook(module, args, kwargs) or (args, kwargs)
            elif (found := hook(module, args)) is not None:
                args = found if isinstance(found, tuple) else (found,)
        if layer.number == 0 and not layer.tower:
            self._begin(layer, args, kwargs)
        if self.narrowed is not None and not layer.tower:
            args, kwargs = self.narrowed.enter(layer, args, kwargs)
        if layer.tower:
            result = self._run_tower(layer, args, kwargs)
        else:
            result = self._run(layer, args, kwargs) if self.packed is None else self._run_packed(self.packed, layer, args, kwargs)
        for key, hook in module._forward_hooks.items():
            with_kwargs = key in module._forward_hooks_with_kwargs
            found = hook(module, args, kwargs, result) if with_kwargs else hook(module, args, result)
            result = result if found is None else found
        if layer.tower:
            return result
        if layer.number == 0 and self.shared.bypass is not None:
            self.shared.bypass.look_at_result(args[0] if args else kwargs["hidden_states"], result)
        self._before = result if self.narrowed is None else self.narrowed.leave(layer, result)
        return self._before

    def _begin(self, layer: Layer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Finds what narrows or packs the call that begins with this layer."""
        given = layer.by_name(args, kwargs)
        hidden = args[0] if args else given.get("hidden_states")
        if type(hidden) is not Tensor or hidden.dim() != 3:
            return
        given = {name: value for name, value in given.items() if value is not hidden}
        if self.shared.bypass is not None:
            self.shared.bypass.look(hidden, given)
        if self.shared.narrowing is not None:
            self.narrowed = self.shared.narrowing.begin(hidden, given, self.shows_rows, self.find_images)
        self.packed = self.shared.packing.begin(hidden, given, self.shows_rows, self.narrowed is not None)

    def _run_packed(self, packed: PackedCall, layer: Layer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The layer's result, over packed rows where it can be."""
        if (entered := packed.enter(layer, args, kwargs)) is not None:
            try:
                return packed.leave(layer, self._through_region(layer, *entered, packed.layout))
            except NotShared as why:
                packed.give_up(layer, str(why))
        return self._run(layer, *made(args, kwargs))

    def _run_tower(self, layer: Layer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The result of a tower's layer, as it is where no region serves it."""
        towers = self.shared.towers
        if self.tower_trouble is None:
            self.tower_trouble = towers.trouble()
        given = layer.by_name(args, kwargs)
        hidden = args[0] if args else given.get("hidden_states")
        if self.tower_trouble or not isinstance(hidden, Tensor) or not towers.serves(layer, given, hidden):
            return uncompiled(layer.module, args, kwargs)
        if args and not hidden.requires_grad and hidden._is_view():
            # code is specialised on what a tensor is a view of, and the first layer's alone is one
            args = hidden.data, *args[1:]
        ran = self.ran
        try:
            if (holds := towers.over_documents(layer, given, hidden)) is None:
                return self._try_documents(layer, args, kwargs, given, hidden)
            return self._through_region(layer, args, kwargs, over_documents=holds)
        except NotShared as why:
            towers.leave(layer, str(why))
            return uncompiled(layer.module, args, kwargs)
        finally:
            self.ran = ran

    def _try_documents(self, layer: Layer, args: tuple[Any, ...], kwargs: dict[str, Any], given: dict[str, Any], hidden: Tensor) -> Any:
        """The result of a tower's layer over texts with bounds, in the first call of its kind: as one attention whose mask has a document
        for each, which serves from then on where it is rewritten, as a mask that is written out takes the square of all patches; else
        text by text. given: the arguments by name."""
        towers, plans = self.shared.towers, list[Plan]()

        def look() -> None:  # before the graph runs: the mask may be larger than the device's memory
            if towers.over_documents(layer, given, hidden) is None:
                towers.tried(layer, given, hidden, texts(given) == 1 or _all_rewritten(plans))
            if not towers.over_documents(layer, given, hidden):
                raise NotShared("nothing rewrites its attention over documents")

        if documents.serve(layer, hidden, given):
            outer, token, looking = pipeline.collector.get(), pipeline.collector.set(plans), before_graphs.set(look)
            try:
                return self._through_region(layer, args, kwargs, over_documents=True)
            except NotShared as why:
                log.debug("%s is not served over documents: %s", layer.path, why)
            finally:
                before_graphs.reset(looking)
                pipeline.collector.reset(token)
                if outer is not None:
                    outer += plans
        towers.tried(layer, given, hidden, False)
        if towers.serves(layer, given, hidden):
            return self._through_region(layer, args, kwargs)
        return uncompiled(layer.module, args, kwargs)

    def _run(self, layer: Layer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        try:
            return self._through_region(layer, args, kwargs)
        except NotShared as why:
            if not self.ran:
                raise
            result = uncompiled(layer.module, args, kwargs)
            log.warning("%s runs as it is in this call: %s", layer.path, why)
            self.shared.reason = self.shared.reason or str(why)
            return result

    def _through_region(
        self, layer: Layer, args: tuple[Any, ...], kwargs: dict[str, Any], layout: Layout | None = None, over_documents: bool = False
    ) -> Any:
        """layout: where the call's tokens lie, if they are packed. over_documents: as `Layer.over_documents`."""
        shadow = (layer.over_documents if over_documents and layer.over_documents else layer.shadow).current()
        given = Arguments(layer, args, documents.arguments(kwargs) if over_documents else kwargs, self._caches, layout)
        count = texts(given.rest) if layer.tower else 0
        narrowed = None if layer.tower else self.narrowed
        observed = {} if narrowed is None else narrowed.observation(layer)
        part = "" if narrowed is None else narrowed.part(layer)
        region = self.shared.region(layer, given, part, min(count, 2) if over_documents else 0)
        cache = given.cache
        if cache is not None:
            cache.begin()
        held = Held.make(cache and cache.copy, given.names, given.plans, region.paths[0])
        state = {} if cache is None else cache.varying
        numbers = self.shared.head_numbers(layer, given.hidden.device) if given.query_len > 1 and not layer.tower else {}
        packing = {} if layout is None else layout.operands()
        sizes = (given.batch, given.query_len, given.key_len, layout and layout.is_token.shape, count)
        try:
            result = region(sizes, shadow, given.by_position, given.rest, held, state, given.varying, numbers, observed, packing)
        except compat.CANNOT_CAPTURE as error:
            if isinstance(error, BackendCompilerFailed):
                raise
            if cache is not None:
                cache.undo()
            log.debug("%s cannot be a region", layer.path, exc_info=error)
            raise NotShared(compat.why_not_captured(error, "a layer"), lasting=True) from None
        if observed and narrowed is not None:
            result, narrowed.mass = result
        self.ran = True
        if cache is not None:
            cache.end()
        return given.handed_back(result)


def _all_rewritten(plans: list[Plan]) -> bool:
    """Whether attention was found, and a method serves all of it."""
    found = [one.method is not None for plan in plans for one in plan.decisions if one.kind == "attention"]
    return bool(found) and all(found) and not any(plan.fallback for plan in plans)


class Handover:
    """What a layer is called through: its region within a call of the model that it belongs to, else the layer itself."""

    def __init__(self, layer: Layer):
        self.layer = layer

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_dynamo_compiling():
            call = active.get()
            if call is not None and (mine := call.shared.layer(self.layer.module)) is not None:
                return call.run(mine, args, kwargs)
        return self.layer.module._call_impl(*args, **kwargs)


def note_compiling() -> None:
    """Notes in the call that is under way here that a region was compiled in it."""
    if (call := active.get()) is not None:
        call.compiled = True
