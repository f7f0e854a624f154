"""Keeps sparsify's ops, which have no derivative, out of places where one is needed.

Matchers ask `Modes` and rewrite nothing where a derivative, forward or backward, or a transform of torch.func passes. An op that runs there
all the same raises instead of giving zeros.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import fx

from sparsify.errors import UnsupportedError
from sparsify.graph.aliasing import example_tensor, tensor_of
from sparsify.graph.typed_torch import dual_levels, is_wrapped, register_kernel, tangent, within_transform

TRANSFORMED = "it lies within a transform of torch.func"
_HINT = "run it under torch.no_grad(), or leave what needs gradients to torch"


class Modes:
    """Grad mode and open transforms of torch.func at every node of a captured graph."""

    def __init__(self, graph: fx.Graph):
        self._grad: dict[fx.Node, bool] = {}
        self._transforms: dict[fx.Node, int] = {}
        # Dynamo compiles under the modes in which the graph starts, and guards on them
        grad, transforms = torch.is_grad_enabled(), int(within_transform()) + dual_levels()
        before: dict[fx.Node, bool] = {}
        for node in graph.nodes:
            self._grad[node], self._transforms[node] = grad, transforms
            word = getattr(node.target, "__name__", "") if node.op == "call_function" else ""
            if word.endswith("set_grad_enabled") and "fwd" not in word:
                grad = node.args[0] is not False
            elif word == "_enter_inference_mode":  # turned off, it turns gradients on
                before[node], grad = grad, node.args[0] is not True
            elif word == "_exit_inference_mode":
                grad = before.get(node.args[0], True)
            elif word.endswith(("_increment_nesting", "enter_dual_level")):
                transforms += 1
            elif word.endswith(("_decrement_nesting", "exit_dual_level")):
                transforms -= 1

    def transformed(self, nodes: Iterable[fx.Node]) -> bool:
        """Whether one of the nodes runs within torch.func's grad, vjp, jvp or vmap, or where tensors may carry tangents."""
        return any(self._transforms[node] > 0 or _wrapped(tensor_of(node)) for node in nodes)

    def needs_grad(self, output: fx.Node, operands: Iterable[fx.Node], inner: Iterable[fx.Node] = ()) -> bool:
        """Whether autograd records a path from the operands to the output.

        Args:
            inner: nodes between them.
        """
        # a conversion that changes nothing gives the parameter itself, which requires a gradient in every mode
        followed = any(_requires_grad(node) and not example_tensor(node).is_leaf for node in (output, *inner))
        return followed or (self._grad[output] and any(_requires_grad(node) for node in operands))


def _requires_grad(node: fx.Node) -> bool:
    tensor = tensor_of(node)
    return tensor is not None and tensor.requires_grad


def _wrapped(tensor: torch.Tensor | None) -> bool:
    return tensor is not None and is_wrapped(tensor)


def refuse(op: str, operands: tuple[Any, ...], options: dict[str, Any]) -> None:
    """Checks that no derivative is taken of an op's tensors. Every kernel and fake kernel calls it; under torch.no_grad() it does nothing.

    Args:
        op: name of the op.
        operands, options: its arguments.

    Raises:
        UnsupportedError: a tensor requires a gradient or carries a tangent.
    """
    if torch.is_grad_enabled() or dual_levels():
        for operand in (*operands, *options.values()):
            if isinstance(operand, torch.Tensor):
                _check(op, operand)


def _check(op: str, operand: torch.Tensor) -> None:
    if torch.is_grad_enabled() and operand.requires_grad:
        raise UnsupportedError("it has no gradient, and an operand requires one", where=f"sparsify::{op}", hint=_HINT)
    if dual_levels() and tangent(operand) is not None:
        raise UnsupportedError("it has no derivative, and an operand carries a tangent", where=f"sparsify::{op}", hint=_HINT)


def refuse_transforms(op: str, library: torch.library.Library) -> None:
    """Makes an op raise within torch.func's transforms, by a kernel for the dispatch key that torch uses only there."""

    def call(*args: Any, **options: Any) -> Any:
        raise UnsupportedError("it knows nothing of torch.func's grad, vjp, jvp and vmap", where=f"sparsify::{op}", hint=_HINT)

    register_kernel(library, op, call, "FuncTorchDynamicLayerFrontMode")
