"""Finds attention in a Dynamo graph, before AOTAutograd: there scaled_dot_product_attention is one node and sizes are symbolic."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace

import sympy
import torch
import torch.nn.functional as F
from torch import fx

from sparsify.graph import unforeseen
from sparsify.graph.aliasing import example_tensor, tensor_of
from sparsify.graph.calls import Unbound, bind
from sparsify.masks import prove
from sparsify.masks.prove import Extents
from sparsify.masks.symbolic import sizes
from sparsify.matching import empty_rows
from sparsify.matching.context import Bias, MatchContext
from sparsify.matching.eager import find_eager
from sparsify.matching.eager_ops import NoMatch, is_softmax
from sparsify.matching.facts import autocast_to, bare_site
from sparsify.matching.grouping import ungroup, whole
from sparsify.matching.lookalikes import WHOLE
from sparsify.matching.sites import AttentionSite
from sparsify.ops.gradients import TRANSFORMED
from sparsify.ops.operands import plain_tensor

_SDPA = {
    F.scaled_dot_product_attention,
    torch._C._nn.scaled_dot_product_attention,  # pyright: ignore[reportAttributeAccessIssue]  # not in torch's stubs
}
_SDPA_CALL = (
    "query: tensor, key: tensor, value: tensor, attn_mask: tensor = None, dropout_p=0.0, is_causal=False, *, scale=None, enable_gqa=False"
)


def find_attention(gm: fx.GraphModule) -> list[AttentionSite]:
    """Every attention of the graph, in execution order, `index` counting from 0. Nothing in the graph is changed.

    A call of scaled_dot_product_attention always yields a site, and so does a written-out attention; what cannot be described carries
    its reason in `near_miss`. So does whatever looks like attention: a softmax between two products, with anything in between.
    """
    context = MatchContext(gm.graph)
    sites: list[AttentionSite] = []
    for node in gm.graph.nodes:
        if node.target in WHOLE and tensor_of(node.args[0]) is not None:
            query, key, value = (*node.all_input_nodes, node, node)[:3]
            sites.append(bare_site(node, query, key, value, None, "torch.nn.MultiheadAttention is one call, which is not taken apart"))
        elif (is_sdpa(node) or is_softmax(node)) and (site := _site_of(context, node)) is not None:
            sites.append(site)
    return [replace(context.untransformed(site), index=index) for index, site in enumerate(sites)]


def is_sdpa(node: fx.Node) -> bool:
    return node.op == "call_function" and node.target in _SDPA


def _appended(key: fx.Node, query_len: sympy.Expr) -> bool:
    """Whether there is one query and its key was put behind older ones. Cross-attention puts nothing anywhere."""
    if query_len != 1 or key.target not in (torch.cat, "cat"):
        return False
    try:
        call = bind(key, "tensors, dim=0")
    except Unbound:
        return False
    last = tensor_of(call.tensors[-1])
    return call.dim in (2, -2) and last is not None and sizes(last)[2] == 1


def _site_of(context: MatchContext, node: fx.Node) -> AttentionSite | None:
    """The attention that a call of scaled_dot_product_attention is, or a softmax belongs to."""
    try:
        return _sdpa_site(context, node) if is_sdpa(node) else find_eager(context, node)
    except Unbound as why:
        trouble = str(why)
    except Exception as error:
        trouble = unforeseen.reason(error, node.name)
    query, key, value = ((*node.all_input_nodes, node) * 3)[:3]
    return bare_site(node, query, key, value, None, trouble, source="sdpa" if is_sdpa(node) else "eager")


def _sdpa_site(context: MatchContext, node: fx.Node) -> AttentionSite:
    call = bind(node, _SDPA_CALL)
    query, key, value, mask = call.query, call.key, call.value, call.attn_mask
    near_miss = _unfit(context, node, call)
    if near_miss:
        return bare_site(node, query, key, value, mask, near_miss)
    key_group, value_group = ungroup(context.memory, key, node), ungroup(context.memory, value, node)
    if not context.same(key_group.repeat, value_group.repeat):
        key_group, value_group = whole(key), whole(value)
    q, k = sizes(example_tensor(query)), sizes(example_tensor(key_group.node))
    extents = Extents(q[0], q[1], q[2], k[2])
    if call.is_causal:
        proof = prove.top_left_causal(extents, context.shape_env)
    else:
        proof = prove.unmasked(_appended(key_group.node, q[2])) if mask is None else context.proof([(mask, "mask", node)], extents)
    bias = Bias()
    # autocast would round the mask's numbers too
    if mask is not None and proof.opaque and example_tensor(mask).dtype is example_tensor(node).dtype:
        found = context.biased(mask, node, node, extents)
        if found is not None:
            bias, proof = found, context.proof(found.masks, extents) if found.masks else prove.none()
    try:
        empty = empty_rows.rows_of_sdpa(context, node, mask, proof, bias, extents)
    except NoMatch as why:
        return bare_site(node, query, key, value, mask, str(why))
    return context.site(
        node,
        query,
        key_group,
        value_group,
        mask_node=mask,
        mask=proof,
        scale=_number(call.scale, q[3]),
        dropout=call.dropout_p,
        alibi_slopes=bias.slopes,
        bias=bias.biases,
        **vars(empty),
    )


def _unfit(context: MatchContext, node: fx.Node, call: SimpleNamespace) -> str:
    """Why the operands cannot be described, or nothing."""
    if context.modes.transformed([node]):
        return TRANSFORMED
    operands = (call.query, call.key, call.value)
    tensors = [example_tensor(x) for x in operands]
    if odd := [type(t).__name__ for t in tensors if not plain_tensor(t)]:
        return f"an operand is a {odd[0]}, not a plain tensor"
    if any(t.dim() != 4 for t in tensors):
        return f"operands of {tensors[0].dim()} dimensions instead of 4"
    if autocast_to(node, operands) is None:
        return "query, key and value differ in dtype"
    q, k, v = map(sizes, tensors)
    if not (context.same(q[0], k[0]) and context.same(q[0], v[0])):
        return "the batch dimension is broadcast"
    if context.differ(k[2], v[2]) or not context.same(k[1], v[1]):
        return "keys and values differ in length or heads"
    if call.enable_gqa not in (True, False) or call.is_causal not in (True, False):
        return "a flag is decided at run time"
    if call.is_causal and call.attn_mask is not None:
        return "a mask beside is_causal, which kernels take differently"
    if any(size == 1 != out for size, out in zip((q[0], q[1], q[2]), sizes(example_tensor(node)))):
        return "the mask broadcasts the queries"
    if not call.enable_gqa and not context.same(q[1], k[1]) and k[1] != 1:  # one head broadcasts as a group would
        return "the head dimension is broadcast"
    if not isinstance(call.dropout_p, (int, float)):
        return "the dropout probability is decided at run time"
    if call.scale is None and not q[3].is_Integer:
        return "the head dimension, which the default scale depends on, is symbolic"
    return ""


def _number(value: float | fx.Node | None, head_dim: sympy.Expr) -> float | fx.Node:
    """A float where it is known now, else the node that holds it; by default one over the root of the head dimension."""
    if value is None:
        return 1.0 / math.sqrt(int(head_dim))
    if isinstance(value, fx.Node):
        example = value.meta.get("example_value")
        if isinstance(example, (int, float)):
            return float(example)
        if isinstance(example, (torch.SymFloat, torch.SymInt)) and example.node.expr.is_number:
            return float(example.node.expr)
        return value
    return float(value)
