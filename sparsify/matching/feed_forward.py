"""Finds feed-forward blocks in a Dynamo graph: norm, gate and up, activation, down, residual sum."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import fx

from sparsify.costs.sizes import Size
from sparsify.graph import unforeseen
from sparsify.graph.aliasing import Memory, example_tensor, tensor_of
from sparsify.graph.calls import as_node
from sparsify.graph.views import transposed
from sparsify.masks.symbolic import plain, sizes
from sparsify.matching.base import SiteOverKeys
from sparsify.matching.facts import layer_of
from sparsify.matching.pointwise import (
    CASTS,
    VIEWS,
    binary_operands,
    bind_or_none,
    constant_factor,
    is_inactive_dropout,
    is_parameter,
    match_activation,
    match_norm,
    op_kind,
)
from sparsify.matching.sites import Activation, FeedForwardSite, Layout, Norm
from sparsify.ops.gradients import TRANSFORMED, Modes
from sparsify.ops.operands import plain_tensor

_SUMS = ("add", "iadd")


def find_feed_forward(gm: fx.GraphModule, attention: Sequence[SiteOverKeys] = ()) -> list[FeedForwardSite]:
    """Every feed-forward block of the graph, in execution order. Nothing in the graph is changed.

    A block that routes tokens to experts yields one site with its reason in `near_miss`, and so does a block whose surroundings
    cannot be read. attention: the graph's sites of attention and caches, which tell the sequence's length where no position is an input.
    """
    matcher = _Matcher(gm.graph, attention)
    found = [site for node in gm.graph.nodes if (site := matcher.site_of(node)) is not None]
    routed = matcher.routed()
    layers = {site.layer for site in routed}
    order = {node: i for i, node in enumerate(gm.graph.nodes)}
    merged = sorted([s for s in found if s.layer not in layers] + routed, key=lambda site: order[site.output])
    return [dataclasses.replace(site, index=i, count=len(merged)) for i, site in enumerate(merged)]


@dataclass(frozen=True)
class _Product:
    """x · weightᵀ + bias. source: what is multiplied; nodes: what computes it, the product's own node last."""

    source: fx.Node
    weight: fx.Node
    bias: fx.Node | None
    transposed: bool
    nodes: tuple[fx.Node, ...]


@dataclass(frozen=True)
class _Core:
    """The block between its input and its down projection's output."""

    source: fx.Node
    up: _Product
    gate: _Product | None
    down: _Product
    layout: Layout
    activation: Activation
    nodes: tuple[fx.Node, ...]


@dataclass(frozen=True)
class _Tail:
    """From the down projection to the residual sum."""

    output: fx.Node
    residuals: tuple[fx.Node, ...]
    post_norm: Norm
    scale: float
    nodes: tuple[fx.Node, ...]
    trouble: str = ""


