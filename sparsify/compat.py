"""What differs between the torch releases that sparsify supports (2.11 to 2.13). Nothing else may ask for a version."""

from __future__ import annotations

from typing import Any

from torch import fx
from torch._dynamo import symbolic_convert


def operator_word(node: fx.Node) -> str:
    """The operator of a call in one word: `eq` for `operator.eq`, for the method `eq`, and for the method `__eq__` that torch 2.11 traces
    where later releases trace the operator."""
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return name[2:-2] if name.startswith("__") and name.endswith("__") else name


def symbol_values(shape_env: Any) -> dict[Any, Any]:
    """The example's value of every backed symbol. torch 2.11 keeps them under an older name."""
    return shape_env.backed_var_to_val if hasattr(shape_env, "backed_var_to_val") else shape_env.var_to_val


def frame_scopes() -> dict[str, Any]:
    """Locals ("L") and globals ("G") of the frame that Dynamo compiles at the moment in this thread; empty outside of a compilation."""
    frame = getattr(symbolic_convert.tls, "current_tx", None)
    return {"L": frame.f_locals, "G": frame.f_globals} if frame is not None else {}
