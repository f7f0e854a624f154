"""The operators that written-out attention is made of, and small questions about them."""

from __future__ import annotations

import operator
from collections.abc import Iterator
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
SOFTMAX = {F.softmax, torch.softmax, "softmax"}
CAST = {"to", "type", "float", "half", "bfloat16", "double", "type_as"}
SAME = {"contiguous", "clone"}
VIEW = {"view", "reshape", torch.reshape}
DROPOUT = {F.dropout, torch.dropout}
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
FILLS = {torch.where, "where", torch.masked_fill, "masked_fill", "masked_fill_"}
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
    """The chain looks like attention but cannot be described; the message says why."""


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
        if product.target in EINSUM and einsum_role(product):
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


def einsum_role(node: fx.Node) -> str:
    """ "scores" for queries times keys that are not transposed, "values" for weights times values, both with every leading dimension in
    common; empty for other sums of products."""
    try:
        call = bind_or_refuse(node, "equation: str, *operands")
    except NoMatch:
        return ""
    equation = call.equation.replace(" ", "")
    if len(call.operands) != 2 or any(tensor_of(o) is None for o in call.operands) or "." in equation or "->" not in equation:
        return ""
    (left, _, right), result = equation.split("->")[0].partition(","), equation.split("->")[1]
    same_rank = len(left) == len(right) == len(result) in (3, 4) and "," not in right
    if not same_rank or any(len(set(letters)) != len(letters) for letters in (left, right, result)):
        return ""
    lead, row, column = left[:-2], left[-2], left[-1]
    other = next((c for c in right[len(lead) :] if c != column), "")
    if not lead == right[: len(lead)] == result[: len(lead)] or result[len(lead) :] != row + other:
        return ""
    return {other + column: "scores", column + other: "values"}.get(right[len(lead) :], "")


def is_product(node: fx.Node) -> bool:
    return find_factors(node) is not None


def reads_values(user: fx.Node, node: fx.Node) -> bool:
    """Whether a user reads more of a tensor than its shape, dtype and device."""
    if user.target in SHAPED_LIKE:
        return user.args[:1] == (node,)
    return user.target not in SHAPE_ONLY


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
    """A softmax over the last dimension of something of 3 or 4 dimensions; in a form that is not known, maybe one."""
    if node.op not in ("call_function", "call_method") or node.target not in SOFTMAX or tensor_of(node) is None:
        return False
    try:
        dim = softmax_arguments(node).dim
    except NoMatch:
        dim = -1
    return example_tensor(node).dim() in (3, 4) and dim in (-1, example_tensor(node).dim() - 1)


def softmax_arguments(node: fx.Node) -> SimpleNamespace:
    """Its input, dim and dtype. _stacklevel: where a warning is said to come from."""
    middle = "_stacklevel: int = 3, " if node.target is F.softmax else ""
    return bind_or_refuse(node, f"input: tensor, dim: int, {middle}dtype: dtype = None")


def products(node: fx.Node) -> Iterator[fx.Node]:
    """Products that have these weights on their left, through casts, dropout, views and slices."""
    for user in node.users:
        factors = find_factors(user)
        if factors is not None and factors[0] is node and (user.target in MATMUL or einsum_role(user) == "values"):
            yield user
        elif (
            user.args
            and user.args[0] is node
            and (user.target in CAST | SAME | VIEW | DROPOUT | {operator.getitem} and tensor_of(user) is not None)
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


def multiplies_sequences(node: fx.Node, depth: int = 16) -> bool:
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