class _Matcher:
    def __init__(self, graph: fx.Graph, attention: Sequence[SiteOverKeys]):
        self.graph = graph
        self.memory = Memory(graph)
        self.modes = Modes(graph)
        self.attention = attention

    def site_of(self, node: fx.Node) -> FeedForwardSite | None:
        try:
            return self.site(node)
        except Exception as error:
            reason, tensor = unforeseen.reason(error, node.name), tensor_of(node)
            if tensor is None:
                return None
            return FeedForwardSite(*_name(node), 0, 0, node, dtype=tensor.dtype, device=tensor.device, near_miss=reason)

    def site(self, node: fx.Node) -> FeedForwardSite | None:
        """The block whose down projection ends at `node`, or None."""
        core = _core(node)
        if core is None:
            return None
        tail = _tail(node)
        norm, source, norm_nodes = self._own_norm(core)
        tensor = example_tensor(tail.output)
        shape = sizes(tensor)
        covered = tuple(dict.fromkeys((*norm_nodes, *core.nodes, *tail.nodes)))
        intermediate = sizes(example_tensor(core.down.weight))[0 if core.down.transposed else 1]
        parameters = (core.up.weight, core.down.weight, *((core.gate.weight,) if core.gate else ()))
        site = FeedForwardSite(
            *_name(core.down.nodes[-1]),
            index=0,
            count=0,
            output=tail.output,
            residuals=tail.residuals,
            input=source,
            source=core.source,
            product=core.down.nodes[-1],
            up=core.up.weight,
            gate=core.gate.weight if core.gate else None,
            down=core.down.weight,
            up_bias=core.up.bias,
            gate_bias=core.gate.bias if core.gate else None,
            down_bias=core.down.bias,
            layout=core.layout,
            transposed=core.down.transposed,
            activation=core.activation,
            norm=norm,
            post_norm=tail.post_norm,
            scale=tail.scale,
            rows=_product(shape[:-1]),
            query_len=self._query_len(tail.output),
            hidden=plain(shape[-1]),
            intermediate=plain(intermediate),
            dtype=tensor.dtype,
            device=tensor.device,
            needs_grad=self.modes.needs_grad(tail.output, (source, *parameters, *tail.residuals), covered),
            covered=covered,
        )
        positions, cached = self._positions(site)
        site = dataclasses.replace(site, positions=positions, cached=cached)
        return dataclasses.replace(site, near_miss=tail.trouble or self._find_obstacle(site, core, source))

    def _own_norm(self, core: _Core) -> tuple[Norm, fx.Node, tuple[fx.Node, ...]]:
        """The norm that only this block reads, what it normalises, and its nodes; without one, the block's own input."""
        readers = {product.nodes[0] for product in (core.up, core.gate) if product is not None}
        found = match_norm(core.source)
        if found is None or set(core.source.users) - readers:
            return Norm(), core.source, ()
        return found

    def _find_obstacle(self, site: FeedForwardSite, core: _Core, source: fx.Node) -> str:
        """Why a block with a residual cannot be replaced, or nothing. source: the site's input."""
        if self.modes.transformed((site.output, source, *site.covered)):
            return TRANSFORMED
        read = (source, site.up, site.gate, site.down, site.up_bias, site.gate_bias, site.down_bias, site.norm.weight, site.norm.bias)
        for node in (*read, site.post_norm.weight, *site.residuals):
            if node is not None and ((tensor := tensor_of(node)) is None or not plain_tensor(tensor)):
                return f"it reads a {type(tensor).__name__}, not a plain tensor"
        tensors = [example_tensor(n) for n in (site.output, source, core.up.weight, core.down.weight, *site.residuals)]
        if len({t.dtype for t in tensors}) > 1:
            return "weights and residual differ in dtype"
        if (core.gate is not None and core.gate.transposed != core.down.transposed) or core.up.transposed != core.down.transposed:
            return "up and down projections differ in layout"
        if any(sizes(t) != sizes(tensors[0]) for t in tensors[4:]) or sizes(tensors[1]) != sizes(tensors[0]):
            return "a term of the residual sum is broadcast"
        if not tensors[0].is_contiguous():
            return "the residual sum is not contiguous"
        inner = set(site.covered) - {site.output}
        if any(set(n.users) - set(site.covered) for n in inner):
            return "a value inside the block is used elsewhere too"
        for node in (*read, site.post_norm.weight, *site.residuals):
            if node is not None and self.memory.written_between(node, None, site.output):
                return "an operand is written in place before the block ends"
        return ""

    def _query_len(self, output: fx.Node) -> Size:
        shape = sizes(example_tensor(output))
        if example_tensor(output).dim() >= 3:
            return plain(shape[-2])
        if self.attention:
            return self.attention[0].query_len
        token_ids = [n for n in self.graph.nodes if n.op == "placeholder" and _integers(n, 2)]
        return plain(sizes(example_tensor(token_ids[0]))[-1]) if token_ids else plain(shape[0])

    def _positions(self, site: FeedForwardSite) -> tuple[fx.Node | None, fx.Node | None]:
        """By name: a wrong one could only shift the warm-up, never a value that is computed."""
        for node in self.graph.nodes:
            if node is site.output:
                break
            named = re.search(r"position_ids|cache_position", node.name) and (_integers(node, 1) or _integers(node, 2))
            if named and plain(sizes(example_tensor(node))[-1]) == site.query_len:
                return node, None
        for one in self.attention:
            if not one.near_miss and not one.mask.opaque and one.mask.query_start.bottom_right and one.query_len == site.query_len:
                return None, one.key
        return None, None

    def routed(self) -> list[FeedForwardSite]:
        """One refused site per layer that chooses experts."""
        found: dict[object, FeedForwardSite] = {}
        for node in self.graph.nodes:
            if op_kind(node) != "topk" or not node.all_input_nodes:
                continue
            name, layer = layer_of(node)
            if layer is None:
                continue
            scores = node.all_input_nodes[0]
            tensor = example_tensor(scores)
            reason = "the block routes tokens to experts: which weights are read depends on the token already"
            path = name.rpartition(".")[0] or name
            site = FeedForwardSite(path, layer, 0, 0, scores, dtype=tensor.dtype, device=tensor.device, near_miss=reason)
            found.setdefault(layer, site)
        return list(found.values())


