"""What a graph does beside its attention: expected seconds of its linear layers, by what they belong to, and of elementwise work.

Nothing here is proved, and nothing depends on it: these numbers are for people. They are those of the example's sizes, and guard nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import fx

from sparsify.costs import work
from sparsify.costs.device import Device
from sparsify.costs.seconds import linear_seconds, seconds
from sparsify.graph.aliasing import example_tensor, tensor_of
from sparsify.masks.symbolic import sizes
from sparsify.matching.base import Site, SiteOverKeys
from sparsify.matching.facts import layer_of
from sparsify.matching.feed_forward import find_feed_forward
from sparsify.matching.pointwise import bind_or_none, is_parameter, op_kind
from sparsify.matching.sites import AttentionSite

FEED_FORWARD, PROJECTIONS, LOGITS, ELEMENTWISE = "feed-forward", "projections", "logits", "elementwise"
PARTS = (FEED_FORWARD, PROJECTIONS, LOGITS, ELEMENTWISE)

_MOVES = {"view", "reshape", "transpose", "permute", "contiguous", "flatten", "unflatten"}


@dataclass(frozen=True)
class _Product:
    """node: input [rows, inputs] times a weight [outputs, inputs], in either order of the weight's dimensions."""

    node: fx.Node
    input: fx.Node
    inputs: int
    outputs: int


def seconds_beside(gm: fx.GraphModule, sites: Sequence[Site], device: Device) -> dict[str, float]:
    """Expected seconds of what a graph computes beside the attention, by part, every block computed.

    Elementwise work is counted as Inductor fuses it: what linear layers read was written once, what they give is read once, queries and
    keys are written again by their rotation, and each residual sum reads and writes the stream. Routed experts are not counted.

    Args:
        sites: the graph's.

    Returns:
        seconds by part, one of `PARTS`; a part that the graph lacks is left out.
    """
    over_keys = [site for site in sites if isinstance(site, SiteOverKeys)]
    blocks = {node for site in find_feed_forward(gm, over_keys) for node in site.covered}
    attended = {site.output for site in over_keys}
    found: dict[str, float] = {}
    moved, written = 0, set[fx.Node]()

    for node in gm.graph.nodes:
        product = _product(node)
        if product is not None:
            part = FEED_FORWARD if node in blocks else LOGITS if layer_of(node)[1] is None else PROJECTIONS
            dtype = example_tensor(node).dtype
            rows = _bytes(node) // dtype.itemsize // product.outputs
            found[part] = found.get(part, 0.0) + float(linear_seconds(device, rows, product.inputs, product.outputs, dtype))
            if part != LOGITS:
                moved += _bytes(node)
                if product.input not in written and _origin(product.input) not in attended:
                    written.add(product.input)
                    moved += _bytes(product.input)
        elif _is_residual_sum(node):
            moved += 2 * _bytes(node)
    moved += sum(_bytes(site.query) + _bytes(site.key) for site in over_keys if isinstance(site, AttentionSite) and not site.near_miss)
    if moved:
        found[ELEMENTWISE] = float(seconds(work.elementwise(moved), device))
    return {part: found[part] for part in PARTS if part in found}


def _bytes(node: fx.Node) -> int:
    """Bytes of a node's value at the example's sizes; 0 where it is no tensor."""
    tensor = tensor_of(node)
    if tensor is None:
        return 0
    shape = (size.node.hint if isinstance(size, torch.SymInt) else size for size in tensor.shape)
    return math.prod(int(size or 0) for size in shape) * tensor.dtype.itemsize


def _product(node: fx.Node) -> _Product | None:
    kind = op_kind(node)
    if kind == "linear":
        call, order = bind_or_none(node, "input: tensor, weight: tensor, bias: tensor = None"), (1, 0)
    elif kind == "addmm":
        call, order = bind_or_none(node, "bias, input: tensor, weight: tensor"), (0, 1)
    elif kind == "matmul":
        call, order = bind_or_none(node, "input: tensor, weight: tensor"), (0, 1)
    else:
        return None
    if call is None or not is_parameter(call.weight, 2) or tensor_of(node) is None:
        return None
    shape = sizes(example_tensor(call.weight))
    if not all(one.is_number for one in shape):
        return None
    return _Product(node, call.input, *(int(shape[dim]) for dim in order))


def _origin(node: fx.Node) -> fx.Node:
    """The node whose elements a chain of views and copies holds."""
    while node.op in ("call_method", "call_function") and node.args and isinstance(node.args[0], fx.Node):
        if (node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")) not in _MOVES:
            break
        node = node.args[0]
    return node


def _is_residual_sum(node: fx.Node) -> bool:
    """Whether a node adds two activations [batch, tokens, hidden] of one shape in a layer."""
    if op_kind(node) not in ("add", "iadd") or len(node.args) < 2:
        return False
    terms = [tensor_of(term) for term in node.args[:2]]
    tensor = tensor_of(node)
    if tensor is None or tensor.dim() != 3 or layer_of(node)[1] is None or not tensor.is_floating_point():
        return False
    return all(isinstance(one, torch.Tensor) and one.dim() == 3 and sizes(one) == sizes(tensor) for one in terms)
