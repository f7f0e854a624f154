"""What runs the step of every token: the function itself, or a CUDA graph of it."""

from __future__ import annotations

import contextlib
import functools
import gc
import logging
import threading
import warnings
from collections.abc import Callable, Generator
from typing import Any, Protocol

import torch

from sparsify.graph import compat

log = logging.getLogger(__name__)

# torch's default generator refuses to draw while any thread records, and graphs that are replayed share its place on the device
drawing = threading.RLock()

# calls before a graph is recorded: the first compiles, tunes and allocates, and one that compiled nothing leaves nothing new for the next
_MOST_WARMUPS = 2


class Runner(Protocol):
    """Calls a function of no arguments and no result again and again.

    keeps: whether recording was so much work that it is worth keeping for the next generation.
    """

    keeps: bool

    def __call__(self) -> None: ...

    def forget(self) -> None:
        """The function's buffers have moved."""


class Direct:
    """Calls the function."""

    keeps = False

    def __init__(self, function: Callable[[], None]):
        self.function = function

    def __call__(self) -> None:
        self.function()

    def forget(self) -> None:
        """Nothing was recorded."""


class Separate:
    """A runner for each value of a key, which is asked before every call: what a function does differs by it.

    make: makes a runner.
    """

    def __init__(self, make: Callable[[], Runner], key: Callable[[], object]):
        self._make, self._key = make, key
        self._runners: dict[object, Runner] = {key(): make()}
        self.keeps = self._runners[key()].keeps

    def __call__(self) -> None:
        key = self._key()
        if key not in self._runners:
            self._runners[key] = self._make()
        self._runners[key]()

    def forget(self) -> None:
        for runner in self._runners.values():
            runner.forget()


class Recorder(Protocol):
    """Records a function's work without doing it, and does it again."""

    def warm(self, function: Callable[[], None]) -> None:
        """Calls the function in the way in which it is going to be recorded."""

    def record(self, function: Callable[[], None]) -> Callable[[], None]:
        """The function's work, to be called any number of times. Raises what the function, or recording it, raises."""
        ...


class Recorded:
    """Calls the function once, twice where the first call compiled something, then records it and replays that; where it cannot be
    recorded, it goes on calling it.

    Args:
        function: works on buffers that stay where they are, and waits for nothing.
        recorder: such as `CudaGraphs`.
        failed: called when recording failed halfway, before the function is called again.
    """

    keeps = True

    def __init__(self, function: Callable[[], None], recorder: Recorder, failed: Callable[[], None] = lambda: None):
        self.function, self.recorder, self.failed = function, recorder, failed
        self.forget()

    def forget(self) -> None:
        self._calls, self._settled, self._replay = 0, False, None

    def __call__(self) -> None:
        if self._replay is None and self._settled:
            self._replay = self._record()
        if self._replay is not None:
            with drawing:
                self._replay()
            return
        compiled = compat.compiled_graphs()
        with drawing:
            self.recorder.warm(self.function)
        self._calls += 1
        self._settled = compat.compiled_graphs() == compiled or self._calls == _MOST_WARMUPS

    def _record(self) -> Callable[[], None]:
        try:
            with drawing:
                return self.recorder.record(self.function)
        except Exception as error:
            warnings.warn(f"sparsify decodes without a CUDA graph: {type(error).__name__}: {str(error).splitlines()[:1]}", stacklevel=2)
            log.debug("the step was not recorded", exc_info=error)
            self.failed()
            self.keeps = False
            return self.function


class CudaGraphs:
    """Records CUDA graphs with torch.cuda.CUDAGraph, on a stream beside the current one."""

    def __init__(self, device: torch.device):
        self.device = device

    @contextlib.contextmanager
    def _on_side_stream(self) -> Generator[None]:
        stream, current = _stream(self.device), torch.cuda.current_stream(self.device)
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            yield
        current.wait_stream(stream)

    def warm(self, function: Callable[[], None]) -> None:
        with self._on_side_stream():
            function()

    def record(self, function: Callable[[], None]) -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        # torch.cuda.graph would also empty the allocator's cache, which the next prompt needs, and wait for the device
        with self._on_side_stream(), _without_collection():
            graph.capture_begin(capture_error_mode="thread_local")
            try:
                function()
            except BaseException:
                with contextlib.suppress(RuntimeError):  # that recording is spoilt is known
                    graph.capture_end()
                self._end_drawing()
                raise
            graph.capture_end()
        return graph.replay

    def _end_drawing(self) -> None:
        """The device's random generator takes itself for one that is recorded until a recording ends well, and refuses everybody else."""
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin(capture_error_mode="thread_local")
        torch.zeros(1, device=self.device)
        graph.capture_end()


@functools.cache
def _stream(device: torch.device) -> Any:
    return torch.cuda.Stream(device)


@contextlib.contextmanager
def _without_collection() -> Generator[None]:
    """Freeing what holds device memory is not allowed while a graph is recorded."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
