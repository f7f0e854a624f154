"""Calls what Dynamo has compiled of a function by its guards alone.

torch.compile's wrapper sets up and takes back a state of the process around each call, in which a frame may be compiled. That costs several
times what the guards cost, and a layer of a small model no more than that. So the guards of each piece of compiled code are evaluated here,
every one of them and at every call, and the code whose guards hold is called. Where none do, and wherever somebody asks something of Dynamo
(a stance, a trace that is under way), the call goes through torch.compile as any other.
"""

from __future__ import annotations

import types
import weakref
from collections.abc import Callable
from typing import Any

from torch import fx

from sparsify.graph import compat


class Guarded:
    """A compiled function, called with arguments by position. Calls in several threads must not overlap until the graph runs.

    Args:
        function: whose code object nobody else compiles. One with a closure goes through Dynamo at every call, where guards ask for the
            closure's variables.
        backend, how: of torch.compile.
    """

    def __init__(self, function: types.FunctionType, backend: Callable[..., Any], **how: Any):
        self._function, self._make = function, backend
        owner = weakref.ref(self)

        def compile_graph(gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
            guarded = owner()
            assert guarded is not None
            return guarded._compile(gm, example_inputs)

        self.backend = compile_graph  # one object: Dynamo compares them, and keeps each until it is reset
        weakref.finalize(self, compat.forget, function.__code__, compile_graph).atexit = False
        self._names = function.__code__.co_varnames[: function.__code__.co_argcount]
        self._through_dynamo = compat.compile_in_threads(function, backend=self.backend, **how)
        self._known: list[tuple[Any, Callable[..., Any]]] = []  # guards and what they guard, the last one that served first
        self._looked = True  # whether `_known` is what Dynamo has
        self._whole = True  # whether each graph is all that its frame runs

    def __call__(self, *args: Any) -> Any:
        if not self._looked:
            self._look()
        if self._known and compat.dynamo_is_idle():
            frame = dict(zip(self._names, args, strict=True))
            for number, (guards, compiled) in enumerate(self._known):
                if compat.still_holds(guards, frame):
                    if number:
                        self._known.insert(0, self._known.pop(number))
                    return compiled(*args)
        self._looked = not self._whole
        return self._through_dynamo(*args)

    def _compile(self, gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        if compat.graph_breaks_after(gm):  # what comes behind is compiled by Dynamo, while it evaluates frames
            self._whole, self._known = False, []
        return self._make(gm, example_inputs)

    def _look(self) -> None:
        """Takes over what Dynamo has compiled by now, and forgets what it has thrown away."""
        self._looked = True
        globals_, closure = self._function.__globals__, self._function.__closure__
        self._known = [
            (guards, types.FunctionType(code, globals_, code.co_name, None, closure))
            for guards, code in compat.compiled_whole(self._function.__code__, self.backend)
        ]
