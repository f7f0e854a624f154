"""The process that compiles kernels ahead: `ahead` starts it as a script, so that it imports Triton and torch alone.

    python ahead_worker.py BACKEND ARCHITECTURE WARP_SIZE PATIENCE AT_ONCE

It reads requests from its standard input, each a length (4 bytes, big endian) and a pickled tuple, and writes `started N` and `done N` or
`failed N ERROR` lines. A request of a number alone withdraws one that has not begun. It ends with its input, or after PATIENCE seconds
without work. It never touches a GPU.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import pickle
import select
import sys
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any


class Driver:
    """Stands for the driver of a GPU that is described, as far as compiling asks for it."""

    def __init__(self, target: Any):
        self.target = target

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


_modules: dict[str, Any] = {}
_loading = threading.Lock()


def load(path: str, name: str) -> Any:
    """A generated module, under the name that it has in the other process: Triton's cache key is made of it."""
    with _loading:
        if name not in _modules:
            spec = importlib.util.spec_from_file_location(name, path)
            assert spec is not None and spec.loader is not None
            _modules[name] = sys.modules[name] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(_modules[name])
        return _modules[name]


def value_of(described: tuple[Any, ...]) -> Any:
    """A value that Triton compiles the same for as for the one that was described."""
    from triton.runtime.jit import MockTensor

    kind, *rest = described
    if kind == "pointer":
        dtype, aligned = rest
        tensor = MockTensor(dtype)
        if not aligned:
            setattr(tensor, "data_ptr", lambda: 2)  # noqa: B010
        return tensor
    if kind == "descriptor":
        module, name, dtype, fields = rest
        descriptor = object.__new__(getattr(importlib.import_module(module), name))
        given = dict(fields)
        size = len(given["block_shape"])
        given |= {"base": MockTensor(dtype), "shape": [16] * size, "strides": [16] * (size - 1) + [1]}
        descriptor.__dict__.update(given | {"block_shape": list(given["block_shape"])})
        return descriptor
    return {"float": 1.5, "none": None}[kind] if not rest else rest[0]


def read(pipe: int, size: int) -> bytes:
    """So many bytes; fewer where the pipe ends."""
    found = b""
    while len(found) < size and (more := os.read(pipe, size - len(found))):
        found += more
    return found


def compile_kernel(path: str, module: str, kernel: str, arguments: tuple[Any, ...], options: tuple[tuple[str, Any], ...]) -> None:
    getattr(load(path, module), kernel).warmup(*map(value_of, arguments), grid=(1,), **dict(options))


def main() -> None:
    backend, architecture, warp_size, patience, at_once = sys.argv[1:]
    requests, answers = os.dup(0), os.dup(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # whatever else is printed
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    active: Any = Driver(GPUTarget(backend, int(architecture), int(warp_size)))
    driver.set_active(active)
    import torch  # noqa: F401  # pyright: ignore[reportUnusedImport]  # Triton asks for it at the first kernel

    pool, writing = ThreadPoolExecutor(int(at_once)), threading.Lock()
    asked: dict[int, Future[None]] = {}

    def tell(text: str) -> None:
        with writing:
            os.write(answers, f"{text}\n".encode())

    def serve(number: int, *request: Any) -> None:
        tell(f"started {number}")
        try:
            compile_kernel(*request)
        except BaseException as error:
            tell(f"failed {number} {type(error).__name__} {' '.join(str(error).split())[:500]}")
        else:
            tell(f"done {number}")

    while True:
        if not select.select([requests], [], [], float(patience))[0]:
            if all(work.done() for work in asked.values()):
                break
            continue
        size = read(requests, 4)
        if len(size) < 4:
            break
        number, *request = pickle.loads(read(requests, int.from_bytes(size)))
        if not request:
            if number in asked:
                asked[number].cancel()
        else:
            asked[number] = pool.submit(serve, number, *request)
    os._exit(0)  # whatever is being compiled


if __name__ == "__main__":
    main()
