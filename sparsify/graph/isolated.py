"""Compiles a function in isolation: nothing else that the process has compiled is reused, changed or thrown away.

Dynamo stores compiled code, and the sizes that it has seen, per code object, and models share code objects (decorators of `forward`,
`Module._call_impl`). So the function is compiled under a copied code object. Where a graph breaks, shared frames are compiled too; what was
added to these is removed afterwards.
"""

from __future__ import annotations

import contextvars
import itertools
import types
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

import torch

from sparsify.graph import compat

_numbers = itertools.count()
# code objects compiled within the innermost block; None outside of any
_codes: contextvars.ContextVar[list[types.CodeType] | None] = contextvars.ContextVar("sparsify_codes", default=None)


@contextmanager
def compiled(function: Callable[..., Any], backend: Callable[..., Any], **how: Any) -> Generator[Callable[..., Any]]:
    """Gives `torch.compile(function, backend=backend, **how)` for calls within the block.

    Args:
        function: for example `model.forward`; it may be compiled already, or belong to a compiled model.
        backend: called with every graph and its example inputs.
        how: further arguments of torch.compile.
    """

    def mine(gm: torch.fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:  # a new object each time: Dynamo compares backends
        return backend(gm, example_inputs)

    codes: list[types.CodeType] = []
    token = _codes.set(codes)
    handle = compat.after_compiling(_note)
    try:
        yield compat.compile_in_threads(copy_of(torch._dynamo.eval_frame.innermost_fn(function)), backend=mine, **compat.ISOLATED, **how)
    finally:
        handle.remove()
        _codes.reset(token)
        for code in dict.fromkeys(codes):
            compat.forget(code, mine)


def _note(code: types.CodeType, new_code: types.CodeType) -> None:
    if (codes := _codes.get()) is not None:
        codes.append(code)


def copy_of(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with a code object of its own, under a unique name: Dynamo remembers by name which sizes varied."""
    if isinstance(function, types.MethodType):
        return types.MethodType(copy_of(function.__func__), function.__self__)
    if not isinstance(function, types.FunctionType):
        return function
    code = function.__code__.replace(co_name=f"{function.__code__.co_name}_isolated_{next(_numbers)}")
    copy = types.FunctionType(code, function.__globals__, function.__name__, function.__defaults__, function.__closure__)
    copy.__kwdefaults__, copy.__qualname__, copy.__module__ = function.__kwdefaults__, function.__qualname__, function.__module__
    copy.__dict__.update(function.__dict__)
    return copy
