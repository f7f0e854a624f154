"""C++ that is written here is compiled once a machine, by the compiler that Inductor would use, and called through ctypes.

The shared object lies beside its text in the cache folder; its name carries a hash of the text, the compiler, its flags and the CPU.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from sparsify import folders, progress
from sparsify.backends.codegen import cpp_library, source
from sparsify.errors import KernelError

_FLAGS = ("-std=c++17", "-O2", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fPIC", "-shared", "-pthread", "-w")
_SECONDS = 600
_DIGITS = 24

_lock = threading.Lock()
_failed: dict[str, KernelError] = {}  # by text: what failed once is not tried again
_TYPES: dict[str, Any] = {"int64_t": ctypes.c_int64, "double": ctypes.c_double, "float": ctypes.c_float}


def obstacle() -> str | None:
    """Why C++ cannot be compiled and loaded here; None where it can be."""
    if sys.platform == "win32":
        return "C++ kernels are not built on Windows"
    from sparsify.graph import compat  # which imports what may import Triton

    return compat.cpp_obstacle()


def struct_text(fields: Mapping[str, str]) -> str:
    """A C++ struct `Call` with these fields: C types by name, in order."""
    return "struct Call {\n" + "".join(f"    {kind} {name};\n" for name, kind in fields.items()) + "};\n"


@functools.cache
def struct_type(fields: tuple[tuple[str, str], ...]) -> type[ctypes.Structure]:
    """The same struct for ctypes; pointers are addresses."""
    members = [(name, _TYPES.get(kind, ctypes.c_void_p)) for name, kind in fields]
    return type("Call", (ctypes.Structure,), {"_fields_": members})


def call(text: str, name: str, fields: Mapping[str, str], values: Mapping[str, Any]) -> None:
    """Calls `extern "C" int <name>(const Call*)` of a text.

    Args:
        text: C++ behind the library's and the struct's.
        name: of the function, which returns 0, or 1 where memory ran out.
        fields: of the struct: C types by name.
        values: of the fields: numbers, tensors (which must live until the call returns), or None for a null pointer.

    Raises:
        KernelError: it could not be compiled, or memory ran out.
    """
    function = _load(text, name, tuple(fields.items()))
    plain = {key: value.data_ptr() if isinstance(value, torch.Tensor) else value for key, value in values.items()}
    record = struct_type(tuple(fields.items()))(**plain)
    if function(ctypes.byref(record)):
        raise KernelError("no memory for scratch", where=name) from MemoryError(name)


@functools.lru_cache(maxsize=64)
def _load(text: str, name: str, fields: tuple[tuple[str, str], ...]) -> Any:
    whole = cpp_library.TEXT + struct_text(dict(fields)) + text
    with _lock:  # one of several threads compiles
        if whole in _failed:
            raise _failed[whole]
        try:
            function = getattr(ctypes.CDLL(str(_built(whole, name))), name)
        except KernelError as error:
            _failed[whole] = error
            raise
    function.restype, function.argtypes = ctypes.c_int, [ctypes.c_void_p]
    return function


def _built(text: str, name: str) -> Path:
    """The shared object of a text, compiled where it is not there yet."""
    compiler = _compiler()
    key = "\0".join((text, compiler, _version(compiler), *_FLAGS, _cpu()))
    digest = hashlib.sha256(key.encode()).hexdigest()[:_DIGITS]
    written = source.write_text(text, f"{name}_{digest}.cpp")
    built = written.with_suffix(".so")
    folders.check(built.parent)
    if built.is_file() and not built.is_symlink():
        return built
    with progress.task(f"compiling C++ ({name})"):
        handle, temporary = tempfile.mkstemp(prefix=f"{built.stem}.", suffix=".so", dir=built.parent)
        os.close(handle)
        try:
            done = subprocess.run([compiler, *_FLAGS, str(written), "-o", temporary], capture_output=True, text=True, timeout=_SECONDS)
            if done.returncode:
                lines = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines() or ["no message"]
                raise KernelError(f"C++ could not be compiled: {lines[0]}", where=name, hint="kernels = 'reference' leaves it out")
            Path(temporary).replace(built)
        except (OSError, subprocess.SubprocessError) as error:
            raise KernelError(f"C++ could not be compiled: {error}", where=name, hint="kernels = 'reference' leaves it out") from error
        finally:
            Path(temporary).unlink(missing_ok=True)
    return built


@functools.cache
def _compiler() -> str:
    from torch._inductor.cpp_builder import get_cpp_compiler

    return get_cpp_compiler()


@functools.cache
def _version(compiler: str) -> str:
    return subprocess.run([compiler, "--version"], capture_output=True, text=True, timeout=_SECONDS).stdout


@functools.cache
def _cpu() -> str:
    """What `-march=native` depends on: a cache folder may be shared by machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = [platform.processor()]
    return platform.machine() + next((line for line in lines if line.startswith(("flags", "Features"))), lines[0] if lines else "")
