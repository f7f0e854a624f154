"""Reads activations and norms out of the elementwise nodes of a Dynamo graph."""

from __future__ import annotations

import math
import operator
import typing
from types import SimpleNamespace
from typing import Any

import sympy
import torch
import torch.nn.functional as F
from torch import fx
from torch._C import _nn  # pyright: ignore[reportAttributeAccessIssue]  # not in torch's stubs

from sparsify.graph.aliasing import example_tensor, tensor_of, written
from sparsify.graph.calls import Unbound, bind
from sparsify.masks.symbolic import sizes
from sparsify.matching.sites import Activation, Norm, NormKind

_FUNCTIONS: dict[Any, str] = {
    F.linear: "linear", _nn.linear: "linear", torch.addmm: "addmm", torch.matmul: "matmul", operator.matmul: "matmul",
    operator.mul: "mul", torch.mul: "mul", operator.add: "add", torch.add: "add", operator.iadd: "iadd", operator.pow: "pow",
    torch.pow: "pow", torch.tanh: "tanh", torch.rsqrt: "rsqrt", operator.getitem: "getitem", torch.chunk: "chunk", torch.split: "split",
    F.silu: "silu", F.gelu: "gelu", _nn.gelu: "gelu", F.relu: "relu", torch.relu: "relu", F.dropout: "dropout",
    torch.dropout: "dropout", F.layer_norm: "layer_norm", torch.layer_norm: "layer_norm", F.rms_norm: "rms_norm",
    torch.reshape: "reshape", torch.topk: "topk", torch.mean: "mean", operator.truediv: "truediv",
}  # fmt: skip
_METHODS = {
    "add", "addmm", "chunk", "float", "getitem", "matmul", "mean", "mul", "pow", "relu", "reshape", "rsqrt", "split", "tanh", "to", "topk",
    "type_as", "view",
}  # fmt: skip
VIEWS = ("view", "reshape")
CASTS = ("to", "float", "type_as")
_Coefficients = dict[tuple[int, ...], float]  # of a polynomial, by the powers of its symbols
_GELU_SLOPE, _GELU_CUBIC = math.sqrt(2 / math.pi), 0.044715


def op_kind(node: Any) -> str:
    """What a node computes, in one word; empty for anything that is not read here."""
    if not isinstance(node, fx.Node):
        return ""
    if node.op == "call_function":
        try:
            return _FUNCTIONS.get(node.target, "")
        except TypeError:
            return ""
    return str(node.target) if node.op == "call_method" and node.target in _METHODS else ""


def bind_or_none(node: fx.Node, *signatures: str) -> SimpleNamespace | None:
    """The arguments of a call, None where it has another form."""
    try:
        return bind(node, *signatures)
    except Unbound:
        return None


def binary_operands(node: fx.Node) -> tuple[Any, Any] | None:
    """The two terms of a sum, or factors of a product."""
    call = bind_or_none(node, "input, other, *, alpha=1")
    return (call.input, call.other) if call is not None and call.alpha == 1 else None


def is_parameter(node: Any, dims: int) -> bool:
    """Whether a node is a graph input or attribute of so many dimensions, of a floating dtype."""
    tensor = tensor_of(node)
    return tensor is not None and node.op in ("placeholder", "get_attr") and tensor.dim() == dims and tensor.is_floating_point()


def is_inactive_dropout(node: fx.Node) -> bool:
    """Whether a dropout does nothing."""
    call = bind_or_none(node, "input, p, train" if node.target is torch.dropout else "input, p=0.5, training=True, inplace=False")
    return call is not None and (getattr(call, "training", getattr(call, "train", True)) is False or call.p == 0)


def constant_factor(node: fx.Node, factor: fx.Node) -> float | None:
    """The number that a product multiplies `factor` with."""
    factors = binary_operands(node)
    if factors is None:
        return None
    other = factors[1] if factors[0] is factor else factors[0]
    return float(other) if isinstance(other, (int, float)) and not isinstance(other, bool) else None


# -- activations -----------------------------------------------------------------------------------------------------------------------


