"""Reads activations and norms out of the elementwise nodes of a Dynamo graph."""

from __future__ import annotations

import math
import operator
from typing import Any

import sympy
import torch
import torch.nn.functional as F
from torch import fx

from sparsify.aliasing import tensor_of, written
from sparsify.sites import Norm
from sparsify.symbolic import sizes

_FUNCTIONS: dict[Any, str] = {
    F.linear: "linear", torch._C._nn.linear: "linear", torch.addmm: "addmm", torch.matmul: "matmul", operator.matmul: "matmul",
    operator.mul: "mul", torch.mul: "mul", operator.add: "add", torch.add: "add", operator.iadd: "iadd", operator.pow: "pow",
    torch.pow: "pow", torch.tanh: "tanh", torch.rsqrt: "rsqrt", operator.getitem: "getitem", torch.chunk: "chunk", torch.split: "split",
    F.silu: "silu", F.gelu: "gelu", torch._C._nn.gelu: "gelu", F.relu: "relu", torch.relu: "relu", F.dropout: "dropout",
    torch.dropout: "dropout", F.layer_norm: "layer_norm", torch.layer_norm: "layer_norm", F.rms_norm: "rms_norm",
    torch.reshape: "reshape", torch.topk: "topk", torch.mean: "mean", operator.truediv: "truediv",
}  # fmt: skip
_METHODS = {
    "add", "addmm", "chunk", "float", "getitem", "matmul", "mean", "mul", "pow", "relu", "reshape", "rsqrt", "split", "tanh", "to", "topk",
    "type_as", "view",
}  # fmt: skip
VIEWS = ("view", "reshape")
CASTS = ("to", "float", "type_as")
_GELU_SLOPE, _GELU_CUBIC = math.sqrt(2 / math.pi), 0.044715


def kind_of(node: Any) -> str:
    """What a node computes, in one word; empty for anything that is not read here."""
    if not isinstance(node, fx.Node):
        return ""
    if node.op == "call_function":
        try:
            return _FUNCTIONS.get(node.target, "")
        except TypeError:
            return ""
    return node.target if node.op == "call_method" and node.target in _METHODS else ""


def is_parameter(node: Any, dims: int) -> bool:
    """Whether a node is a graph input or attribute of so many dimensions, of a floating dtype."""
    tensor = tensor_of(node)
    return tensor is not None and node.op in ("placeholder", "get_attr") and tensor.dim() == dims and tensor.is_floating_point()


def inert(node: fx.Node) -> bool:
    """Whether a dropout does nothing."""
    arguments = dict(zip(("input", "p", "training", "inplace"), node.args, strict=False)) | node.kwargs
    # torch.dropout(input, p, train) and F.dropout(input, p=0.5, training=True)
    training = arguments.get("training", arguments.get("train", True))
    return training is False or arguments.get("p", 0.5) == 0


def scalar_of(node: fx.Node, factor: fx.Node) -> float | None:
    """The number that a product multiplies `factor` with."""
    if node.kwargs or len(node.args) != 2:
        return None
    other = node.args[1] if node.args[0] is factor else node.args[0]
    return float(other) if isinstance(other, (int, float)) and not isinstance(other, bool) else None


# -- activations -----------------------------------------------------------------------------------------------------------------------


def activation_of(node: Any) -> tuple[str, fx.Node, tuple[fx.Node, ...]] | None:
    """(name, argument, nodes) when a node is silu, gelu, gelu_tanh or relu of its argument."""
    kind = kind_of(node)
    if kind in ("silu", "relu") and isinstance(node.args[0], fx.Node) and not written(node):
        return kind, node.args[0], (node,)
    if kind == "gelu" and isinstance(node.args[0], fx.Node):
        approximate = node.kwargs.get("approximate", node.args[1] if len(node.args) > 1 else "none")
        name = {"none": "gelu", "tanh": "gelu_tanh"}.get(approximate)
        return (name, node.args[0], (node,)) if name else None
    return _tanh_polynomial(node) if kind == "mul" else None


def _tanh_polynomial(node: fx.Node) -> tuple[str, fx.Node, tuple[fx.Node, ...]] | None:
    """The tanh form of gelu written out: x/2 · (1 + tanh(√(2/π) · (x + 0.044715 x³))), in any arrangement of sums and products."""
    symbol = sympy.Symbol("x")
    values: dict[fx.Node, sympy.Expr] = {}
    sources: set[fx.Node] = set()

    def read(here: Any) -> sympy.Expr:
        if isinstance(here, (int, float)):
            return sympy.Float(here)
        if here not in values:
            kind = kind_of(here)
            if kind in ("add", "mul", "pow") and not here.kwargs and len(here.args) == 2 and len(values) < 16:
                left, right = map(read, here.args)
                values[here] = {"add": left + right, "mul": left * right}.get(kind) if kind != "pow" else left**right
            elif kind == "tanh":
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
    inner = _coefficients(curve.args[0], symbol)
    wanted = ({(1, 0): 0.5, (1, 1): 0.5}, {(1,): _GELU_SLOPE, (3,): _GELU_SLOPE * _GELU_CUBIC})
    if not (_close(outer, wanted[0]) and _close(inner, wanted[1])):
        return None
    return "gelu_tanh", sources.pop(), tuple(values)


