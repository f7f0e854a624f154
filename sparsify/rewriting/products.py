"""Writes the product of a weight with a single row as a sum of elementwise products, which Inductor turns into a kernel of its own.

A decode step of one sequence reads every weight once, for one row of activations each. cuBLAS serves such products by kernels for matrices,
which leave about a quarter of the memory's bandwidth unused where a weight is small; a generated reduction streams the weight, and what
comes before and after the product (norm, activation, residual) is computed within it. Both add up in fp32.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import fx

from sparsify.graph.aliasing import tensor_of

_HALF = (torch.bfloat16, torch.float16)
_LINEAR = (F.linear, torch._C._nn.linear)


def write_out_single_rows(graph: fx.Graph, device_type: str = "cuda") -> int:
    """Rewrites `linear(x, weight, bias)` in place where x is one row of half precision that needs no gradient.

    Args:
        graph: of nodes with example values; new nodes get none.
        device_type: of the products that are rewritten.

    Returns:
        how many were rewritten.
    """
    count = 0
    for node in list(graph.nodes):
        if node.op != "call_function" or node.target not in _LINEAR:
            continue
        given = dict(zip(("input", "weight", "bias"), node.args, strict=False)) | node.kwargs
        x, weight, bias = (given.get(name) for name in ("input", "weight", "bias"))
        if set(given) - {"input", "weight", "bias"} or not _single_row(tensor_of(x), tensor_of(weight), device_type):
            continue
        shape = list(tensor_of(node).shape)  # pyright: ignore[reportOptionalMemberAccess]
        with graph.inserting_before(node):
            row = graph.call_method("reshape", (x, [1, -1]))
            total = graph.call_method("sum", (graph.call_function(torch.mul, (weight, row)), -1))
            if bias is not None:
                total = graph.call_function(torch.add, (total, bias))
            result = graph.call_method("reshape", (total, shape))
        node.replace_all_uses_with(result)
        graph.erase_node(node)
        count += 1
    return count


def _single_row(x: torch.Tensor | None, weight: torch.Tensor | None, device_type: str) -> bool:
    if x is None or weight is None or x.dtype != weight.dtype or x.dtype not in _HALF or x.device.type != device_type:
        return False
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return False
    rows = x.shape[:-1]
    return all(type(size) is int and size == 1 for size in rows) and weight.dim() == 2 and weight.stride(-1) == 1
