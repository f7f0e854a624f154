"""Kernels are compiled before they are launched, in a process of their own, while this one still compiles what is around them.

What passes between the two is Triton's cache folder: a launch finds there what the other process has compiled, exactly as it would find
what an earlier process did, and compiles for itself what it does not find. So a launch runs the same binary either way, and an error of
compilation is raised where it always is. `recording` makes launches tell what they would run; a process that is done with all that it was
told ends after `_PATIENCE` seconds, and at the latest with this one.
"""

from __future__ import annotations

import atexit
import contextlib
import contextvars
import logging
import os
import pickle
import select
import subprocess
import sys
import threading
from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from sparsify.backends.codegen.arguments import Argument

log = logging.getLogger(__name__)

_PATIENCE = 20  # seconds after which the process ends where nobody asks anything
_HANGS = 120  # seconds after which a launch no longer waits
_MOST_AT_ONCE = 4
_WORKER = Path(__file__).with_name("ahead_worker.py")


@dataclass(frozen=True)
class Planned:
    """A launch as far as Triton compiles for it; equal ones run one binary.

    path, module: file and name of the generated module. kernel: the function's name in it. arguments: each as `described`. options:
    Triton's own, such as num_warps, by name.
    """

    path: str
    module: str
    kernel: str
    arguments: tuple[Any, ...]
    options: tuple[tuple[str, Any], ...]


def described(argument: Argument, value: Any) -> Any:
    """What of an argument's value Triton compiles for: a kind, and what matters of the value."""
    if argument.type == "constexpr":
        return "constexpr", value
    if isinstance(value, Tensor):
        return "pointer", str(value.dtype), value.data_ptr() % 16 == 0
    if isinstance(value, float):
        return ("float",)
    if isinstance(value, bool | int):
        wide = (1 << 40) if value >= 1 << 31 else 0
        if not argument.specialised:
            return "integer", wide + 17
        return "integer", value if value == 1 else wide + (16 if value % 16 == 0 else 17)
    if value is None:
        return ("none",)
    fields = {name: value for name, value in vars(value).items() if name not in ("base", "shape", "strides")}
    fields["block_shape"] = tuple(fields["block_shape"])
    return "descriptor", type(value).__module__, type(value).__name__, str(value.base.dtype), tuple(sorted(fields.items()))


def planned(kernel: Any, arguments: Sequence[Argument], values: Sequence[Any], options: dict[str, Any]) -> Planned:
    """A launch of a kernel of a generated module."""
    module = kernel.fn.__module__
    given = tuple(described(argument, value) for argument, value in zip(arguments, values, strict=True))
    return Planned(str(sys.modules[module].__file__), module, kernel.fn.__name__, given, tuple(sorted(options.items())))


_recorded: contextvars.ContextVar[list[Planned] | None] = contextvars.ContextVar("sparsify_recorded_launches", default=None)


@contextlib.contextmanager
def recording() -> Generator[list[Planned]]:
    """In this block, in this thread, kernels are not launched: the list tells what would have been."""
    launches: list[Planned] = []
    token = _recorded.set(launches)
    try:
        yield launches
    finally:
        _recorded.reset(token)


def meet(kernel: Any, arguments: Sequence[Argument], values: Sequence[Any], options: dict[str, Any]) -> bool:
    """Before a launch: waits while the kernel is just being compiled. Returns whether the launch was only recorded."""
    launches = _recorded.get()
    if launches is None and not (_compiler and _compiler.pending):
        return False
    launch = planned(kernel, arguments, values, options)
    if launches is not None:
        launches.append(launch)
        return True
    if _compiler:
        _compiler.wait(launch)
    return False


class Compiler:
    """The process, and what it has been asked for.

    target: backend, architecture and warp size, as Triton's GPUTarget.
    """

    def __init__(self, target: tuple[str, int, int]):
        self.target = target
        self.pending: dict[Planned, int] = {}
        self._asked: set[Planned] = set()
        self._started: set[int] = set()
        self._lock = threading.Lock()
        self._owner = os.getpid()
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Starts the process, so that it has imported what it needs when it is asked."""
        with self._lock:
            self._ready()

    def submit(self, launches: Iterable[Planned]) -> None:
        """Asks for launches, in the order of their urgency; each is asked for once."""
        if self._owner != os.getpid():
            return  # a fork of the process that owns the pipes
        with self._lock:
            for launch in launches:
                if launch in self._asked:
                    continue
                self._asked.add(launch)
                number = len(self._asked)
                if not self._send((number, launch.path, launch.module, launch.kernel, launch.arguments, launch.options)):
                    return
                self.pending[launch] = number

    def wait(self, launch: Planned) -> None:
        """Returns when a launch is not being compiled: it is done, failed, was not asked for, or has not begun and is withdrawn."""
        if self._owner != os.getpid():
            self.pending.clear()
            return
        with self._lock:
            while self._hear(0):
                pass
            number = self.pending.get(launch)
            if number is None:
                return
            if number not in self._started:
                del self.pending[launch]
                self._send((number,))
                return
            while launch in self.pending:
                if not self._hear(_HANGS):
                    self.close()

    def close(self) -> None:
        """Ends the process; what it has not compiled, launches compile."""
        self.pending.clear()
        process, self._process = self._process, None
        if process is not None and self._owner == os.getpid():
            process.kill()
            process.communicate()

    def _ready(self) -> subprocess.Popen[bytes] | None:
        if self._process is not None and self._process.poll() is not None:
            self.close()
        if self._process is None:
            environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "CUDA_VISIBLE_DEVICES": ""}
            at_once = max(1, min(_MOST_AT_ONCE, (os.cpu_count() or 2) // 2))
            arguments = [*map(str, self.target), str(_PATIENCE), str(at_once)]
            try:
                self._process = subprocess.Popen(
                    [sys.executable, str(_WORKER), *arguments],
                    stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment, bufsize=0,
                )  # fmt: skip
            except OSError as error:
                log.debug("no process compiles kernels ahead", exc_info=error)
        return self._process

    def _send(self, message: Any) -> bool:
        process = self._ready()
        if process is None or process.stdin is None:
            return False
        try:
            data = pickle.dumps(message)
            process.stdin.write(len(data).to_bytes(4) + data)
        except OSError:  # it has just ended
            self.close()
            return False
        return True

    def _hear(self, seconds: float) -> bool:
        """Takes note of one message; False where none comes in time, or the process has ended."""
        if self._process is None or self._process.stdout is None:
            return False
        pipe = self._process.stdout
        ready = select.poll()  # select.select() takes no descriptor from 1024 on
        ready.register(pipe, select.POLLIN | select.POLLHUP)
        if not ready.poll(1e3 * seconds):
            return False
        line = pipe.readline().decode().split(maxsplit=2)
        if not line:
            self.close()
            return False
        what, number, *rest = line
        if what == "started":
            self._started.add(int(number))
            return True
        log.debug("kernel %s compiled ahead: %s", number, *rest or ["done"])
        self.pending = {launch: other for launch, other in self.pending.items() if other != int(number)}
        return True


_compiler: Compiler | None = None
_making = threading.Lock()


def compiler(target: tuple[str, int, int]) -> Compiler:
    """The process's one compiler; another one where the target is another."""
    global _compiler
    with _making:
        if _compiler is None or _compiler.target != target or _compiler._owner != os.getpid():
            if _compiler is not None:
                _compiler.close()
            _compiler = Compiler(target)
        return _compiler


@atexit.register
def close() -> None:
    """Ends the process that compiles ahead, if there is one."""
    if _compiler is not None:
        _compiler.close()
