"""The operators that written-out attention is made of, and small questions about them."""

from __future__ import annotations

import operator
import re
from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import fx

from sparsify.graph.aliasing import example_tensor, tensor_of
from sparsify.graph.calls import Unbound, bind

ADD = {operator.add, operator.iadd, torch.add, "add", "add_"}
MUL = {operator.mul, operator.imul, torch.mul, "mul", "mul_"}
SUB = {operator.sub, torch.sub, "sub"}
DIV = {operator.truediv, operator.itruediv, torch.div, torch.true_divide, "div", "div_", "true_divide"}
MATMUL = {operator.matmul, torch.matmul, torch.bmm, "matmul", "bmm", "__matmul__"}
BADDBMM = {torch.baddbmm, "baddbmm"}
SOFTMAX = {F.softmax, torch.softmax, torch.special.softmax, "softmax"}
CAST = {"to", "type", "float", "half", "bfloat16", "double", "type_as"}
SAME = {"contiguous", "clone"}
VIEW = {"view", "reshape", torch.reshape}
DROPOUT = {F.dropout, torch.dropout}
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
FILLS = {torch.where, "where", torch.masked_fill, "masked_fill", "masked_fill_"}
FILLS_FIRST = {torch.masked_fill, "masked_fill", "masked_fill_"}  # those whose first argument is what they fill
EINSUM = {torch.einsum, torch.functional.einsum}
# what reads a tensor's shape, dtype and device alone
SHAPE_ONLY = {
    *(torch.ones_like, torch.zeros_like, torch.empty_like, torch.full_like),
    *("new_ones", "new_zeros", "new_empty", "new_full", "size", "dim"),
}
# likewise, of their second argument
SHAPED_LIKE = {"expand_as", "view_as", "reshape_as", "type_as"}
# the larger of a tensor and a number: two operands, or one and its bound
MAXIMA = {torch.max, torch.maximum, "max", "maximum"}
CLAMPS = {torch.clamp, torch.clip, "clamp", "clamp_", "clip", "clip_"}
CLAMPS_FROM_BELOW = {torch.clamp_min, "clamp_min", "clamp_min_"}


class NoMatch(Exception):
    """The chain looks like attention but cannot be described; the message says why.

    inputs: as `MaskPredicate.inputs`, of what could not be proved.
    """

    def __init__(self, why: str, inputs: tuple[fx.Node, ...] = ()):
        super().__init__(why)
        self.inputs = inputs


def bind_or_refuse(node: fx.Node, *signatures: str) -> SimpleNamespace:
    """The arguments of a call that belongs to attention.

    Raises:
        NoMatch: the call has another form.
    """
    try:
        return bind(node, *signatures)
    except Unbound as why:
        raise NoMatch(str(why)) from why


def baddbmm_arguments(node: fx.Node) -> SimpleNamespace:
    return bind_or_refuse(node, "input: tensor, batch1: tensor, batch2: tensor, *, beta=1, alpha=1")


