"""The operators that written-out attention is made of, and small questions about them."""

from __future__ import annotations

import operator
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import fx

from sparsify.aliasing import tensor_of

ADD = {operator.add, operator.iadd, torch.add, "add", "add_"}
MUL = {operator.mul, operator.imul, torch.mul, "mul", "mul_"}
DIV = {operator.truediv, operator.itruediv, torch.div, torch.true_divide, "div", "div_", "true_divide"}
MATMUL = {operator.matmul, torch.matmul, torch.bmm, "matmul", "bmm", "__matmul__"}
BADDBMM = {torch.baddbmm, "baddbmm"}
SOFTMAX = {F.softmax, torch.softmax, "softmax"}
CAST = {"to", "type", "float", "half", "bfloat16", "double", "type_as"}
SAME = {"contiguous", "clone"}
VIEW = {"view", "reshape", torch.reshape}
EINSUM = {torch.einsum, torch.functional.einsum}
# what reads a tensor's shape, dtype and device alone
SHAPE_ONLY = {
    *(torch.ones_like, torch.zeros_like, torch.empty_like, torch.full_like),
    *("new_ones", "new_zeros", "new_empty", "new_full", "size", "dim"),
}


class NoMatch(Exception):
    """The chain looks like attention but cannot be described; the message says why."""


def factors_of(product: fx.Node) -> tuple[fx.Node | None, fx.Node | None]:
    """What a product multiplies, without what baddbmm adds; (None, None) for anything else."""
    if product.target in BADDBMM:
        named = dict(zip(("input", "batch1", "batch2"), product.args, strict=False)) | product.kwargs
        return named["batch1"], named["batch2"]
    if product.target in MATMUL and "out" not in product.kwargs:
        named = dict(zip(("input", "other"), product.args, strict=False)) | product.kwargs
        return named.get("input"), named.get("other", named.get("mat2"))
    if product.target in EINSUM and einsum_of(product):
        return product.args[1:] if len(product.args) == 3 else tuple(product.args[1])
    return None, None


def einsum_of(node: fx.Node) -> str:
    """ "scores" for queries times keys that are not transposed, "values" for weights times values, both with every leading dimension in
    common; empty for other sums of products."""
    operands = node.args[1:] if len(node.args) != 2 else node.args[1]
    equation = str(node.args[0]).replace(" ", "")
    if node.kwargs or len(operands) != 2 or "." in equation or "->" not in equation:
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
    return factors_of(node)[0] is not None


def is_softmax(node: fx.Node) -> bool:
    """A softmax over the last dimension of something of 3 or 4 dimensions."""
    if not node.args or node.op not in ("call_function", "call_method") or node.target not in SOFTMAX or tensor_of(node) is None:
        return False
    dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
    return tensor_of(node).dim() in (3, 4) and dim in (-1, tensor_of(node).dim() - 1)


def products(node: fx.Node) -> Iterator[fx.Node]:
    """Products that have these weights on their left, through casts, dropout, views and slices."""
    for user in node.users:
        if factors_of(user)[0] is node and (user.target in MATMUL or einsum_of(user) == "values"):
            yield user
        elif (
            user.args
            and user.args[0] is node
            and (user.target in CAST | SAME | VIEW | {F.dropout, torch.dropout, operator.getitem} and tensor_of(user) is not None)
        ):
            yield from products(user)


def leads_to_product(node: object, depth: int = 16) -> bool:
    """Whether a value of 3 or 4 dimensions is a product of two tensors, scaled, masked or shaped."""
    if not isinstance(node, fx.Node) or depth == 0 or tensor_of(node) is None or node.op == "placeholder":
        return False
    if is_product(node):
        return True
    if node.target is torch.cat or node.target == "cat":
        return any(leads_to_product(x, depth - 1) for x in node.args[0])
    known = ADD | MUL | DIV | CAST | SAME | VIEW | {operator.sub, operator.neg, torch.neg, "neg", torch.tanh, "tanh", torch.where, "where"}
    known |= {"masked_fill", torch.masked_fill, "masked_fill_", torch.max, "clamp"}
    return node.target in known and any(leads_to_product(a, depth - 1) for a in node.args)


def of_sequences(node: fx.Node, depth: int = 16) -> bool:
    """Whether the product that a value leads back to has two factors of 3 or 4 dimensions: activations, not a weight matrix."""
    if not isinstance(node, fx.Node) or depth == 0:
        return False
    if is_product(node):
        return all(tensor_of(a) is not None and tensor_of(a).dim() >= 3 for a in factors_of(node))
    return any(of_sequences(a, depth - 1) for a in node.args if leads_to_product(a))


def constant(value: object) -> float | fx.Node:
    """A number known now, or the node of one that is not."""
    if isinstance(value, (int, float)):
        return float(value)
    example = value.meta.get("example_value") if isinstance(value, fx.Node) else None
    if isinstance(example, (torch.SymFloat, torch.SymInt)):
        return float(example.node.expr) if example.node.expr.is_number else value
    raise NoMatch("scores are scaled by a tensor")
