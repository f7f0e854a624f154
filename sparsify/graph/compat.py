"""Differences between the supported torch releases (2.11 to 2.14). No other module may ask for a torch version."""

from __future__ import annotations

import functools
import inspect
import logging
import os
import threading
import types
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.fx.experimental._config
from torch import fx
from torch._dynamo import convert_frame, eval_frame, symbolic_convert
from torch._dynamo import utils as dynamo_utils
from torch._dynamo.guards import DeletedGuardManagerWrapper

log = logging.getLogger(__name__)

# operators as which torch 2.14 traces attributes that are views
_ATTRIBUTES: dict[Any, str] = {torch.ops.aten.numpy_T: "T", torch.ops.aten.mT: "mT", torch.ops.aten.matrix_H: "H", torch.ops.aten.mH: "mH"}


def operator_word(node: fx.Node) -> str:
    """Name of a call's operator: `eq` for `operator.eq`, for the method `eq`, and for the method `__eq__`, which torch 2.11 traces in place
    of the operator."""
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return name[2:-2] if name.startswith("__") and name.endswith("__") else name


def attribute(node: fx.Node) -> str:
    """Name of the tensor attribute that a node reads, `mT` for `getattr(x, "mT")`; empty for any other node. torch 2.14 traces T, mT, H and
    mH as operators."""
    if node.op != "call_function" or node.kwargs:
        return ""
    return str(node.args[1]) if node.target is getattr else _ATTRIBUTES.get(node.target, "")


def symbol_values(shape_env: Any) -> dict[Any, Any]:
    """Value of every backed symbol in the example inputs. The attribute has another name in torch 2.11."""
    return shape_env.backed_var_to_val if hasattr(shape_env, "backed_var_to_val") else shape_env.var_to_val


def use_inductors_kernel_cache(device: torch.device) -> None:
    """Makes Triton's cache folder the one that Inductor sets at its first kernel, where the user has set none."""
    from torch._inductor.runtime import runtime_utils

    os.environ.setdefault("TRITON_CACHE_DIR", getattr(runtime_utils, "triton_cache_dir")(device.index or 0))  # noqa: B009  (from elsewhere)


@functools.cache
def prepare_inductor() -> None:
    """Starts the processes in which Inductor compiles kernels, and threads that compute what its caches are keyed by, hashes over the files
    of torch and Triton: each takes seconds, for which the first graph would wait. Once in a process."""
    try:
        from torch._inductor import codecache
        from torch._inductor.async_compile import AsyncCompile
        from torch._inductor.runtime import triton_compat

        AsyncCompile.use_process_pool()
        for key in (codecache.torch_key, triton_compat.triton_key):
            threading.Thread(target=key, name="sparsify cache keys", daemon=True).start()
    except Exception as error:  # nothing depends on it
        log.debug("Inductor prepares itself when it compiles", exc_info=error)


@functools.cache
def cpp_obstacle() -> str | None:
    """Why Inductor cannot compile C++ here; None where it can."""
    try:
        from torch._inductor.cpp_builder import get_cpp_compiler

        get_cpp_compiler()
    except Exception as error:
        log.debug("no C++ compiler", exc_info=error)
        return "no C++ compiler (install g++, or set CXX)"
    return None


def compiled_graphs() -> int:
    """How many graphs Dynamo has handed to a backend in this process, in all threads."""
    return dynamo_utils.counters["stats"]["unique_graphs"]


def frame_scopes() -> dict[str, Any]:
    """Locals ("L") and globals ("G") of the frame that Dynamo is compiling in this thread; empty outside of a compilation."""
    frame = getattr(symbolic_convert.tls, "current_tx", None)
    return {"L": frame.f_locals, "G": frame.f_globals} if frame is not None else {}


# keywords of torch.compile that exclude a function's other compilations from its recompilation limit; none in torch 2.11
ISOLATED = {"isolate_recompiles": True} if "isolate_recompiles" in inspect.signature(torch.compile).parameters else {}


def after_compiling(hook: Callable[[types.CodeType, types.CodeType], None]) -> Any:
    """Calls `hook(code, compiled code)` after each frame that Dynamo compiles, in any thread, until `remove()` of the returned handle."""
    return convert_frame.register_bytecode_hook(cast(Any, hook))


def forget(code: types.CodeType, backend: Callable[..., Any]) -> None:
    """Discards what was compiled of `code` with this backend object."""
    entries = eval_frame._debug_get_cache_entry_list(code)
    mine = [entry for entry in entries if getattr(entry.backend, "compiler_fn", entry.backend) is backend]
    if len(mine) == len(entries):
        eval_frame.reset_code(code)  # pyright: ignore[reportPrivateImportUsage]
        return
    for entry in mine:
        cast(Any, entry.guard_manager.extra_state).invalidate(entry, DeletedGuardManagerWrapper("compiled for one call"))


def graph_breaks_after(gm: fx.GraphModule) -> bool:
    """Whether a graph break ends this graph, so that the captured call goes on in another one."""
    return bool(getattr(getattr(gm, "compile_subgraph_reason", None), "graph_break", False))


@contextmanager
def independent_sizes() -> Generator[None]:
    """What is captured in this block with sizes that vary takes none of them for another because they are equal at the moment, and none of
    a module's floats for one that varies."""
    settings: Any = torch.fx.experimental._config  # torch installs `patch` when it loads the module
    with settings.patch(use_duck_shape=False), torch._dynamo.config.patch(specialize_float=True):
        yield
