"""What the operands of our ops must be, asked while a graph is rewritten: what does not fit refuses its site, so that nothing of ours first
fails within a user's call.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import sympy
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from sparsify.errors import UnsupportedError
from sparsify.masks.symbolic import Facts, sizes

# sizes by letter, the same letter being the same size; "b1" is b or 1, "_" anything; then what it holds: "same" as the first operand
_ROWS = {"key_flags": ("b1 k", "integers"), "segments": ("b1 k", "integers"), "query_start": ("", "integers")}
_SELECTION = {"query": ("b h q d", "same"), "key": ("b g k d", "same"), **_ROWS}
_BUFFERS = {"positions": ("b g c", "integers"), "counts": ("b g", "integers"), "seen": ("b", "integers"), "length": ("", "integers")}
_WEIGHTS = {
    **dict.fromkeys(("up", "gate", "down"), ("_ _", "same")),
    **dict.fromkeys(("up_bias", "gate_bias", "down_bias"), ("_", "same")),
    **dict.fromkeys(("norm_weight", "norm_bias", "post_weight", "post_bias"), ("_", "floats")),
}
_OPERANDS: dict[str, dict[str, tuple[str, str]]] = {
    "attention": {
        **_SELECTION,
        "value": ("b g k e", "same"),
        "block_counts": ("b h _", "integers"),
        "block_indices": ("b h _ _", "integers"),
        "sink_logits": ("h", "floats"),
        "alibi_slopes": ("b1 h", "floats"),
        "key_bias": ("b1 h1 k", "floats"),
        "hidden_bias": ("b1 h1 k", "floats"),
    },
    "select_blocks": _SELECTION,
    "sparse_attention": {**_SELECTION, "value": ("b g k e", "same")},
    "cache_decode": {
        "query": ("b h 1 d", "floats"),
        "key": ("b g 1 d", "floats"),
        "value": ("b g 1 e", "floats"),
        "keys": ("b g c d", "floats"),
        "values": ("b g c e", "floats"),
        "sink_logits": ("h", "floats"),
        **_BUFFERS,
    },
    "ffn": _WEIGHTS,
}


def plain_tensor(tensor: Tensor) -> bool:
    """Whether kernels may read a tensor's memory: subclasses (quantised, nested, distributed) say by themselves what they hold."""
    return isinstance(tensor, FakeTensor) or type(tensor) in (Tensor, torch.nn.Parameter, torch.nn.Buffer)


def check(op: torch._ops.OpOverload, args: tuple[Any, ...], options: Mapping[str, Any], shape_env: object) -> None:
    """Example values of a call of one of our ops.

    Raises:
        UnsupportedError: an operand's kind, shape, dtype or device is not what the op takes. Sizes that may be equal are taken to be: the
            program that is rewritten would fail otherwise.
    """
    call = dict(zip((a.name for a in op._schema.arguments), args, strict=False)) | dict(options)
    what = _trouble(op._opname, call, Facts(shape_env))
    if what:
        raise UnsupportedError(what, where=f"sparsify::{op._opname}")


def _trouble(op: str, call: dict[str, Any], facts: Facts) -> str:
    tensors = {name: value for name, value in call.items() if isinstance(value, Tensor)}
    for name, tensor in tensors.items():
        if not plain_tensor(tensor):
            return f"{name} is a {type(tensor).__name__}"
    first = next(iter(tensors.values()))
    differ = lambda a, b: a != b and facts.holds(sympy.Ne(a, b))
    known: dict[str, sympy.Expr] = {}
    for name, (letters, holds) in _OPERANDS.get(op, {}).items():
        if name not in tensors:
            continue
        tensor = tensors[name]
        if tensor.device != first.device and name != "query_start":
            return f"{name} is on {tensor.device}, not {first.device}"
        if holds == "same" and tensor.dtype is not first.dtype:
            return f"{name} is {tensor.dtype}, not {first.dtype}"
        if tensor.is_floating_point() is (holds == "integers") or tensor.is_complex():
            return f"{name} is {tensor.dtype}, not {'integers' if holds == 'integers' else 'floating point'}"
        shape, wanted = sizes(tensor), letters.split()
        if not wanted:
            if tensor.numel() != 1:
                return f"{name} has {tensor.numel()} elements, not one"
            continue
        if len(shape) != len(wanted):
            return f"{name} has {len(shape)} dimensions, not {len(wanted)}"
        for size, letter in zip(shape, wanted):
            if letter == "_" or (letter[1:] == "1" and size == 1):
                continue
            if differ(size, sympy.Integer(1) if letter == "1" else known.setdefault(letter[0], size)):
                return f"{name} is {list(tensor.shape)}: {letter[0]} is {known.get(letter[0], 1)} elsewhere"
    if "h" in known and "g" in known and facts.holds(sympy.Ne(known["h"] % known["g"], 0)):
        return f"{known['h']} query heads are no multiple of {known['g']} KV heads"
    return _weights(call, differ) if op == "ffn" else ""


def _weights(call: dict[str, Any], differ: Any) -> str:
    """Whether the matrices of a feed-forward block fit each other."""
    rows, (*read_rows, hidden) = sizes(call["residual"]), sizes(call["input"])
    if len(rows) != len(read_rows) + 1 or any(map(differ, rows, (*read_rows, hidden))) or call["residual"].dtype is not call["input"].dtype:
        return f"input is {list(call['input'].shape)} {call['input'].dtype}, not as the residual sum"
    turned = lambda name: sizes(call[name])[:: -1 if call["transposed"] else 1]
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
