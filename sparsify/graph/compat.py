"""Differences between the supported torch releases (2.11 to 2.14). No other module may ask for a torch version."""

from __future__ import annotations

import contextvars
import functools
import inspect
import logging
import os
import threading
import types
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.fx.experimental._config
from torch import fx
from torch._C._dynamo.eval_frame import get_eval_frame_callback
from torch._dynamo import convert_frame, eval_frame, symbolic_convert
from torch._dynamo import utils as dynamo_utils
from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException
from torch._dynamo.guards import DeletedGuardManagerWrapper
from torch._guards import TracingContext
from torch.fx import _symbolic_trace
from torch.utils import _python_dispatch

from sparsify.errors import UnsupportedError

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
    mine = _compiled_with(entries, backend)
    if len(mine) == len(entries):
        eval_frame.reset_code(code)  # pyright: ignore[reportPrivateImportUsage]
        return
    for entry in mine:
        entry.guard_manager.extra_state.invalidate(entry, DeletedGuardManagerWrapper("compiled for one call"))


def _compiled_with(entries: Sequence[Any], backend: Callable[..., Any]) -> list[Any]:
    """Those of Dynamo's entries that are of this backend object."""
    return [entry for entry in entries if getattr(entry.backend, "compiler_fn", entry.backend) is backend]


def compiled_whole(code: types.CodeType, backend: Callable[..., Any]) -> list[tuple[Any, types.CodeType]]:
    """What Dynamo has compiled of this code with this backend object: guards, for `still_holds`, and compiled code, which calls one graph
    and leaves nothing to be compiled behind it. The last that was used comes first. A stance may have had others compile it, too."""
    entries = _compiled_with(eval_frame._debug_get_cache_entry_list(code), backend)
    found: list[tuple[Any, Any]] = [(entry.guard_manager, entry.code) for entry in entries]
    return [(guards, compiled) for guards, compiled in found if isinstance(compiled, types.CodeType) and _is_one_graph(compiled)]


def _is_one_graph(compiled: types.CodeType) -> bool:
    graphs = [name for name in compiled.co_names if name.startswith("__compiled_fn")]
    return len(graphs) == 1 and not any(name.startswith("__resume_at") for name in compiled.co_names)


def still_holds(guards: Any, frame: dict[str, Any]) -> bool:
    """Whether guards of `compiled_whole` hold for a call with these locals, and Dynamo has not thrown their code away: guards over an
    object that is gone might take another one for it."""
    return guards.cache_entry is not None and guards.check(frame)


def dynamo_is_idle() -> bool:
    """Whether nothing is asked of Dynamo in this thread beside calls of compiled code: no stance, no trace, no frame that it evaluates."""
    stance = eval_frame._stance
    return (
        stance.stance == "default"
        and stance.backend is None
        and get_eval_frame_callback() is None
        and TracingContext.try_get() is None
        and not _symbolic_trace.is_fx_symbolic_tracing()
        and not torch._C._is_tracing()
        and not torch.compiler.is_exporting()
    )


def graph_breaks_after(gm: fx.GraphModule) -> bool:
    """Whether a graph break ends this graph, so that the captured call goes on in another one."""
    return bool(getattr(getattr(gm, "compile_subgraph_reason", None), "graph_break", False))


@contextmanager
def independent_sizes() -> Generator[None]:
    """What is captured in this block with sizes that vary takes none of them for another because they are equal at the moment, and none of
    a module's floats for one that varies."""
    settings: Any = torch.fx.experimental._config  # torch installs `patch` when it loads the module
    with _held(settings, use_duck_shape=False), _held(torch._dynamo.config, specialize_float=True):
        yield


def compile_in_threads(function: Callable[..., Any], *, dynamic: bool | None = None, **how: Any) -> Callable[..., Any]:
    """`torch.compile(function, dynamic=dynamic, **how)`, for calls that overlap in threads too.

    torch holds `dynamic` in its settings for as long as a call takes. Where they are the process's, threads that overlap leave it there,
    and whatever is compiled later in the process gets sizes that vary, or none that do.
    """
    if dynamic is None or _settings_of_threads():
        return torch.compile(function, dynamic=dynamic, **how)
    compiled = torch.compile(function, **how)
    values = {"assume_static_by_default": False} if dynamic else {"assume_static_by_default": True, "automatic_dynamic_shapes": False}

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        with _held(torch._dynamo.config, **values):
            return compiled(*args, **kwargs)

    return call


