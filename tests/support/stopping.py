"""Stops code of the package wherever an interrupt, or memory that runs out, may stop it, and `generate()` at a token."""

from __future__ import annotations

import inspect
import sys
from pathlib import Path
from types import FrameType
from typing import Any

from transformers.generation import BaseStreamer

import sparsify

_ROOTS = tuple(str(path) for path in (Path(sparsify.__file__).parent, Path(sparsify.__file__).resolve().parent.parent / "backends"))


class Stopped(Exception):
    """What `Stopping` raises."""


class Stopping:
    """Within the block the n-th call that the package's own code makes of anything built in raises Stopped; None: they are counted.

    Attributes:
        calls: so many there were.
    """

    def __init__(self, at: int | None = None):
        self.at, self.calls = at, 0

    def __enter__(self) -> Stopping:
        sys.setprofile(self._look)
        return self

    def __exit__(self, *error: Any) -> None:
        sys.setprofile(None)

    def _look(self, frame: FrameType, event: str, argument: Any) -> None:
        code = frame.f_code
        # what a generator raises while it is closed, nobody gets
        if event != "c_call" or code.co_flags & inspect.CO_GENERATOR or not code.co_filename.startswith(_ROOTS):
            return
        self.calls += 1
        if self.calls == self.at:
            sys.setprofile(None)
            raise Stopped


class Cancels(BaseStreamer):
    """A streamer that stops the call at its n-th token behind the prompt."""

    def __init__(self, tokens: int):
        self.left = tokens

    def put(self, value: Any) -> None:
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt

    def end(self) -> None:
        raise AssertionError("it was cancelled")