def match_activation(node: Any) -> tuple[Activation, fx.Node, tuple[fx.Node, ...]] | None:
    """(name, argument, nodes) when a node is silu, gelu, gelu_tanh or relu of its argument."""
    kind = op_kind(node)
    if kind in ("silu", "relu") and not written(node):
        call = bind_or_none(node, "input: tensor, inplace=False")
        return (kind, call.input, (node,)) if call is not None else None
    if kind == "gelu":
        call = bind_or_none(node, "input: tensor, approximate: str = 'none'")
        names: dict[str, Activation] = {"none": "gelu", "tanh": "gelu_tanh"}
        return (names[call.approximate], call.input, (node,)) if call is not None and call.approximate in names else None
    return _tanh_polynomial(node) if kind == "mul" else None


def _tanh_polynomial(node: fx.Node) -> tuple[Activation, fx.Node, tuple[fx.Node, ...]] | None:
    """The tanh form of gelu written out: x/2 · (1 + tanh(√(2/π) · (x + 0.044715 x³))), in any arrangement of sums and products."""
    symbol = sympy.Symbol("x")
    values: dict[fx.Node, sympy.Expr] = {}
    sources: set[fx.Node] = set()

    def read(here: Any) -> sympy.Expr:
        if isinstance(here, (int, float)):
            return sympy.Float(here)
        if here not in values:
            kind = op_kind(here)
            operands = _operands(here) if kind in ("add", "mul", "pow") and len(values) < 16 else None
            if operands is not None:
                left, right = map(read, operands)
                values[here] = left + right if kind == "add" else left * right if kind == "mul" else left**right
            elif kind == "tanh" and len(here.args) == 1 and not here.kwargs:
                values[here] = sympy.tanh(read(here.args[0]))
            else:
                sources.add(here)
                return symbol
        return values[here]

    expr = sympy.nsimplify(sympy.expand(read(node)), rational=True)
    tanhs = expr.atoms(sympy.tanh)
    if len(sources) != 1 or len(tanhs) != 1:
        return None
    (curve,) = tanhs
    saturation = sympy.Symbol("t")
    outer = _coefficients(expr.subs(curve, saturation), symbol, saturation)
    inner = _coefficients(typing.cast(sympy.Expr, curve.args[0]), symbol)
    wanted = ({(1, 0): 0.5, (1, 1): 0.5}, {(1,): _GELU_SLOPE, (3,): _GELU_SLOPE * _GELU_CUBIC})
    if not (_close(outer, wanted[0]) and _close(inner, wanted[1])):
        return None
    return "gelu_tanh", sources.pop(), tuple(values)


def _operands(node: fx.Node) -> tuple[Any, Any] | None:
    call = bind_or_none(node, "input, exponent") if op_kind(node) == "pow" else None
    return (call.input, call.exponent) if call is not None else binary_operands(node) if op_kind(node) != "pow" else None


def _coefficients(expr: sympy.Expr, *symbols: sympy.Symbol) -> _Coefficients | None:
    try:
        return {powers: float(c) for powers, c in sympy.Poly(sympy.expand(expr), *symbols).terms()}
    except (sympy.PolynomialError, TypeError):
        return None


def _close(found: _Coefficients | None, wanted: _Coefficients) -> bool:
    return found is not None and found.keys() == wanted.keys() and all(abs(found[k] - wanted[k]) <= 1e-6 * abs(wanted[k]) for k in wanted)


# -- norms -----------------------------------------------------------------------------------------------------------------------------


