"""Calls a graph that was compiled under an assumption about its inputs, or the graph itself where the assumption does not hold."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from sparsify.graph import compat, isolated


class Assumed:
    """A callable with the graph's inputs and outputs.

    Where the assumption does not hold, the graph is captured again by Dynamo, whose guards then tell for which sizes that is good.
    """

    def __init__(
        self,
        check: Callable[..., Sequence[Any]],
        places: Sequence[int],
        compiled: Callable[..., Any],
        graph: fx.GraphModule,
        backend: Callable[..., Any],
    ):
        """Args:
        check: whether the assumption holds, as a sequence of one bool [].
        places: which of the inputs it takes, in order.
        compiled: what to call then.
        graph: what to compile otherwise, not changed any more.
        backend: compiles it, like a backend of torch.compile.
        """
        self._check, self._places, self._compiled = check, tuple(places), compiled
        # under a code object of its own: Dynamo leaves alone the code of graphs that it made
        forward = isolated.copy_of(graph.forward)
        how: dict[str, Any] = compat.ISOLATED
        self._otherwise = torch.compile(forward, backend=lambda gm, inputs: backend(gm, inputs), **how)
        # two threads may ask Dynamo for one frame at once, and its guards keep state while they are asked
        self._lock = threading.Lock()

    def __call__(self, *inputs: Any) -> Any:
        if bool(self._check(*(inputs[place] for place in self._places))[0]):
            return self._compiled(*inputs)
        with self._lock:
            return self._otherwise(*inputs)
