"""A CUDA graph's rules without CUDA: a function's operations are recorded and done again on the very tensors of the recording.

As with a graph nothing of Python runs again: whatever the function computed on the host stays as it was. Reading from a tensor is an error
while it is recorded, and recording leaves no trace in the tensors that were there before.
"""

from __future__ import annotations

import contextlib
import unittest.mock
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# operations that wait for the device, or whose result has a size that depends on values
_WAITING = {"_local_scalar_dense", "item", "nonzero", "unique", "_unique2", "masked_select", "equal", "is_nonzero"}


class HostRead(RuntimeError):
    """An operation that a CUDA graph cannot hold."""


class _Recording(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, tuple, dict, list[Any]]] = []
        self.before: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func._schema.name.split("::")[1]
        masks = name in ("index", "index_put_") and any(isinstance(t, torch.Tensor) and t.dtype == torch.bool for t in tree_leaves(args[1]))
        if name in _WAITING or masks:
            raise HostRead(name)
        for position, argument in enumerate(func._schema.arguments):
            value = args[position] if position < len(args) else kwargs.get(argument.name)
            if argument.alias_info is not None and argument.alias_info.is_write and isinstance(value, torch.Tensor):
                storage = value.untyped_storage()
                self.before.setdefault(storage.data_ptr(), (storage, storage.clone()))
        out = func(*args, **kwargs)
        self.operations.append((func, args, kwargs, tree_leaves(out)))
        return out


class OpRecorder:
    """As `sparsify.generation.decoding.runner.CudaGraphs`; counts what it did."""

    def __init__(self) -> None:
        self.warmed = self.recorded = self.replayed = 0

    def warm(self, function: Callable[[], None]) -> None:
        self.warmed += 1
        function()

    def record(self, function: Callable[[], None]) -> Callable[[], None]:
        recording, random = _Recording(), torch.get_rng_state()
        try:
            with recording:
                function()
        finally:
            for storage, value in recording.before.values():
                storage.copy_(value)
            torch.set_rng_state(random)
        self.recorded += 1

        def replay() -> None:
            self.replayed += 1
            for func, args, kwargs, outputs in recording.operations:
                for old, new in zip(outputs, tree_leaves(func(*args, **kwargs)), strict=True):
                    if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                        old.copy_(new)

        return replay


class NoReads:
    """A runner that calls its function, from the third call on with reading from tensors an error in Python: for compiled code, of whose
    operations no dispatch mode may be told. unread: how many calls that were."""

    keeps = False
    reading = ("item", "tolist", "__int__", "__bool__", "__float__", "__index__", "numpy")

    def __init__(self, function: Callable[[], None]):
        self.function, self.calls, self.unread = function, 0, 0

    def __call__(self) -> None:
        self.calls += 1
        if self.calls <= 2:
            self.function()
            return

        def refuse(tensor: torch.Tensor, *args: Any) -> None:
            raise HostRead("in Python")

        with contextlib.ExitStack() as patches:
            for name in self.reading:
                patches.enter_context(unittest.mock.patch.object(torch.Tensor, name, refuse))
            self.function()
        self.unread += 1

    def forget(self) -> None:
        self.calls = 0