def _coefficients(expr: sympy.Expr, *symbols: sympy.Symbol) -> dict[tuple[int, ...], float] | None:
    try:
        return {powers: float(c) for powers, c in sympy.Poly(sympy.expand(expr), *symbols).terms()}
    except (sympy.PolynomialError, TypeError):
        return None


def _close(found: dict | None, wanted: dict) -> bool:
    return found is not None and found.keys() == wanted.keys() and all(abs(found[k] - wanted[k]) <= 1e-6 * abs(wanted[k]) for k in wanted)


# -- norms -----------------------------------------------------------------------------------------------------------------------------


def norm_of(node: Any) -> tuple[Norm, fx.Node, tuple[fx.Node, ...]] | None:
    """(norm, what it normalises, its nodes) when a node is a norm over the last dimension with a weight of its own."""
    if kind_of(node) in ("layer_norm", "rms_norm"):
        return _library_norm(node)
    cast, body = _uncast(node)
    if kind_of(body) != "mul" or len(body.args) != 2:
        return None
    for left, right in (body.args, body.args[::-1]):
        weight = _norm_weight(left)
        unit = _unit(right) if weight else None
        if weight is None or unit is None:
            continue
        parameter, offset, weight_nodes = weight
        source, eps, inner_cast, unit_nodes = unit
        exact = tensor_of(source).dtype == torch.float32
        if tensor_of(node).dtype != tensor_of(source).dtype or (offset and inner_cast and not exact):
            return None
        kind = "rms_offset" if offset else "rms" if inner_cast or (exact and not cast) else "rms_fp32"
        if sizes(tensor_of(parameter))[0] != sizes(tensor_of(source))[-1]:
            return None
        return Norm(kind, parameter, None, eps), source, tuple(dict.fromkeys((*unit_nodes, *weight_nodes, body, node)))
    return None


def _library_norm(node: fx.Node) -> tuple[Norm, fx.Node, tuple[fx.Node, ...]] | None:
    names = (
        ("input", "normalized_shape", "weight", "bias", "eps")
        if kind_of(node) == "layer_norm"
        else ("input", "normalized_shape", "weight", "eps")
    )
    call = dict(zip(names, node.args, strict=False)) | node.kwargs
    weight, bias, eps = call.get("weight"), call.get("bias"), call.get("eps")
    if len(call["normalized_shape"]) != 1 or not is_parameter(weight, 1) or not (bias is None or is_parameter(bias, 1)):
        return None
    if kind_of(node) == "rms_norm" and eps is None:
        return None
    kind = "layer" if kind_of(node) == "layer_norm" else "rms_fp32"
    return Norm(kind, weight, bias, 1e-5 if eps is None else float(eps)), call["input"], (node,)


def _uncast(node: Any) -> tuple[bool, Any]:
    """Looks through one change of dtype."""
    kind = kind_of(node)
    if kind == "type_as" or kind == "float" or (kind == "to" and len(node.args) == 2 and isinstance(node.args[1], torch.dtype)):
        return True, node.args[0]
    return False, node


def _norm_weight(node: Any) -> tuple[fx.Node, bool, tuple[fx.Node, ...]] | None:
    """(parameter, whether 1 is added, nodes)."""
    nodes: list[fx.Node] = []
    offset = False
    if kind_of(node) == "add" and len(node.args) == 2 and 1.0 in (node.args[0], node.args[1]):
        offset = True
        nodes.append(node)
        node = node.args[1] if node.args[0] == 1.0 else node.args[0]
    cast, inner = _uncast(node)
    if cast and isinstance(inner, fx.Node):
        nodes.append(node)
        node = inner
    return (node, offset, tuple(nodes)) if is_parameter(node, 1) else None


def _unit(node: Any) -> tuple[fx.Node, float, bool, tuple[fx.Node, ...]] | None:
    """x · rsqrt(mean(x²) + eps) in float32: (x, eps, whether the result is cast before the weight, nodes)."""
    cast, body = _uncast(node)
    if kind_of(body) != "mul" or len(body.args) != 2:
        return None
    for wide, root in (body.args, body.args[::-1]):
        if kind_of(root) != "rsqrt" or kind_of(root.args[0]) != "add":
            continue
        total = root.args[0]
        mean, eps = total.args if isinstance(total.args[0], fx.Node) else total.args[::-1]
        if kind_of(mean) != "mean" or not isinstance(eps, (int, float)) or not _last_dim_kept(mean):
            continue
        square = mean.args[0]
        if kind_of(square) != "pow" or square.args[0] is not wide or square.args[1] != 2 or tensor_of(wide).dtype != torch.float32:
            continue
        widened, source = _uncast(wide)
        nodes = [square, mean, total, root, body]
        nodes += ([wide] if widened else []) + ([node] if cast else [])
        return source if widened else wide, float(eps), cast, tuple(nodes)
    return None


def _last_dim_kept(node: fx.Node) -> bool:
    dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
    return dim in (-1, (-1,), [-1]) and node.kwargs.get("keepdim", False) is True
