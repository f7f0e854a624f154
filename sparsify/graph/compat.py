"""What differs between the torch releases that sparsify supports (2.11 to 2.14). Nothing else may ask for a version."""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch._dynamo import convert_frame, eval_frame, symbolic_convert
from torch._dynamo.guards import DeletedGuardManagerWrapper

# the operators behind the views that are written as attributes
_ATTRIBUTES = {torch.ops.aten.numpy_T: "T", torch.ops.aten.mT: "mT", torch.ops.aten.matrix_H: "H", torch.ops.aten.mH: "mH"}


def operator_word(node: fx.Node) -> str:
    """The operator of a call in one word: `eq` for `operator.eq`, for the method `eq`, and for the method `__eq__` that torch 2.11 traces
    where later releases trace the operator."""
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return name[2:-2] if name.startswith("__") and name.endswith("__") else name


def attribute(node: fx.Node) -> str:
    """The attribute of a tensor that a node reads, `mT` of `getattr(x, "mT")`; empty for any other node. For T, mT, H and mH torch 2.14
    traces the operator behind them."""
    if node.op != "call_function" or node.kwargs:
        return ""
    return node.args[1] if node.target is getattr else _ATTRIBUTES.get(node.target, "")


def symbol_values(shape_env: Any) -> dict[Any, Any]:
    """The example's value of every backed symbol. torch 2.11 keeps them under an older name."""
    return shape_env.backed_var_to_val if hasattr(shape_env, "backed_var_to_val") else shape_env.var_to_val


def frame_scopes() -> dict[str, Any]:
    """Locals ("L") and globals ("G") of the frame that Dynamo compiles at the moment in this thread; empty outside of a compilation."""
    frame = getattr(symbolic_convert.tls, "current_tx", None)
    return {"L": frame.f_locals, "G": frame.f_globals} if frame is not None else {}


# keywords of torch.compile under which a function's other compilations do not count towards its limit of recompilations; not in torch 2.11
ISOLATED = {"isolate_recompiles": True} if "isolate_recompiles" in inspect.signature(torch.compile).parameters else {}


def after_compiling(hook: Callable[[types.CodeType, types.CodeType], None]) -> Any:
    """Calls `hook(code, compiled code)` after each frame that Dynamo compiles in any thread, until `remove()` of what is returned."""
    return convert_frame.register_bytecode_hook(hook)


def forget(code: types.CodeType, backend: Callable[..., Any]) -> None:
    """Takes away what was compiled of `code` with this very backend."""
    entries = eval_frame._debug_get_cache_entry_list(code)
    mine = [entry for entry in entries if getattr(entry.backend, "compiler_fn", entry.backend) is backend]
    if len(mine) == len(entries):
        eval_frame.reset_code(code)
        return
    for entry in mine:
        entry.guard_manager.extra_state.invalidate(entry, DeletedGuardManagerWrapper("compiled for one call"))


def graph_breaks_after(gm: fx.GraphModule) -> bool:
    """Whether the call that Dynamo captures goes on after this graph, in another one."""
    return bool(getattr(getattr(gm, "compile_subgraph_reason", None), "graph_break", False))