def _integers(node: fx.Node, dims: int) -> bool:
    tensor = tensor_of(node)
    return tensor is not None and tensor.dim() == dims and tensor.dtype in (torch.int64, torch.int32)


def _name(down: fx.Node) -> tuple[str, int | None]:
    """The block's path: its down projection's, one level up."""
    name, layer = layer_of(down)
    return name.rpartition(".")[0], layer


def _product(shape: tuple[sympy.Expr, ...]) -> Size:
    return plain(math.prod(shape, start=sympy.Integer(1)))


# -- the block itself ----------------------------------------------------------------------------------------------------------------


def _linear(node: fx.Node) -> _Product | None:
    """A product with a two-dimensional parameter: F.linear, matmul with a transposed weight, or addmm between views."""
    kind = op_kind(node)
    if kind == "linear":
        call = bind_or_none(node, "input: tensor, weight: tensor, bias: tensor = None")
        return _made(call.input, call.weight, call.bias, False, (node,)) if call is not None else None
    if kind == "matmul" and len(node.args) == 2 and not node.kwargs and isinstance(node.args[1], fx.Node):
        return _made(node.args[0], transposed(node.args[1]), None, False, (node,))
    if kind in VIEWS and isinstance(node.args[0], fx.Node) and op_kind(node.args[0]) == "addmm":
        inner = node.args[0]
        call = bind_or_none(inner, _ADDMM)
        if call is None or op_kind(call.mat1) not in VIEWS or set(inner.users) != {node}:
            return None
        before = call.mat1
        source = as_node(before.args[0])
        if set(before.users) != {inner} or sizes(example_tensor(source))[:-1] != sizes(example_tensor(node))[:-1]:
            return None
        return _made(source, call.mat2, call.input, True, (before, inner, node))
    if kind == "addmm" and not any(op_kind(u) in VIEWS for u in node.users):
        call = bind_or_none(node, _ADDMM)
        return _made(call.mat1, call.mat2, call.input, True, (node,)) if call is not None else None
    return None


_ADDMM = "input: tensor, mat1: tensor, mat2: tensor"


def _made(source: Any, weight: fx.Node | None, bias: fx.Node | None, transposed: bool, nodes: tuple[fx.Node, ...]) -> _Product | None:
    read, made = tensor_of(source), example_tensor(nodes[-1])
    if read is None or weight is None or not is_parameter(weight, 2) or not (bias is None or is_parameter(bias, 1)):
        return None
    # views between them may have cut rows in another way, or read other bits
    rows, columns = sizes(example_tensor(weight))[:: -1 if transposed else 1]
    views = ((source, nodes[0]), (nodes[1], nodes[2])) if len(nodes) == 3 else ()
    if (sizes(read)[-1], sizes(made)[-1]) != (columns, rows):
        return None
    if any(example_tensor(a).dtype is not example_tensor(b).dtype for a, b in views):
        return None
    return _Product(source, weight, bias, transposed, nodes)


def _half(node: fx.Node) -> tuple[_Product, int, tuple[fx.Node, ...]] | None:
    """One half of a fused product: `product.chunk(2, -1)[i]` or `product.split(n, -1)[i]`."""
    if op_kind(node) != "getitem":
        return None
    parts, place = node.args
    if not isinstance(parts, fx.Node) or not isinstance(place, int) or place not in (0, 1):
        return None
    if op_kind(parts) not in ("chunk", "split") or len(parts.meta["example_value"]) != 2:
        return None
    call = bind_or_none(
        parts, "input: tensor, chunks, dim=0", "tensor: tensor, split_size_or_sections, dim=0", "input: tensor, split_size, dim=0"
    )
    if call is None:
        return None
    whole = getattr(call, "input", None) or call.tensor
    product = _linear(whole)
    if product is None or call.dim not in (-1, example_tensor(whole).dim() - 1):
        return None
    halves = [sizes(t)[-1] for t in parts.meta["example_value"]]
    return (product, place, (parts, node)) if halves[0] == halves[1] else None


def _core(node: fx.Node) -> _Core | None:
    """The block whose down projection is `node`."""
    down = _linear(node)
    if down is None:
        return None
    inner = down.source
    gated = _gated(inner)
    layout: Layout
    if gated is not None:
        source, up, gate, layout, activation, nodes = gated
    else:
        found = match_activation(inner)
        up = _linear(found[1]) if found is not None else None
        if found is None or up is None:
            return None
        source, gate, layout, activation = up.source, None, "plain", found[0]
        nodes = (*up.nodes, *found[2])
    if sizes(example_tensor(node))[-1] != sizes(example_tensor(source))[-1]:
        return None
    return _Core(source, up, gate, down, layout, activation, (*nodes, *down.nodes))


