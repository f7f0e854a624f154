"""One line on a terminal about work that takes more than two seconds: what it is and for how long it has been running.

Nothing is drawn where stderr is no terminal. Work of several threads shares the line.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager

from rich.console import Console, Group
from rich.live import Live
from rich.spinner import Spinner

PATIENCE = 2.0  # seconds that work may take without a word


class Line:
    """The tasks that run, and a thread that draws those that have been running for longer than `patience` seconds."""

    def __init__(self, console: Console | None = None, patience: float = PATIENCE):
        self.console = console or Console(stderr=True)
        self.patience = patience
        self._tasks: dict[int, tuple[str, float]] = {}  # label, time of start
        self._numbers = itertools.count()
        self._changed = threading.Condition()
        self._drawer: threading.Thread | None = None

    def start(self, label: str) -> Task:
        """Work that begins now; its `done()` says when it ends."""
        task = Task(self, next(self._numbers))
        if self.console.is_terminal:
            with self._changed:
                self._tasks[task.number] = (label, time.monotonic())
                if self._drawer is None:
                    self._drawer = threading.Thread(target=self._draw, name="sparsify progress", daemon=True)
                    self._drawer.start()
                self._changed.notify()
        return task

    def finish(self, number: int) -> None:
        with self._changed:
            self._tasks.pop(number, None)
            self._changed.notify()

    def lines(self) -> list[str]:
        """What is said now: one entry for each task that has been running for long enough, oldest first."""
        now = time.monotonic()
        tasks = [(label, now - start) for label, start in dict(self._tasks).values()]
        return [f"sparsify: {label} ({seconds:.0f} s)" for label, seconds in tasks if seconds >= self.patience]

    def _draw(self) -> None:
        """Ends when no task is left; the next one starts another thread."""
        while True:
            with self._changed:
                if not self._tasks:
                    self._drawer = None
                    return
                oldest = min(start for _, start in self._tasks.values())
                self._changed.wait(max(0.0, oldest + self.patience - time.monotonic()))
            if self.lines():
                self._show()

    def _show(self) -> None:
        spinner = Spinner("dots")

        def render() -> Group:
            lines = self.lines()
            spinner.update(text=lines[-1] if lines else "")
            return Group(*lines[:-1], spinner) if lines else Group()

        # the output streams are left alone: a streamer may be printing half a line
        with Live(get_renderable=render, console=self.console, transient=True, redirect_stdout=False, redirect_stderr=False), self._changed:
            while self.lines():
                self._changed.wait(0.5)


class Task:
    """Work that is running."""

    def __init__(self, line: Line | None, number: int = -1):
        self._line, self.number = line, number

    def done(self) -> None:
        """Ends it; may be called more than once."""
        if self._line is not None:
            self._line.finish(self.number)
            self._line = None


_line: Line | None = None
_lock = threading.Lock()


def start(label: str, shown: bool = True) -> Task:
    """Shows a line about work that begins now, until `done()` of what is returned is called.

    Args:
        label: what the work is.
        shown: False shows nothing.
    """
    global _line
    if not shown:
        return Task(None)
    with _lock:
        _line = _line or Line()
    return _line.start(label)


@contextmanager
def task(label: str, shown: bool = True) -> Generator[None]:
    """Shows a line about the work inside the block while it runs.

    Args:
        label: what the work is.
        shown: False shows nothing.
    """
    running = start(label, shown)
    try:
        yield
    finally:
        running.done()
