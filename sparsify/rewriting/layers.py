"""Splits a graph at its layers, so that Inductor compiles one of each kind of layer and the graph calls it for all layers of that kind.

A piece is the run of nodes that one item of a module list, such as `model.layers.3`, made; what lies between such runs are pieces, too. Two
pieces are of one kind when they do the same operations with the same constants on inputs of the same dtypes, sizes, strides and shared
memory: weights are inputs, so layers differ in nothing else. The code of one then serves all, whatever tensors it is called with. Sizes may
have other symbols in each layer, such as the number of its cached keys; whatever was assumed of the symbols of the layer that was compiled
is then asked of those of the others, as guards. What Inductor would have fused across the border of two layers is lost: two readings and
one writing of the hidden states at most.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

import sympy
import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.symbolic_shapes import free_symbols, free_unbacked_symbols
from torch.fx.node import map_arg
from torch.multiprocessing.reductions import StorageWeakRef

from sparsify.rewriting.region import AUTOCAST, Numbered, description

# Fewer layers of a kind are compiled as fast in one piece with the rest.
FEWEST = 3
_ITEM = re.compile(r"(\[\d+\]|\.\d+|_modules\['\d+'\])$")
_SYMBOL = re.compile(r"\b[a-z]+\d+\b")

T = TypeVar("T")
Compiler = Callable[[fx.GraphModule, Sequence[Any]], Callable[..., Any]]


class CannotSplit(Exception):
    """The graph has to be compiled as one; the message says why."""


@dataclass
class Piece:
    """Consecutive nodes of a graph.

    layer: the module that made them, as Dynamo names it, "" between layers.
    inputs: nodes outside whose values it reads: tensors, sizes, and every symbol that its values' sizes are made of.
    outputs: its nodes that are read outside.
    symbols: of its values' sizes, in the order in which they are met.
    kind: equal for pieces that do the same, whatever their symbols are called.
    """

    layer: str
    nodes: list[fx.Node]
    inputs: list[fx.Node] = field(default_factory=list)
    outputs: list[fx.Node] = field(default_factory=list)
    symbols: list[sympy.Symbol] = field(default_factory=list)
    kind: str = ""


def compile_by_layers(gm: fx.GraphModule, compiler: Compiler) -> Callable[..., Any] | None:
    """A callable that runs the graph with one compiled callable for each kind of piece; None where the graph is better compiled as one.

    Args:
        gm: a Dynamo graph whose nodes have example values; it is not changed.
        compiler: compiles a graph for fake inputs, returns a callable that takes as many and returns a sequence of outputs.
    """
    try:
        pieces = split(gm)
    except CannotSplit:
        return None
    compiled: dict[str, tuple[Piece, Callable[..., Any]]] = {}
    graph, values = fx.Graph(), {}
    for node in gm.graph.nodes:
        if node.op in ("placeholder", "get_attr"):
            values[node] = graph.node_copy(node, values.__getitem__)
    for piece in pieces:
        if not any(isinstance(node.meta.get("example_value"), torch.Tensor) for node in piece.nodes):
            for node in piece.nodes:  # sizes alone: nothing to compile
                values[node] = graph.node_copy(node, _lookup(piece, values))
            continue
        first, run = compiled.get(piece.kind, (piece, None))
        if run is None or not _same_assumptions(first, piece):
            run = _named(compiler(*_as_graph(gm, piece)))
        compiled.setdefault(piece.kind, (piece, run))
        results = graph.call_function(run, tuple(values[node] for node in piece.inputs))
        for i, node in enumerate(piece.outputs):
            values[node] = graph.call_function(_pick, (results, i))
    result = next(node for node in reversed(gm.graph.nodes) if node.op == "output")
    graph.output(map_arg(result.args[0], values.__getitem__))
    outer = fx.GraphModule(gm, graph)
    return outer.forward


def _named(run: Callable[..., Any]) -> Callable[..., Any]:
    """A function of this module, which generated code can refer to: what Inductor returns has a name that cannot be imported."""

    def piece(*inputs: Any) -> Sequence[Any]:
        return run(*inputs)

    return piece


def _pick(results: Sequence[Any], index: int) -> Any:
    return results[index]


def split(gm: fx.GraphModule) -> list[Piece]:
    """The pieces in the graph's order, with inputs, outputs and kinds.

    Raises:
        CannotSplit: fewer than FEWEST pieces are of one kind, or something spans pieces that cannot: autocast, gradients, sizes that only
            running tells, numbers that are inputs.
    """
    pieces = _runs(gm.graph)
    if len(pieces) < FEWEST:
        raise CannotSplit("the graph has no layers")
    for node in gm.graph.nodes:
        if node.target in AUTOCAST or node.target is torch._C._set_grad_enabled:
            raise CannotSplit(f"{node.name} changes a state of all calls after it")
        value = node.meta.get("example_value")
        if node.op == "call_module" or isinstance(node.target, torch._ops.HigherOrderOperator):
            raise CannotSplit(f"{node.name} is a call of a graph")
        if isinstance(value, torch.Tensor) and value.requires_grad and torch.is_grad_enabled():
            raise CannotSplit(f"{node.name} has a gradient")
        if isinstance(value, torch.SymFloat):
            raise CannotSplit(f"{node.name} is a number that Inductor may ask Dynamo to trace again for, once for each piece")
        if node.meta.get("unbacked_bindings") or (isinstance(value, torch.Tensor) and free_unbacked_symbols(value)):
            raise CannotSplit(f"{node.name} has a size that only running tells")
    symbols = {
        node.meta["example_value"].node.expr: node
        for node in gm.graph.nodes
        if node.op == "placeholder" and isinstance(node.meta.get("example_value"), torch.SymInt)
    }
    same: dict[int, fx.Node] = {}  # one node for each value: an in-place call gives the tensor that it was given
    for node in gm.graph.nodes:
        if isinstance(value := node.meta.get("example_value"), torch.Tensor):
            same.setdefault(id(value), node)
    for piece in pieces:
        piece.inputs = _inputs(piece, symbols, same)
    result = next(node for node in reversed(gm.graph.nodes) if node.op == "output")
    read = {*result.all_input_nodes, *(node for piece in pieces for node in piece.inputs)}
    for piece in pieces:
        piece.outputs = [node for node in piece.nodes if node in read]
        for node in (*piece.inputs, *piece.outputs):
            if not isinstance(node.meta.get("example_value"), FakeTensor | torch.SymInt | int | float):
                raise CannotSplit(f"{node.name} crosses the border of a layer and is neither a tensor nor a number")
        _describe(piece)
    kinds = Counter(piece.kind for piece in pieces)
    if max(kinds.values()) < FEWEST:
        raise CannotSplit("no layer repeats")
    return pieces


def _runs(graph: fx.Graph) -> list[Piece]:
    pieces: list[Piece] = []
    unknown: list[fx.Node] = []  # nodes without a module belong to a layer where both neighbours do
    for node in graph.nodes:
        if node.op in ("placeholder", "get_attr", "output"):
            continue
        if (layer := _layer(node)) is None:
            unknown.append(node)
            continue
        inside = bool(pieces) and pieces[-1].layer == layer
        _append(pieces, layer if inside else "", unknown)
        _append(pieces, layer, [node])
        unknown = []
    _append(pieces, "", unknown)
    seen = [piece.layer for piece in pieces if piece.layer]
    if len(seen) != len(set(seen)):
        raise CannotSplit("a layer runs more than once")
    return pieces


def _append(pieces: list[Piece], layer: str, nodes: list[fx.Node]) -> None:
    if nodes and (not pieces or pieces[-1].layer != layer):
        pieces.append(Piece(layer, []))
    if nodes:
        pieces[-1].nodes += nodes


def _layer(node: fx.Node) -> str | None:
    """The outermost item of a module list that made a node, "" for a module outside of lists, None where no module is known."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return None
    for source in (entry[0] if isinstance(entry, tuple) else entry for entry in stack.values()):
        if _ITEM.search(source):
            return source
    return ""