def find_factors(product: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """What a product multiplies, without what baddbmm adds; None for anything else."""
    try:
        if product.target in BADDBMM:
            call = baddbmm_arguments(product)
            return call.batch1, call.batch2
        if product.target in MATMUL:
            call = bind_or_refuse(product, "input: tensor, other: tensor", "input: tensor, mat2: tensor")
            return call.input, getattr(call, "other", None) or call.mat2
        if product.target in EINSUM and contraction(product):
            return bind_or_refuse(product, "equation: str, *operands").operands
    except NoMatch:
        pass
    return None


def product_factors(product: fx.Node) -> tuple[fx.Node, fx.Node]:
    """What a node that is known to be a product multiplies.

    Raises:
        NoMatch: it is none.
    """
    if (found := find_factors(product)) is None:
        raise NoMatch(f"{product.name} is no product")
    return found


@dataclass(frozen=True)
class Contraction:
    """An einsum of two tensors that sums over one letter which the result lacks. left, right, result: a letter a dimension."""

    left: str
    right: str
    result: str

    @property
    def summed(self) -> str:
        return next(letter for letter in self.left if letter not in self.result)


def contraction(node: fx.Node) -> Contraction | None:
    """What an einsum sums; None for any other call, and for one of another form."""
    try:
        call = bind_or_refuse(node, "equation: str, *operands")
    except NoMatch:
        return None
    found = re.fullmatch(r"([a-zA-Z]+),([a-zA-Z]+)->([a-zA-Z]+)", call.equation.replace(" ", ""))
    if found is None or len(call.operands) != 2 or any(tensor_of(o) is None for o in call.operands):
        return None
    left, right, result = map(str, found.groups())
    if any(len(set(letters)) != len(letters) for letters in (left, right, result)) or not set(left + right) >= set(result):
        return None
    summed = set(left + right) - set(result)
    return Contraction(left, right, result) if len(summed) == 1 and summed <= set(left) & set(right) else None


def einsum_scores(node: fx.Node) -> tuple[tuple[fx.Node, str], tuple[fx.Node, str]]:
    """((query, layout), (key, layout)) of an einsum that gives scores, [batch, heads, query, key] or with the first two merged.

    Raises:
        NoMatch: it sums something else.
    """
    sums, operands = contraction(node), product_factors(node)
    if sums is None or len(sums.result) not in (3, 4):
        raise NoMatch("the scores are an einsum of another form")
    *lead, row, column = sums.result
    sides = {sums.left: operands[0], sums.right: operands[1]} if sums.left != sums.right else {}
    names = {**dict(zip(lead, "bh" if len(lead) == 2 else "n", strict=True)), row: "l", column: "l", sums.summed: "d"}
    queries, keys = ([text for text in sides if set(text) == {*lead, letter, sums.summed}] for letter in (row, column))
    if len(queries) != 1 or len(keys) != 1:
        raise NoMatch("the scores are an einsum of another form")
    query, key = ((sides[text], "".join(names[letter] for letter in text)) for text in (queries[0], keys[0]))
    return query, key


def einsum_values(node: fx.Node, weights: fx.Node) -> tuple[fx.Node, str, str]:
    """(value, its layout, the output's layout) of an einsum of attention weights [batch, heads, query, key] and values.

    Raises:
        NoMatch: it sums something else.
    """
    sums, operands = contraction(node), product_factors(node)
    if sums is None or (operands[0] is weights) == (operands[1] is weights) or len(sums.result) not in (3, 4):
        raise NoMatch("the weights go into an einsum of another form")
    first = operands[0] is weights
    of_weights, of_value, value = (sums.left, sums.right, operands[1]) if first else (sums.right, sums.left, operands[0])
    *lead, row, column = of_weights
    numbers = set(of_value) - {*lead, column}
    if sums.summed != column or len(numbers) != 1 or len(lead) not in (1, 2) or set(of_value) != {*lead, column, *numbers}:
        raise NoMatch("the weights go into an einsum of another form")
    names = {**dict(zip(lead, "bh" if len(lead) == 2 else "n", strict=True)), row: "l", column: "l", numbers.pop(): "d"}
    if set(sums.result) != set(names) - {column}:
        raise NoMatch("the weights go into an einsum of another form")
    return value, "".join(names[letter] for letter in of_value), "".join(names[letter] for letter in sums.result)


def is_product(node: fx.Node) -> bool:
    return find_factors(node) is not None


def reads_values(user: fx.Node, node: fx.Node) -> bool:
    """Whether a user reads more of a tensor than its shape, dtype and device."""
    if user.target in SHAPED_LIKE:
        return user.args[:1] == (node,)
    return user.target not in SHAPE_ONLY


def unread(node: fx.Node) -> list[fx.Node]:
    """Views and copies of a tensor that nothing reads, such as of weights that a module returns and its caller drops."""
    found: list[fx.Node] = []
    for user in node.users:
        if user.target in VIEW | CAST | SAME | {operator.getitem} and set(user.users) <= {*(further := unread(user))}:
            found += [user, *further]
    return found


def lower_bound(node: fx.Node) -> tuple[fx.Node, object] | None:
    """(scores, number) where a node is the larger of scores and something; None for anything else."""
    try:
        if node.target in MAXIMA:
            call = bind_or_refuse(node, "input: tensor, other: tensor")
            left, right = call.input, call.other
            return (right, left) if leads_to_product(right) and not leads_to_product(left) else (left, right)
        if node.target in CLAMPS:
            call = bind_or_refuse(node, "input: tensor, min=None, max=None")
            return (call.input, call.min) if call.max is None and call.min is not None else None
        if node.target in CLAMPS_FROM_BELOW:
            call = bind_or_refuse(node, "input: tensor, min")
            return call.input, call.min
    except NoMatch:
        pass
    return None


def is_softmax(node: fx.Node) -> bool:
    return node.op in ("call_function", "call_method") and node.target in SOFTMAX and tensor_of(node) is not None


def why_not_over_keys(softmax: fx.Node) -> str:
    """Why a softmax is none of attention's, which is over the last of 3 or 4 dimensions; empty where it may be one."""
    rank = example_tensor(softmax).dim()
    try:
        dim = softmax_arguments(softmax).dim
    except NoMatch:
        dim = -1
    if rank not in (3, 4):
        return f"the scores have {rank} dimensions"
    return "" if dim in (-1, rank - 1) else f"the softmax is over dimension {dim} of {rank}, not over the keys"


def softmax_arguments(node: fx.Node) -> SimpleNamespace:
    """Its input, dim and dtype. _stacklevel: where a warning is said to come from."""
    middle = "_stacklevel: int = 3, " if node.target is F.softmax else ""
    return bind_or_refuse(node, f"input: tensor, dim: int, {middle}dtype: dtype = None")


def products(node: fx.Node) -> Iterator[fx.Node]:
    """Products that have these weights on their left, through casts, dropout, views and slices."""
    for user in node.users:
        factors = find_factors(user)
        if factors is not None and ((factors[0] is node and user.target in MATMUL) or (node in factors and user.target in EINSUM)):
            yield user
        elif (
            user.args
            and user.args[0] is node
            and (user.target in CAST | SAME | VIEW | DROPOUT | FILLS_FIRST | {operator.getitem} and tensor_of(user) is not None)
        ):
            yield from products(user)


def leads_to_product(node: object, depth: int = 16) -> bool:
    """Whether a value of 3 or 4 dimensions is a product of two tensors, scaled, masked or shaped."""
    if not isinstance(node, fx.Node) or depth == 0 or tensor_of(node) is None or node.op == "placeholder":
        return False
    if is_product(node):
        return True
    known = ADD | MUL | DIV | SUB | CAST | SAME | VIEW | {operator.neg, torch.neg, "neg", torch.tanh, "tanh", torch.where, "where"}
    known |= {"masked_fill", torch.masked_fill, "masked_fill_", torch.cat, torch.concat, torch.concatenate, "cat"}
    known |= MAXIMA | CLAMPS | CLAMPS_FROM_BELOW
    known |= {operator.isub, "sub_", torch.subtract, "subtract", "subtract_", "multiply", torch.multiply, "divide", torch.divide}
    return node.target in known and any(leads_to_product(a, depth - 1) for a in node.all_input_nodes)


def multiplies_sequences(node: object, depth: int = 16) -> bool:
    """Whether the product that a value leads back to has two factors of 3 or 4 dimensions: activations, not a weight matrix."""
    if not isinstance(node, fx.Node) or depth == 0:
        return False
    if (factors := find_factors(node)) is not None:
        return all((tensor := tensor_of(a)) is not None and tensor.dim() >= 3 for a in factors)
    return any(multiplies_sequences(a, depth - 1) for a in node.all_input_nodes if leads_to_product(a))


def constant(value: object) -> float | fx.Node:
    """A number known now, or the node of one that is not."""
    if isinstance(value, (int, float)):
        return float(value)
    if isinstance(value, fx.Node):
        example = value.meta.get("example_value")
        if isinstance(example, (torch.SymFloat, torch.SymInt)):
            return float(example.node.expr) if example.node.expr.is_number else value
    raise NoMatch("scores are scaled by a tensor")
