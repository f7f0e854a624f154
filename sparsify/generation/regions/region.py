"""One compiled function for all layers of a kind: what it is captured from, and calls of it."""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import threading
from collections.abc import Callable
from typing import Any

from torch import Tensor, fx, nn

from sparsify import pipeline, progress
from sparsify.distributed import sequence
from sparsify.generation.caches import attention as cache_attention
from sparsify.generation.regions import caches, masks
from sparsify.graph import compat, isolated
from sparsify.graph.guarded import Guarded
from sparsify.ops.head_numbers import head_numbers
from sparsify.pipeline import Part
from sparsify.planning.config.config import Config

_SEEN = 4096  # sizes of calls that a region remembers


class Region:
    """One compiled function for all layers of a kind, in calls of one form; without paths for a whole model.

    Dynamo compiles a function twice where two threads ask for it at once, and its guards keep state while they are asked: until the graph
    runs, a region serves one thread after the other.

    Args:
        options: the user's, an object that all graphs of the model share.
        part: of the model that this process has.
        compiling: called when a graph is compiled.
        paths: of the layers.
        function: what is captured; None: a layer.
        dynamic, fullgraph: as in torch.compile.
    """

    def __init__(
        self,
        config: Config,
        options: Any,
        part: Part,
        compiling: Callable[[], None],
        paths: tuple[str, ...],
        function: Callable[..., Any] | None = None,
        dynamic: bool | None = True,
        fullgraph: bool = True,
    ):
        self.config, self.options, self.paths, self._compiling = config, options, paths, compiling
        shared = sequence.under_way()
        # a step after the prompt has a token that all processes have
        self.part = Part(part.heads) if shared is None else dataclasses.replace(part, tokens=shared.regime, processes=shared.shard.size)
        self.run = Guarded(isolated.copy_of(function or _run), self._backend, dynamic=dynamic, fullgraph=fullgraph)
        self._lock = threading.Lock()
        self._sizes: set[Any] = set()

    def __call__(self, sizes: Any, *arguments: Any) -> Any:
        """sizes: of what the call is over; those that ran once compile nothing."""
        self._lock.acquire()
        token = _waiting.set([self._lock])
        try:
            if sizes in self._sizes:
                return self.run(*arguments)
            with compat.independent_sizes(), self._told():
                result = self.run(*arguments)
            if len(self._sizes) >= _SEEN:
                self._sizes.clear()
            self._sizes.add(sizes)
            return result
        finally:
            _release()
            _waiting.reset(token)

    def _told(self) -> contextlib.AbstractContextManager[Any]:
        """Tells of the first call, which compiles."""
        if self._sizes:
            return contextlib.nullcontext()
        what = f"layers ({len(self.paths)} alike)" if self.paths else "all layers, for tokens"
        return progress.task(f"compiling {what}", self.config.progress)

    def _backend(self, gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        self._compiling()
        compiled = pipeline.compile_graph(gm, example_inputs, self.config, self.options, serves=self.paths, part=self.part)

        def graph(*inputs: Any) -> Any:
            if (look := before_graphs.get()) is not None:
                look()
            _release()
            return compiled(*inputs)

        return graph


# called in this thread before a graph runs, while no other thread is served; what it raises ends the call
before_graphs: contextvars.ContextVar[Callable[[], None] | None] = contextvars.ContextVar("sparsify_before_graphs", default=None)

# the lock of the region that is called in this thread, until its graph runs
_waiting: contextvars.ContextVar[list[threading.Lock] | None] = contextvars.ContextVar("sparsify_waiting", default=None)


def _release() -> None:
    held = _waiting.get()
    if held:
        held.pop().release()


class Held(nn.Module):
    """What a region is specialised on: Dynamo takes the numbers of a module for constants.

    cache: the copy of a cache layer.
    names: the arguments by which the decoder layer takes it.
    masks: how to make the masks, by argument.
    path: of the first layer that the region serves.
    """

    cache: Any
    names: tuple[str, ...]
    masks: dict[str, masks.Plan]
    path: str

    @classmethod
    def make(cls, cache: Any, names: tuple[str, ...], plans: dict[str, masks.Plan], path: str) -> Held:
        held = object.__new__(cls)
        held.__dict__.update(_EMPTY_MODULE, cache=cache, names=names, masks=plans, path=path)
        return held


_EMPTY_MODULE = vars(nn.Module())


def _run(
    layer: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    held: Held,
    state: dict[str, Any],
    padding: dict[str, Any],
    numbers: dict[str, Tensor],
    observed: dict[str, Tensor],
    packing: dict[str, Tensor],
) -> Any:
    """What a region is captured from: the masks, then the layer.

    state: what varies of the cache layer. padding: what varies of the masks, by name. numbers: of heads, see `SharedLayers.head_numbers`.
    observed: as `Narrowed.observation` gives it; where there is any, the result is a pair with what keys get of these queries' attention.
    packing: `Layout.operands` where the call's tokens are packed, else empty.
    """
    for name, values in numbers.items():
        site, option = name.split(" ")
        head_numbers(values, held.path + site, option)
    hidden = args[0] if args else kwargs["hidden_states"]
    given = dict(kwargs)
    if held.cache is not None:
        view = caches.view(held.cache, state, packing)
        for name in held.names:
            given[name] = view
    for name, plan in held.masks.items():
        given[name] = masks.build(plan, padding[name], hidden, None if packing else held.cache)
    if not observed:
        return layer.forward(*args, **given)
    found: list[Tensor] = []
    result = layer.forward(*args, **given, **{cache_attention.OBSERVED: (found, observed)})
    return result, found[0] if len(found) == 1 else None