def _inputs(piece: Piece, symbols: dict[Any, fx.Node], same: dict[int, fx.Node]) -> list[fx.Node]:
    inside = set(piece.nodes)
    inputs: dict[fx.Node, None] = {}
    needed: dict[sympy.Symbol, None] = {}
    for node in piece.nodes:
        for read in node.all_input_nodes:
            if read not in inside:
                value = read.meta.get("example_value")
                inputs.setdefault(same.get(id(value), read) if isinstance(value, torch.Tensor) else read)
                needed |= _symbols(value)
        needed |= _symbols(node.meta.get("example_value"))
    # in the order in which they are met: the same of all layers of a kind, which the order of their names is not
    for symbol in needed:
        if symbol not in symbols:
            raise CannotSplit(f"{symbol} is no input of the graph")
        inputs.setdefault(symbols[symbol])
    return list(inputs)


def _symbols(value: Any) -> dict[sympy.Symbol, None]:
    """The symbols of a value's numbers, sizes and strides, in this order."""
    if isinstance(value, tuple | list):
        return {symbol: None for part in value for symbol in _symbols(part)}
    if isinstance(value, torch.Tensor):
        places = (*value.shape, *(value.stride() if value.layout is torch.strided else ()), *free_symbols(value))
        return {symbol: None for place in places for symbol in _symbols(place)}
    if isinstance(value, torch.SymInt | torch.SymBool):
        return dict.fromkeys(sorted(value.node.expr.free_symbols, key=str))
    return {value: None} if isinstance(value, sympy.Symbol) else {}


