"""What the operands of our ops must be, asked while a graph is rewritten: what does not fit refuses its site, so that nothing of ours first
fails within a user's call.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import sympy
import torch
from torch import Tensor
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor

from sparsify.errors import UnsupportedError
from sparsify.graph.typed_torch import argument_names
from sparsify.masks.symbolic import Facts, sizes
from sparsify.ops.attention import AttentionCall
from sparsify.ops.cache import CacheAttentionCall, CacheBoundsCall, CacheDecodeCall, CacheMassCall, CacheStoreCall
from sparsify.ops.call import OpCall, Operand, misfit
from sparsify.ops.library import NAMESPACE
from sparsify.ops.linear import LinearCall
from sparsify.ops.pattern_attention import PatternAttentionCall
from sparsify.ops.patterns import SelectPatternCall
from sparsify.ops.reselection import CacheObserveCall, CacheReselectCall
from sparsify.ops.selection import SelectCall
from sparsify.ops.sparse_attention import SparseAttentionCall
from sparsify.ops.sums import SmallSumCall

_RECORDS = (
    AttentionCall, SelectCall, SparseAttentionCall, CacheStoreCall, CacheAttentionCall, CacheDecodeCall, CacheBoundsCall, CacheMassCall,
    CacheReselectCall, CacheObserveCall,
    LinearCall, SelectPatternCall, PatternAttentionCall, SmallSumCall,
)  # fmt: skip
_CALLS: dict[str, type[OpCall]] = {call.NAME: call for call in _RECORDS}
# what the operands of ops without a record must be
_OPERANDS: dict[str, dict[str, Operand]] = {
    "ffn": {
        **dict.fromkeys(("up", "gate", "down"), Operand("* *")),
        **dict.fromkeys(("up_bias", "gate_bias", "down_bias"), Operand("*")),
        **dict.fromkeys(("norm_weight", "norm_bias", "post_weight", "post_bias"), Operand("*", "floats")),
    },
    "ffn_parts": {
        **dict.fromkeys(("up", "gate", "down"), Operand("* *")),
        **dict.fromkeys(("up_bias", "gate_bias", "down_bias"), Operand("*")),
    },
}


def plain_tensor(tensor: Tensor) -> bool:
    """Whether kernels may read a tensor's memory: subclasses (quantised, nested, distributed) say by themselves what they hold."""
    return isinstance(tensor, FakeTensor) or type(tensor) in (Tensor, torch.nn.Parameter, torch.nn.Buffer)


def check(op: OpOverload, args: tuple[Any, ...], options: Mapping[str, Any], shape_env: object) -> None:
    """Checks a call of one of our ops while a graph is rewritten.

    Args:
        op: what is called.
        args, options: example values of its arguments.
        shape_env: what is known of symbolic sizes.

    Raises:
        UnsupportedError: an operand's kind, shape, dtype or device is not what the op takes. Sizes that may be equal are taken to be: the
            program that is rewritten would fail otherwise.
    """
    call = dict(zip(argument_names(op), args, strict=False)) | dict(options)
    what = _misfit(op.name().removeprefix(f"{NAMESPACE}::"), call, Facts(shape_env))
    if what:
        raise UnsupportedError(what, where=op.name())


def _misfit(op: str, call: dict[str, Any], facts: Facts) -> str:
    tensors = {name: value for name, value in call.items() if isinstance(value, Tensor)}
    for name, tensor in tensors.items():
        if not plain_tensor(tensor):
            return f"{name} is a {type(tensor).__name__}"

    def differ(one: sympy.Expr, other: sympy.Expr | int) -> bool:
        return one != other and facts.holds(sympy.Ne(one, other))

    if op in _CALLS:
        return _CALLS[op].bind(**call).misfit(sizes, differ)
    described = _OPERANDS.get(op, {})
    known = {name: tensor for name, tensor in tensors.items() if name in described}
    found = misfit(known, described, sizes, differ, next(iter(tensors.values()))) if known else ""
    return found or (_weights(call, differ) if op in ("ffn", "ffn_parts") else "")


def _weights(call: dict[str, Any], differ: Callable[[Any, Any], bool]) -> str:
    """Whether the matrices of a feed-forward block fit each other."""
    residual = call.get("residual", call["input"])
    rows, (*read_rows, hidden) = sizes(residual), sizes(call["input"])
    if len(rows) != len(read_rows) + 1 or any(map(differ, rows, (*read_rows, hidden))) or residual.dtype is not call["input"].dtype:
        return f"input is {list(call['input'].shape)} {call['input'].dtype}, not as the residual sum"

    def turned(name: str) -> tuple[sympy.Expr, ...]:
        return sizes(call[name])[:: -1 if call["transposed"] else 1]

    (wide, read), (written, intermediate) = turned("up"), turned("down")
    fused = 2 if call["layout"] in ("gate_up", "up_gate") else 1
    gate = turned("gate") if call.get("gate") is not None else (intermediate, hidden)
    if differ(wide, fused * intermediate) or any(map(differ, (read, written, *gate), (hidden, hidden, intermediate, hidden))):
        return f"up is {list(call['up'].shape)}, down {list(call['down'].shape)}"
    lengths = {"up_bias": wide, "gate_bias": intermediate, **dict.fromkeys(("down_bias", "norm_weight", "norm_bias"), hidden)}
    for name, length in (lengths | {"post_weight": hidden, "post_bias": hidden}).items():
        if call.get(name) is not None and differ(sizes(call[name])[0], length):
            return f"{name} has {sizes(call[name])[0]} elements, not {length}"
    return ""