def _gated(
    node: fx.Node,
) -> tuple[fx.Node, _Product, _Product | None, Layout, Activation, tuple[fx.Node, ...]] | None:
    """`act(gate) · up`: source, up, gate, layout, activation, nodes."""
    factors = binary_operands(node) if op_kind(node) == "mul" else None
    if factors is None or not all(isinstance(a, fx.Node) for a in factors):
        return None
    for active, other in (factors, factors[::-1]):
        found = match_activation(active)
        if found is None:
            continue
        activation, raw, steps = found
        gate, up = _linear(raw), _linear(other)
        if gate is not None and up is not None and gate.source is up.source:
            return gate.source, up, gate, "split", activation, (*gate.nodes, *steps, *up.nodes, node)
        first, second = _half(raw), _half(other)
        if first is not None and second is not None and first[0].nodes[-1] is second[0].nodes[-1] and first[1] != second[1]:
            layout: Layout = "gate_up" if first[1] == 0 else "up_gate"
            nodes = (*first[0].nodes, *first[2], *steps, *second[2], node)
            return first[0].source, first[0], None, layout, activation, tuple(dict.fromkeys(nodes))
    return None


# -- from the down projection to the residual sum ----------------------------------------------------------------------------------------


def _tail(node: fx.Node) -> _Tail:
    """Follows the block's output through dropout at rest, a scale and a norm to the sum with the residual stream."""
    here, scale, post_norm, nodes = node, 1.0, Norm(), []
    residuals: list[fx.Node] = []

    def done(trouble: str = "") -> _Tail:
        return _Tail(here, tuple(residuals), post_norm, scale, (*nodes,), trouble)

    while True:
        normed = None if residuals or post_norm.kind != "none" else _norm_after(here)
        if normed is not None:
            post_norm, here, steps = normed
            nodes.extend(steps)
            continue
        users = list(here.users)
        if len(users) != 1 or users[0].op == "output":
            break
        user = users[0]
        kind = op_kind(user)
        if kind == "dropout":
            if not is_inactive_dropout(user):
                return done("dropout is active: call model.eval()")
        elif kind == "mul" and not residuals and (factor := constant_factor(user, here)) is not None:
            if post_norm.kind != "none":
                return done("the block's output is scaled after its norm")
            scale *= factor
        elif kind in _SUMS:
            other = _other_term(user, here)
            if other is None or (other is here and len(user.args) == 2):
                break
            # in place, a value of the block's own may be written, as nothing else reads it
            if kind == "iadd" and user.args[0] is not here:
                return done("the block's output is summed into another tensor in place")
            residuals.append(other)
        else:
            break
        nodes.append(user)
        here = user
    if not residuals:
        return done("the block's output is not added to a residual stream")
    # steps after the last sum belong to what follows
    while op_kind(here) not in _SUMS:
        nodes.pop()
        here = nodes[-1]
    return done()


def _other_term(node: fx.Node, term: fx.Node) -> fx.Node | None:
    """The other tensor of a sum of two; None for anything else."""
    terms = binary_operands(node)
    if terms is None or not all(isinstance(a, fx.Node) for a in terms):
        return None
    other = terms[1] if terms[0] is term else terms[0]
    return other if (tensor := tensor_of(other)) is not None and tensor.is_floating_point() else None


def _norm_after(node: fx.Node) -> tuple[Norm, fx.Node, tuple[fx.Node, ...]] | None:
    """A norm of `node` that is all of its use: norm, its result, its nodes."""
    reached, frontier = {node}, [node]
    for _ in range(10):
        frontier = [u for n in frontier for u in n.users if u not in reached and u.op in ("call_function", "call_method")]
        if not frontier or len(reached) > 24:
            return None
        reached.update(frontier)
        for candidate in frontier:
            found = match_norm(candidate)
            if found is not None and found[1] is node and not _continues(candidate):
                norm, _, steps = found
                return (norm, candidate, steps) if set(node.users) <= set(steps) else None
    return None


def _continues(node: fx.Node) -> bool:
    """Whether a norm's value is only cast next, and the cast belongs to the norm."""
    return len(node.users) == 1 and op_kind(next(iter(node.users))) in CASTS and match_norm(next(iter(node.users))) is not None