def match_norm(node: Any) -> tuple[Norm, fx.Node, tuple[fx.Node, ...]] | None:
    """(norm, what it normalises, its nodes) when a node is a norm over the last dimension with a weight of its own."""
    if op_kind(node) in ("layer_norm", "rms_norm"):
        return _library_norm(node)
    cast, body = _uncast(node)
    factors = binary_operands(body) if op_kind(body) == "mul" else None
    for left, right in (factors, factors[::-1]) if factors else ():
        weight = _norm_weight(left)
        unit = _unit_rms(right) if weight else None
        if weight is None or unit is None:
            continue
        parameter, offset, weight_nodes = weight
        source, eps, inner_cast, unit_nodes = unit
        if inner_cast and example_tensor(right).dtype is not example_tensor(source).dtype:
            return None
        exact = example_tensor(source).dtype == torch.float32
        if example_tensor(node).dtype != example_tensor(source).dtype or (offset and inner_cast and not exact):
            return None
        kind: NormKind = "rms_offset" if offset else "rms" if inner_cast or (exact and not cast) else "rms_fp32"
        if sizes(example_tensor(parameter))[0] != sizes(example_tensor(source))[-1]:
            return None
        return Norm(kind, parameter, None, eps), source, tuple(dict.fromkeys((*unit_nodes, *weight_nodes, body, node)))
    return None


def _library_norm(node: fx.Node) -> tuple[Norm, fx.Node, tuple[fx.Node, ...]] | None:
    layer = op_kind(node) == "layer_norm"
    more = "bias=None, eps=1e-5, cudnn_enable=True" if layer else "eps=None"
    call = bind_or_none(node, f"input: tensor, normalized_shape, weight=None, {more}")
    if call is None or not isinstance(call.normalized_shape, (tuple, list)) or len(call.normalized_shape) != 1:
        return None
    bias = call.bias if layer else None
    if not isinstance(call.eps, float) or not is_parameter(call.weight, 1) or not (bias is None or is_parameter(bias, 1)):
        return None
    return Norm("layer" if layer else "rms_fp32", call.weight, bias, call.eps), call.input, (node,)


def _uncast(node: Any) -> tuple[bool, Any]:
    """Looks through one change of dtype."""
    kind = op_kind(node)
    if kind == "type_as" or kind == "float" or (kind == "to" and len(node.args) == 2 and isinstance(node.args[1], torch.dtype)):
        return True, node.args[0]
    return False, node


def _norm_weight(node: Any) -> tuple[fx.Node, bool, tuple[fx.Node, ...]] | None:
    """(parameter, whether 1 is added, nodes)."""
    nodes: list[fx.Node] = []
    offset = False
    terms = binary_operands(node) if op_kind(node) == "add" else None
    if terms is not None and 1.0 in terms:
        offset = True
        nodes.append(node)
        node = terms[1] if terms[0] == 1.0 else terms[0]
    cast, inner = _uncast(node)
    if cast and isinstance(inner, fx.Node) and example_tensor(node).dtype is torch.float32:
        nodes.append(node)
        node = inner
    return (node, offset, tuple(nodes)) if is_parameter(node, 1) else None


def _unit_rms(node: Any) -> tuple[fx.Node, float, bool, tuple[fx.Node, ...]] | None:
    """x · rsqrt(mean(x²) + eps) in float32: (x, eps, whether the result is cast before the weight, nodes)."""
    cast, body = _uncast(node)
    factors = binary_operands(body) if op_kind(body) == "mul" else None
    for wide, root in (factors, factors[::-1]) if factors else ():
        if op_kind(root) != "rsqrt" or len(root.args) != 1 or root.kwargs or op_kind(root.args[0]) != "add":
            continue
        total = root.args[0]
        terms = binary_operands(total)
        if terms is None:
            continue
        mean, eps = terms if isinstance(terms[0], fx.Node) else terms[::-1]
        square = _mean_of_last(mean) if op_kind(mean) == "mean" else None
        if square is None or not isinstance(eps, (int, float)):
            continue
        if op_kind(square) != "pow" or _operands(square) != (wide, 2) or example_tensor(wide).dtype != torch.float32:
            continue
        upcast, source = _uncast(wide)
        nodes = [square, mean, total, root, body]
        nodes += ([wide] if upcast else []) + ([node] if cast else [])
        return source if upcast else wide, float(eps), cast, tuple(nodes)
    return None


def _mean_of_last(node: fx.Node) -> fx.Node | None:
    """What is averaged over its last dimension, which is kept."""
    call = bind_or_none(node, "input: tensor, dim, keepdim=False")
    return call.input if call is not None and call.dim in (-1, (-1,), [-1]) and call.keepdim is True else None
