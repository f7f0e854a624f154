"""What the matchers of one graph share, whether attention is one call or written out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import sympy
from torch import fx

from sparsify.graph.aliasing import Memory, example_tensor
from sparsify.masks import prove
from sparsify.masks.predicate import MaskPredicate
from sparsify.masks.prove import Extents
from sparsify.masks.symbolic import Facts, find_shape_env, plain, sizes
from sparsify.matching import biases
from sparsify.matching.facts import layer_of, missed, only_for, stride_order
from sparsify.matching.grouping import Grouped
from sparsify.matching.layouts import IN_ORDER, arranged
from sparsify.matching.sites import AttentionSite, ScoreBias
from sparsify.ops.gradients import TRANSFORMED, Modes

MaskReading = tuple[fx.Node, prove.Form, fx.Node]  # a condition, its form, and the node that reads it


@dataclass(frozen=True)
class Bias:
    """What a float mask adds to the scores, and the conditions that it hides by, as (condition, form, reader)."""

    slopes: fx.Node | None = None
    biases: tuple[ScoreBias, ...] = ()
    masks: tuple[MaskReading, ...] = ()


class MatchContext:
    """What all matchers of one graph share: what writes where, what is known of sizes, and proofs, which layers with one mask share."""

    def __init__(self, graph: fx.Graph):
        self.graph = graph
        self.memory = Memory(graph)
        self.modes = Modes(graph)
        self.shape_env = find_shape_env(graph)
        self.facts = Facts(self.shape_env)
        self._proofs: dict[tuple[Any, ...], MaskPredicate] = {}
        self.hiding_numbers: dict[tuple[fx.Node, Extents], set[float]] = {}  # of `empty_rows`: by mask

    def same(self, left: Any, right: Any) -> bool:
        return left == right or self.facts.holds(sympy.Eq(sympy.sympify(left), sympy.sympify(right)))

    def differ(self, left: sympy.Expr, right: sympy.Expr) -> bool:
        return self.facts.holds(sympy.Ne(left, right))

    def untransformed(self, site: AttentionSite) -> AttentionSite:
        """The site, refused where torch.func looks at what happens inside of it."""
        return missed(site, TRANSFORMED) if self.modes.transformed((site.output, *site.covered)) else site

    def proof(self, masks: Sequence[MaskReading], extents: Extents) -> MaskPredicate:
        """What the masks say together; each comes with its form and the node that reads it."""
        key = (tuple((mask, form) for mask, form, _ in masks), extents)
        if key not in self._proofs or any(self.memory.written_between(mask, None, reader) for mask, _, reader in masks):
            self._proofs[key] = prove.prove(masks, extents, self.memory, self.shape_env)
        return self._proofs[key]

    def biased(self, mask: fx.Node, reader: fx.Node, output: fx.Node, extents: Extents, shift_sensitive: str = "") -> Bias | None:
        """A float mask taken apart into a bias, by position or of numbers, and what hides.

        Args:
            reader: the node that adds it. output: the site's, where its operands are read.
            shift_sensitive: as in `scores.Term`.
        """
        # what a node's own step writes in place is its value
        if not example_tensor(mask).dtype.is_floating_point or self.memory.written_between(mask, mask, reader):
            return None
        for node, condition in biases.parts(mask, self.shape_env):
            masks = ((*condition, mask),) if condition is not None else ()
            if masks and self.proof(masks, extents).opaque:
                continue
            slopes = biases.alibi_slopes(node, output, extents, self.memory, self.shape_env)
            if slopes is not None and (slopes.constant == 0 or not shift_sensitive):
                return Bias(slopes.node, (), masks)
            adds = node is mask and biases.per_row(example_tensor(node), extents) and self.proof([(mask, "mask", reader)], extents).adds
            if (adds or biases.of_scores(node, extents)) and not self.memory.written_between(node, node, output):
                filled = bool(masks) and not example_tensor(masks[0][0]).dtype.is_floating_point
                return Bias(None, (ScoreBias(node, on_hidden=not filled),), masks)
        return None

    def site(
        self, output: fx.Node, query: fx.Node, key: Grouped, value: Grouped, heads: tuple[sympy.Expr, ...] = (), **fields: Any
    ) -> AttentionSite:
        """The record of an attention whose operands are known; `fields` are the rest of its fields. heads: (batch, heads) of operands in
        which the two are one dimension."""
        layouts = fields.setdefault("layouts", IN_ORDER)
        nodes = {"query": query, "key": key.node, "value": value.node}
        q, k, v = (arranged(sizes(example_tensor(node)), getattr(layouts, name), heads) for name, node in nodes.items())
        tensor = example_tensor(query)
        name, layer = layer_of(output)
        added = [fields[n] for n in ("sink_logits", "alibi_slopes") if fields.get(n) is not None]
        added += [one.node for one in fields.get("bias", ())]
        covered = only_for((output,), (*fields.pop("between", ()), *key.between, *value.between))
        fields.setdefault("softcap", 0.0)
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
            dtype=example_tensor(output).dtype,
            device=tensor.device,
            needs_grad=self.modes.needs_grad(output, (query, key.node, value.node, *added), covered),
            output_stride_order=stride_order(example_tensor(output), layouts.output, heads),
            covered=covered,
            **fields,
        )
