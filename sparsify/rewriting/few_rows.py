"""Joins the linear layers of a token's few rows with what stands around them: calls of `sparsify::linear`, each one stream of weights.

A step of decoding reads every weight once, and its time is the weights' bytes over the bandwidth, but for the gaps between kernels. What
is joined: layers that multiply the same input, such as queries, keys and values; gate and up with activation and product; a sum with the
residual stream; and the RMS norm that only these layers read. Nothing is proved here but that nothing else reads what vanishes, and that no
operand is written in between: the result is that of the same operations, at no lower precision.

This follows the methods' rewriting, and comes before Inductor, which would call the library for each product.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import sympy
import torch
from torch import fx

from sparsify.graph.aliasing import Memory, example_tensor, tensor_of
from sparsify.masks.symbolic import plain, sizes
from sparsify.matching.pointwise import binary_operands, bind_or_none, is_parameter, match_activation, match_norm, op_kind
from sparsify.matching.sites import Norm
from sparsify.ops.gradients import Modes
from sparsify.ops.limits import LINEAR_MAX_ROWS
from sparsify.ops.linear import LinearCall
from sparsify.ops.operands import plain_tensor
from sparsify.rewriting.editor import Editor

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# 16 bytes of bf16: rows of a weight have to begin at such places
_ALIGNED = 8
_MOST = 3  # weights of one call


@dataclass(frozen=True)
class _Product:
    """node: input · weightᵀ + bias."""

    node: fx.Node
    input: fx.Node
    weight: fx.Node
    bias: fx.Node | None


@dataclass(frozen=True)
class _Join:
    """One call to be. outputs: the nodes that it replaces. covered: those that vanish, outputs among them."""

    products: tuple[_Product, ...]
    outputs: tuple[fx.Node, ...]
    covered: frozenset[fx.Node]
    activation: str = "none"
    residual: fx.Node | None = None
    norm: Norm | None = None  # of `normalised`
    normalised: fx.Node | None = None

    @property
    def input(self) -> fx.Node:
        return self.products[0].input if self.normalised is None else self.normalised

    def operands(self) -> Iterator[fx.Node]:
        given = [self.input, self.residual, self.norm and self.norm.weight]
        given += [part for product in self.products for part in (product.weight, product.bias)]
        return (node for node in given if node is not None)


def finds_any(graph: fx.Graph, serves: Callable[[torch.device], bool]) -> bool:
    """Whether a graph has a linear layer that `join` would look at; guards nothing."""
    return any(_product(node, serves) is not None for node in graph.nodes)


def join(gm: fx.GraphModule, serves: Callable[[torch.device], bool]) -> int:
    """Joins linear layers of up to 16 rows, in place. Where the number of rows is a symbol, a guard asks for it.

    Args:
        serves: whether kernels serve a device.

    Returns:
        calls that were made.
    """
    graph = gm.graph
    products = {node: product for node in graph.nodes if (product := _product(node, serves)) is not None}
    if not products or not all(map(_asked, {product.input: None for product in products.values()})):
        return 0
    memory, modes = Memory(graph), Modes(graph)
    found: list[_Join] = []
    taken: set[fx.Node] = set()  # a sum of two products goes to one of them
    for candidate in _candidates(graph, products):
        summed = _with_residual(candidate)
        # where not all of it may be joined, a part may
        variants = (_with_norm(summed), summed, _with_norm(candidate), candidate)
        if (chosen := next((one for one in variants if not one.covered & taken and _allowed(one, memory, modes)), None)) is not None:
            found.append(chosen)
            taken |= chosen.covered
    editor = Editor(graph)
    inputs = {storage for node in graph.nodes if node.op == "placeholder" for storage in memory.storages(node)}
    for one, early in [(one, _may_be_early(one, memory, inputs)) for one in found]:
        _emit(editor, one, memory, early)
    graph.lint()
    gm.recompile()
    return len(found)


def _product(node: fx.Node, serves: Callable[[torch.device], bool]) -> _Product | None:
    """A linear layer of few rows, as far as it can be told without a guard."""
    call = bind_or_none(node, "input: tensor, weight: tensor, bias: tensor = None") if op_kind(node) == "linear" else None
    if call is None or not is_parameter(call.weight, 2) or not (call.bias is None or is_parameter(call.bias, 1)):
        return None
    read, weight, made = example_tensor(call.input), example_tensor(call.weight), example_tensor(node)
    tensors = [read, weight, made, *([example_tensor(call.bias)] if call.bias is not None else [])]
    if len({tensor.dtype for tensor in tensors}) > 1 or read.dtype not in _DTYPES or not all(map(plain_tensor, tensors)):
        return None
    outputs, inputs = map(plain, sizes(weight))
    if not weight.is_contiguous() or not isinstance(outputs, int) or not isinstance(inputs, int) or inputs % _ALIGNED:
        return None
    if not serves(read.device) or not _may_be_few(read) or not made.is_contiguous():
        return None
    return _Product(node, call.input, call.weight, call.bias)


def _may_be_few(tensor: torch.Tensor) -> bool:
    """Whether [..., inputs] has few rows, or one for each sequence of a batch of any size: then a guard will ask."""
    rows = [plain(size) for size in sizes(tensor)[:-1]]
    numbers = [size for size in rows if isinstance(size, int)]
    if len(numbers) == len(rows):
        return _known_few(tensor, LINEAR_MAX_ROWS)
    return len(rows) > 1 and not isinstance(rows[0], int) and numbers == [1] * (len(rows) - 1)


def _known_few(tensor: torch.Tensor, most: int) -> bool:
    """Whether [..., inputs] has from one to `most` rows, whatever its symbols are."""
    rows = math.prod(sizes(tensor)[:-1])
    return isinstance(rows, int | sympy.Integer) and 0 < int(rows) <= most


def _asked(node: fx.Node) -> bool:
    """Whether a node has few rows; a guard says so where their number is a symbol."""
    return bool(math.prod(example_tensor(node).shape[:-1]) <= LINEAR_MAX_ROWS)


def _candidates(graph: fx.Graph, products: dict[fx.Node, _Product]) -> Iterator[_Join]:
    """Every product once: gates with their ups, then products of one input side by side."""
    left = dict(products)
    for node in graph.nodes:
        gate = _gate(node, left)
        if gate is not None:
            yield gate
            for product in gate.products:
                del left[product.node]
    together: dict[Any, list[_Product]] = {}
    for product in left.values():
        together.setdefault((product.input, product.bias is None), []).append(product)
    for group in together.values():
        for first in range(0, len(group), _MOST):
            part = tuple(group[first : first + _MOST])
            outputs = tuple(product.node for product in part)
            yield _Join(part, outputs, frozenset(outputs))


def _gate(node: fx.Node, products: dict[fx.Node, _Product]) -> _Join | None:
    """act(gate) · up."""
    factors = binary_operands(node) if op_kind(node) == "mul" else None
    for active, other in (factors, factors[::-1]) if factors else ():
        read = match_activation(active) if isinstance(active, fx.Node) else None
        if read is None or read[1] not in products or other not in products or read[1] is other:
            continue
        gate, up = products[read[1]], products[other]
        alike = example_tensor(gate.weight).shape == example_tensor(up.weight).shape and (gate.bias is None) is (up.bias is None)
        if gate.input is up.input and alike:
            return _Join((gate, up), (node,), frozenset((gate.node, up.node, node, *read[2])), activation=read[0])
    return None


def _with_residual(one: _Join) -> _Join:
    """The same with the sum that alone reads it, where there is one."""
    if len(one.products) != 1 or len(users := list(one.outputs[0].users)) != 1 or op_kind(users[0]) != "add":
        return one
    terms = binary_operands(users[0])
    if terms is None or terms[0] is terms[1] or not all(isinstance(term, fx.Node) for term in terms):
        return one
    other = terms[1] if terms[0] is one.outputs[0] else terms[0]
    term, product, total = (tensor_of(node) for node in (other, one.outputs[0], users[0]))
    if term is None or product is None or total is None or not (term.shape == product.shape == total.shape):
        return one
    if term.dtype is not product.dtype or not plain_tensor(term) or not term.is_contiguous():
        return one
    return replace(one, outputs=(users[0],), covered=one.covered | {users[0]}, residual=other)


def _with_norm(one: _Join) -> _Join:
    """The same with the RMS norm of its input, which nothing else reads. Of a single row: the kernels of more have none."""
    if not _known_few(example_tensor(one.input), 1):
        return one
    read = match_norm(one.input)
    if read is None or not read[0].kind.startswith("rms") or set(one.input.users) - {product.node for product in one.products}:
        return one
    norm, source, nodes = read
    tensor, weight = example_tensor(source), tensor_of(norm.weight)
    if weight is None or weight.dtype is not tensor.dtype or not tensor.is_contiguous():
        return one
    if tensor.dtype is not example_tensor(one.products[0].node).dtype or not plain_tensor(tensor) or not plain_tensor(weight):
        return one
    return replace(one, norm=norm, normalised=source, covered=one.covered | set(nodes))


def _allowed(one: _Join, memory: Memory, modes: Modes) -> bool:
    """Whether nothing else reads what vanishes, nothing is written while it is read, and no gradient passes."""
    inner = one.covered - set(one.outputs)
    if any(set(node.users) - one.covered for node in inner):
        return False
    if modes.transformed((*one.covered, *one.operands())):
        return False
    if any(modes.needs_grad(output, one.operands(), inner) for output in one.outputs):
        return False
    order = sorted(one.covered, key=memory.position.__getitem__)
    return not any(memory.written_between(node, order[0], order[-1]) for node in one.operands())


def _may_be_early(one: _Join, memory: Memory, inputs: set[Any]) -> bool:
    """Whether what may have written the weights has ended when the kernel before this call begins.

    Its input is made in this graph, so a kernel of this graph lies between: the first of them waits for all that came before the graph.
    """
    if inputs.intersection(memory.storages(one.input)):
        return False
    return not any(memory.written_between(product.weight, None, one.outputs[0]) for product in one.products)


def _emit(editor: Editor, one: _Join, memory: Memory, early: bool) -> None:
    """Inserts the call where its first output is made, and puts its results in their places."""
    first = min(one.outputs, key=memory.position.__getitem__)
    editor.move_before(first)
    last = lambda node: int(sizes(example_tensor(node))[-1])
    flat = lambda node: node if example_tensor(node).dim() == 2 else editor.method("reshape", node, -1, last(node))
    products = one.products
    names = ("", "_2", "_3")
    weights = {f"weight{name}": product.weight for name, product in zip(names, products, strict=False)}
    weights |= {f"bias{name}": product.bias for name, product in zip(names, products, strict=False)}
    norm = {} if one.norm is None else {"norm_weight": one.norm.weight, "norm": one.norm.kind, "eps": one.norm.eps}
    residual = None if one.residual is None else flat(editor.current(one.residual))
    x = flat(editor.current(one.input))
    results = editor.emit(LinearCall.bind(x, **weights, residual=residual, activation=one.activation, early=early, **norm))
    values = editor.items(results, len(one.outputs))
    for i, output in enumerate(one.outputs):
        shape = sizes(example_tensor(output))
        if len(shape) != 2:
            rows = [int(size) if size.is_Integer else editor.method("size", one.input, dim) for dim, size in enumerate(shape[:-1])]
            values[i] = editor.method("reshape", values[i], *rows, last(output))
    for output, value in zip(one.outputs, values, strict=True):  # no node may be inserted before one that is gone
        editor.substitute(output, value)