def captures_nothing() -> str:
    """Why Dynamo would run a function as it is in this thread, in a clause; empty where it would not. It would also capture nothing of that
    function's code any more in later calls, and raise where one graph is asked for."""
    if torch._dynamo.config.disable:
        return "torch._dynamo.config.disable is set"
    if torch._dynamo.config.inline_torch_dispatch_torch_compile:
        active = _python_dispatch.any_torch_dispatch_mode_on_stack()
    else:
        active = _python_dispatch.is_in_any_mode_without_ignore_compile_internals()
    return "a torch dispatch mode is active" if active else ""


def told_uncompiled(why: str, strict: bool) -> None:
    """Says that a model runs as it is for a reason of `captures_nothing`: a warning at the reason's first call.

    Raises:
        UnsupportedError: under `strict`.
    """
    if strict:
        raise UnsupportedError(f"nothing is compiled: {why}", where="strict", hint="strict = false runs the model as it is")
    log.log(logging.INFO if why in _told else logging.WARNING, "the model runs uncompiled: %s", why)
    _told.add(why)


_told: set[str] = set()


def asking_for_hooks(compiled: Callable[..., Any], function: Callable[..., Any], strict: bool) -> Callable[..., Any]:
    """The same as `compiled`, with guards that modules without hooks still have none. torch leaves these out: code that was compiled before
    a hook was registered would never call it.

    Args:
        function: what was compiled, to be called where nothing can be captured.
        strict: that is an UnsupportedError instead.
    """

    @functools.wraps(compiled)
    def call(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_dynamo_compiling():  # by somebody else, with guards of theirs
            return compiled(*args, **kwargs)
        if why := captures_nothing():
            told_uncompiled(why, strict)
            return function(*args, **kwargs)
        with _held(torch._dynamo.config, skip_nnmodule_hook_guards=False):
            return compiled(*args, **kwargs)

    return call


# what Dynamo raises where a function cannot be captured as one graph; beyond as many compilations as it keeps of one, an error of no family
CANNOT_CAPTURE = (TorchDynamoException, FailOnRecompileLimitHit)


def why_not_captured(error: Exception, what: str) -> str:
    """An error of `CANNOT_CAPTURE` as a clause."""
    if isinstance(error, FailOnRecompileLimitHit):
        most = torch._dynamo.config.recompile_limit
        return f"{what} was compiled in as many forms as torch keeps, {most} (torch._dynamo.config.recompile_limit)"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{what} cannot be captured as one graph: {lines[0] if lines else type(error).__name__}"


@functools.cache
def _settings_of_threads() -> bool:
    """Whether each thread has torch's settings for itself, as from torch 2.13 on."""
    settings: Any = torch._dynamo.config
    entry = settings._config["assume_static_by_default"]
    return isinstance(entry.user_override, contextvars.ContextVar)


# by setting of the process: how many blocks hold it, and the value before the first of them
_holders: dict[tuple[str, str], tuple[int, Any]] = {}
_holding = threading.Lock()


@contextmanager
def _held(settings: Any, **values: Any) -> Generator[None]:
    """Settings of torch with these values in the block. The last of the blocks that overlap in threads restores what the first found."""
    if _settings_of_threads():
        with settings.patch(**values):
            yield
        return
    with _holding:
        for name, value in values.items():
            count, before = _holders.get((settings.__name__, name), (0, getattr(settings, name)))
            _holders[settings.__name__, name] = count + 1, before
            setattr(settings, name, value)
    try:
        yield
    finally:
        with _holding:
            for name in values:
                count, before = _holders.pop((settings.__name__, name))
                if count > 1:
                    _holders[settings.__name__, name] = count - 1, before
                else:
                    setattr(settings, name, before)