def _describe(piece: Piece) -> None:
    """Sets the piece's kind and symbols."""
    number = {node: i for i, node in enumerate([*piece.inputs, *piece.nodes])}
    numbered = _lookup(piece, {node: Numbered(i) for node, i in number.items()})
    storages: dict[Any, int] = {}
    lines = []
    known = {symbol.name: symbol for node in number for symbol in _symbols(node.meta.get("example_value"))}
    for node, place in number.items():
        value = node.meta.get("example_value")
        shared = storages.setdefault(StorageWeakRef(value.untyped_storage()), len(storages)) if isinstance(value, FakeTensor) else ""
        if place < len(piece.inputs):
            lines.append(f"input {_description(value)} {shared}")
        else:
            call = map_arg((node.args, node.kwargs), lambda n: cast(Any, numbered(n)))
            target = f"{node.op} {getattr(node.target, '__module__', '')} {node.target}"
            lines.append(f"{target} {call} {_description(value)} {shared}")
    lines.append(str([number[node] for node in piece.outputs]))
    names: dict[str, str] = {}
    piece.kind = _SYMBOL.sub(lambda m: names.setdefault(m[0], f"<{len(names)}>") if m[0] in known else m[0], "\n".join(lines))
    piece.symbols = [known[name] for name in names]


def _lookup(piece: Piece, known: Mapping[fx.Node, T]) -> Callable[[fx.Node], T]:
    """What is known of a node that the piece reads, or of the input that stands for it: another node of the very same tensor."""
    inputs = {id(node.meta["example_value"]): node for node in piece.inputs}
    return lambda node: known[node] if node in known else known[inputs[id(node.meta["example_value"])]]


def _description(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"{description(value)} {value.storage_offset()} {value.requires_grad}"
    if isinstance(value, tuple | list):
        return str([_description(v) for v in value])
    return f"{type(value).__name__} {value}"


def _as_graph(gm: fx.GraphModule, piece: Piece) -> tuple[fx.GraphModule, list[Any]]:
    """The piece as a graph module of its own, and fake values of its inputs."""
    graph, values = fx.Graph(), {}
    for node in piece.inputs:
        values[node] = graph.placeholder(node.name)
        values[node].meta = dict(node.meta)
    for node in piece.nodes:
        values[node] = graph.node_copy(node, _lookup(piece, values))
    graph.output(tuple(values[node] for node in piece.outputs))
    return fx.GraphModule(gm, graph), [node.meta["example_value"] for node in piece.inputs]


def _same_assumptions(first: Piece, other: Piece) -> bool:
    """Whether all that is assumed of the first piece's symbols, by tracing and compiling it, holds for the other's. Then it is guarded."""
    renamed = {a: b for a, b in zip(first.symbols, other.symbols, strict=True) if a != b}
    if not renamed:
        return True
    environment: Any = next(v.fake_mode.shape_env for n in first.inputs if isinstance(v := n.meta["example_value"], FakeTensor))
    if any(environment.var_to_range.get(a) != environment.var_to_range.get(b) for a, b in renamed.items()):
        return False
    assumed = [guard.expr for guard in environment.guards if guard.expr.free_symbols & renamed.keys()]
    return all(environment.evaluate_expr(expr.xreplace(renamed)) for expr in assumed)
