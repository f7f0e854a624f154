"""Finds attention in a Dynamo graph, before AOTAutograd: there scaled_dot_product_attention is one node and sizes are symbolic."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace

import sympy
import torch
import torch.nn.functional as F
from torch import fx

from sparsify.graph import unforeseen
from sparsify.graph.aliasing import Memory, tensor_of
from sparsify.graph.calls import Unbound, bind
from sparsify.masks import prove as predicates
from sparsify.masks.predicate import MaskPredicate
from sparsify.masks.prove import Extents
from sparsify.masks.symbolic import Facts, plain, scalar, shape_env_of, sizes
from sparsify.matching import biases, empty_rows
from sparsify.matching.eager import find_eager
from sparsify.matching.eager_ops import NoMatch, is_softmax
from sparsify.matching.facts import Grouped, autocast_to, bare_site, layer_of, missed, only_for, stride_order, whole
from sparsify.matching.sites import AttentionSite, KeyBias
from sparsify.ops.gradients import TRANSFORMED, Modes
from sparsify.ops.operands import plain_tensor

_SDPA = {F.scaled_dot_product_attention, torch._C._nn.scaled_dot_product_attention}
_SDPA_CALL = (
    "query: tensor, key: tensor, value: tensor, attn_mask: tensor = None, dropout_p=0.0, is_causal=False, *, scale=None, enable_gqa=False"
)
_COPIES = {"contiguous", "clone"}


def find_attention(gm: fx.GraphModule) -> list[AttentionSite]:
    """Every attention of the graph, in execution order, `index` counting from 0. Nothing in the graph is changed.

    A call of scaled_dot_product_attention always yields a site, and so does a written-out attention; what cannot be described carries
    its reason in `near_miss`.
    """
    matcher = Matcher(gm.graph)
    sites: list[AttentionSite] = []
    for node in gm.graph.nodes:
        if (is_sdpa(node) or is_softmax(node)) and (site := matcher.site_of(node)) is not None:
            sites.append(site)
    return [replace(matcher.untransformed(site), index=index) for index, site in enumerate(sites)]


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


@dataclass(frozen=True)
class Bias:
    """What a float mask adds to the scores, and the conditions that it hides by, as (condition, form, reader)."""

    slopes: fx.Node | None = None
    per_key: tuple[KeyBias, ...] = ()
    masks: tuple[tuple[fx.Node, predicates.Form, fx.Node], ...] = ()


def is_sdpa(node: fx.Node) -> bool:
    return node.op == "call_function" and node.target in _SDPA


class Matcher:
    """Describes the attention sites of one graph; layers that share a mask share its proof."""

    def __init__(self, graph: fx.Graph):
        self.graph = graph
        self.memory = Memory(graph)
        self.modes = Modes(graph)
        self.shape_env = shape_env_of(graph)
        self.facts = Facts(self.shape_env)
        self._proofs: dict[tuple, MaskPredicate] = {}
        self.hidden: dict[tuple, set[float]] = {}  # of `empty_rows`: by mask, the numbers that hide

    def same(self, left: object, right: object) -> bool:
        return left == right or self.facts.holds(sympy.Eq(sympy.sympify(left), sympy.sympify(right)))

    def differ(self, left: sympy.Expr, right: sympy.Expr) -> bool:
        return self.facts.holds(sympy.Ne(left, right))

    def untransformed(self, site: AttentionSite) -> AttentionSite:
        """The site, refused where torch.func looks at what happens inside of it."""
        return missed(site, TRANSFORMED) if self.modes.transformed((site.output, *site.covered)) else site

    def site_of(self, node: fx.Node) -> AttentionSite | None:
        """The attention that a call of scaled_dot_product_attention is, or a softmax belongs to."""
        try:
            return self.sdpa(node) if is_sdpa(node) else find_eager(self, node)
        except Unbound as why:
            trouble = str(why)
        except Exception as error:
            trouble = unforeseen.reason(error, node.name)
        operands = ((*node.all_input_nodes, node) * 3)[:3]
        return bare_site(node, *operands, None, trouble, source="sdpa" if is_sdpa(node) else "eager")

    def prove(self, masks: Sequence[tuple[fx.Node, predicates.Form, fx.Node]], extents: Extents) -> MaskPredicate:
        """What the masks say together; each comes with its form and the node that reads it."""
        key = (tuple((mask, form) for mask, form, _ in masks), extents)
        if key not in self._proofs or any(self.memory.written_between(mask, None, reader) for mask, _, reader in masks):
            self._proofs[key] = predicates.prove(masks, extents, self.memory, self.shape_env)
        return self._proofs[key]

    # -- scaled_dot_product_attention --------------------------------------------------------------------------------------------

    def sdpa(self, node: fx.Node) -> AttentionSite:
        call = bind(node, _SDPA_CALL)
        query, key, value, mask = call.query, call.key, call.value, call.attn_mask
        near_miss = self.unfit(node, call)
        if near_miss:
            return bare_site(node, query, key, value, mask, near_miss)
        key_group, value_group = self.ungroup(key, node), self.ungroup(value, node)
        if not self.same(key_group.repeat, value_group.repeat):
            key_group, value_group = whole(key), whole(value)
        q, k = sizes(tensor_of(query)), sizes(tensor_of(key_group.node))
        extents = Extents(q[0], q[1], q[2], k[2])
        if call.is_causal:
            proof = predicates.top_left_causal(extents, self.shape_env)
        else:
            proof = predicates.unmasked(_appended(key_group.node, q[2])) if mask is None else self.prove([(mask, "mask", node)], extents)
        bias = Bias()
        # autocast would round the mask's numbers too
        apart = mask is not None and proof.opaque and tensor_of(mask).dtype is tensor_of(node).dtype
        if apart and (found := self.biased(mask, node, extents)) is not None:
            bias, proof = found, self.prove(found.masks, extents) if found.masks else predicates.none()
        try:
            empty = empty_rows.of_sdpa(self, node, mask, proof, bias, extents)
        except NoMatch as why:
            return bare_site(node, query, key, value, mask, str(why))
        return self.site(
            node,
            query,
            key_group,
            value_group,
            mask_node=mask,
            mask=proof,
            scale=_number(call.scale, q[3]),
            dropout=call.dropout_p,
            alibi_slopes=bias.slopes,
            key_bias=bias.per_key,
            **vars(empty),
        )

    def biased(self, mask: fx.Node, reader: fx.Node, extents: Extents, felt: str = "") -> Bias | None:
        """A float mask taken apart into a position bias, or one number per key, and what hides. felt: as in `scores.Term`."""
        if not tensor_of(mask).dtype.is_floating_point or self.memory.written_between(mask, None, reader):
            return None
        for node, condition in biases.parts(mask, self.shape_env):
            masks = ((*condition, mask),) if condition is not None else ()
            if masks and self.prove(masks, extents).opaque:
                continue
            slopes = biases.alibi_slopes(node, reader, extents, self.memory, self.shape_env)
            if slopes is not None and (slopes.constant == 0 or not felt):
                return Bias(slopes.node, (), masks)
            if biases.per_key(tensor_of(node), extents) and not self.memory.written_between(node, None, reader):
                filled = bool(masks) and not tensor_of(masks[0][0]).dtype.is_floating_point
                return Bias(None, (KeyBias(node, on_hidden=not filled),), masks)
        return None

    def unfit(self, node: fx.Node, call: SimpleNamespace) -> str:
        """Why the operands cannot be described, or nothing."""
        if self.modes.transformed([node]):
            return TRANSFORMED
        operands = (call.query, call.key, call.value)
        tensors = [tensor_of(x) for x in operands]
        if odd := [type(t).__name__ for t in tensors if not plain_tensor(t)]:
            return f"an operand is a {odd[0]}, not a plain tensor"
        if any(t.dim() != 4 for t in tensors):
            return f"operands of {tensors[0].dim()} dimensions instead of 4"
        if autocast_to(node, operands) is None:
            return "query, key and value differ in dtype"
        q, k, v = map(sizes, tensors)
        if not (self.same(q[0], k[0]) and self.same(q[0], v[0])):
            return "the batch dimension is broadcast"
        if self.differ(k[2], v[2]) or not self.same(k[1], v[1]):
            return "keys and values differ in length or heads"
        if call.enable_gqa not in (True, False) or call.is_causal not in (True, False):
            return "a flag is decided at run time"
        if call.is_causal and call.attn_mask is not None:
            return "a mask beside is_causal, which kernels take differently"
        if any(size == 1 != out for size, out in zip((q[0], q[1], q[2]), sizes(tensor_of(node)))):
            return "the mask broadcasts the queries"
        if not call.enable_gqa and not self.same(q[1], k[1]) and k[1] != 1:  # one head broadcasts as a group would
            return "the head dimension is broadcast"
        if not isinstance(call.dropout_p, (int, float)):
            return "the dropout probability is decided at run time"
        if call.scale is None and not q[3].is_Integer:
            return "the head dimension, which the default scale depends on, is symbolic"
        return ""

    def site(self, output: fx.Node, query: fx.Node, key: Grouped, value: Grouped, **fields: object) -> AttentionSite:
        """The record of an attention whose operands are known; `fields` are the rest of its fields."""
        q, k, v = (sizes(tensor_of(x)) for x in (query, key.node, value.node))
        tensor = tensor_of(query)
        name, layer = layer_of(output)
        added = [fields[n] for n in ("sink_logits", "alibi_slopes") if fields.get(n) is not None]
        added += [one.node for one in fields.get("key_bias", ())]
        covered = only_for((output,), (*fields.pop("between", ()), *key.between, *value.between))
        return AttentionSite(
            name=name,
            layer=layer,
            index=0,
            output=output,
            query=query,
            key=key.node,
            value=value.node,
            batch=plain(q[0]),
            query_heads=plain(q[1]),
            kv_heads=plain(k[1]),
            query_len=plain(q[2]),
            key_len=plain(k[2]),
            qk_head_dim=plain(q[3]),
            v_head_dim=plain(v[3]),
            dtype=tensor_of(output).dtype,
            device=tensor.device,
            needs_grad=self.modes.needs_grad(output, (query, key.node, value.node, *added), covered),
            output_stride_order=stride_order(tensor_of(output)),
            covered=covered,
            **{"softcap": 0.0, **fields},
        )

    # -- grouped queries ---------------------------------------------------------------------------------------------------------

    def ungroup(self, node: fx.Node, reader: fx.Node) -> Grouped:
        """Looks through a repeat over the heads of each group; without one, the node itself.

        Keys are then read by `reader` instead of by the copy, so nothing may write to them in between.
        """
        chain: list[fx.Node] = []
        here = node
        while here.op == "call_method" and here.target in _COPIES:
            chain.append(here)
            here = here.args[0]
        found = self._repeat_interleave(here) or self._expanded(here)
        if found is None or any(self.memory.written_between(found.node, n, reader) for n in found.between):
            return whole(node)
        if any(self.memory.written_between(n, None, reader) for n in (*chain, *found.between) if _fresh(n, found.node)):
            return whole(node)
        return Grouped(found.node, found.repeat, (*chain, *found.between))

    def _repeat_interleave(self, node: fx.Node) -> Grouped | None:
        if node.target not in (torch.repeat_interleave, "repeat_interleave"):
            return None
        try:
            call = bind(node, "input: tensor, repeats: int, dim: int")
        except Unbound:
            return None
        return Grouped(call.input, scalar(call.repeats), (node,)) if call.dim in (1, -3) else None

    def _expanded(self, node: fx.Node) -> Grouped | None:
        """`x[:, :, None].expand(batch, heads, repeat, length, dim).reshape(batch, heads * repeat, length, dim)`."""
        if node.op == "call_method" and node.target == "expand" and tensor_of(node).dim() == 4:
            return self._single_head(node)
        if node.target not in ("reshape", "view", "flatten", torch.reshape, torch.flatten):
            return None
        chain, here = [node], node.all_input_nodes[0]
        while isinstance(here, fx.Node) and here.op == "call_method" and here.target in _COPIES:
            chain.append(here)
            here = here.args[0]
        if not isinstance(here, fx.Node) or here.target not in ("expand", "broadcast_to", torch.broadcast_to):
            return None
        chain.append(here)
        lifted = here.all_input_nodes[0]
        if not isinstance(lifted, fx.Node) or not _inserts_third_dimension(lifted):
            return None
        chain.append(lifted)
        source = lifted.args[0]
        before, wide, after = sizes(tensor_of(source)), sizes(tensor_of(here)), sizes(tensor_of(node))
        if len(before) != 4 or len(wide) != 5 or len(after) != 4:
            return None
        fits = wide[:2] == before[:2] and wide[3:] == before[2:] and tensor_of(source).dtype is tensor_of(node).dtype
        fits = fits and after == (wide[0], sympy.expand(wide[1] * wide[2]), *wide[3:])
        return Grouped(source, wide[2], tuple(chain)) if fits else None

    def _single_head(self, node: fx.Node) -> Grouped | None:
        """One key head for all query heads: `x.expand(batch, heads, length, dim)` of [batch, 1, length, dim]."""
        source = node.args[0]
        before, after = sizes(tensor_of(source)), sizes(tensor_of(node))
        if len(before) != 4 or before[1] != 1 or (before[0], *before[2:]) != (after[0], *after[2:]):
            return None
        return Grouped(source, after[1], (node,))


def _inserts_third_dimension(node: fx.Node) -> bool:
    if node.target in ("unsqueeze", torch.unsqueeze):
        return bind(node, "input, dim").dim in (2, -3)
    if node.target is not operator.getitem or not isinstance(node.args[1], tuple):
        return False
    index = node.args[1]
    everything = slice(None, None, None)
    return len(index) >= 3 and index[2] is None and all(j == everything for n, j in enumerate(index) if n != 2) and len(index) <= 5


def _fresh(node: fx.Node, source: fx.Node) -> bool:
    """Whether a node has memory of its own."""
    one, other = tensor_of(node), tensor_of(source)
    return one.untyped_storage()._cdata != other.untyped_storage()._cdata


def _number(value: object, head_dim: sympy.Expr) -> float | fx.Node:
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
