"""Finds attention that is written out: matmul, scale, [tanh softcap], mask, softmax, matmul. Every such chain either becomes a site or
a near miss with its reason; nothing is matched whose weights are read by anything else.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, replace

import sympy
import torch
import torch.nn.functional as F
from torch import fx

from sparsify.graph import unforeseen
from sparsify.graph.aliasing import example_tensor, tensor_of
from sparsify.graph.calls import as_node
from sparsify.graph.views import permutation
from sparsify.masks import prove
from sparsify.masks.predicate import MaskPredicate
from sparsify.masks.prove import Extents
from sparsify.masks.reader import Reader
from sparsify.masks.symbolic import Facts, Unreadable, sizes
from sparsify.matching import biases, empty_rows, lookalikes
from sparsify.matching.context import Bias, MaskReading, MatchContext
from sparsify.matching.eager_ops import (
    BADDBMM,
    CAST,
    DROPOUT,
    EINSUM,
    FILLS_FIRST,
    MATMUL,
    SAME,
    VIEW,
    NoMatch,
    baddbmm_arguments,
    bind_or_refuse,
    constant,
    einsum_scores,
    einsum_values,
    leads_to_product,
    multiplies_sequences,
    product_factors,
    products,
    softmax_arguments,
    unread,
    why_not_over_keys,
)
from sparsify.matching.facts import autocast_to, bare_site
from sparsify.matching.grouping import Grouped, ungroup, whole
from sparsify.matching.layouts import STANDARD, Layouts, arranged
from sparsify.matching.scores import AddedTerms, Chain, ScoreWalk, Term, check_cast, heads_of_view, is_flat, merges_heads
from sparsify.matching.sinks import ScalingSink, scaling_sink
from sparsify.matching.sites import AttentionSite, ScoreBias
from sparsify.ops.gradients import TRANSFORMED
from sparsify.ops.operands import plain_tensor


def find_eager(context: MatchContext, softmax: fx.Node) -> AttentionSite | None:
    """The attention around a softmax: a site, a near miss, or None where it is no attention at all."""
    scores = softmax.all_input_nodes[0]
    known = leads_to_product(scores)
    if not known and lookalikes.origin(scores) is None:
        return None
    product, why = next(products(softmax), None), why_not_over_keys(softmax)
    if product is None or why:
        if (found := lookalikes.reached(softmax)) is not None:
            passed = lookalikes.way(softmax, found[1])
            why = why or (f"the weights pass through {passed}" if passed else "the weights go into a product of another form")
        elif not why and known and multiplies_sequences(scores):
            why = "the weights do not reach a product with the values"
        else:
            return None
        return bare_site(softmax, scores, scores, scores, None, why, source="eager")
    value = product_factors(product)[1]
    try:
        return _WrittenOut(context, softmax, product).site()
    except NoMatch as why:
        return bare_site(product, scores, value, value, None, str(why), source="eager", inputs=why.inputs)
    except Exception as error:
        return bare_site(product, scores, value, value, None, unforeseen.reason(error, product.name), source="eager")


@dataclass(frozen=True)
class Operand:
    """A query, key or value: the factor of the product, the node that stands for it, and how that node is laid out."""

    factor: fx.Node
    node: fx.Node
    layout: str


class _WrittenOut:
    def __init__(self, context: MatchContext, softmax: fx.Node, product: fx.Node):
        self.context, self.softmax, self.product = context, softmax, product
        self.chain = Chain()
        self.dropout = 0.0
        self.dropped_column = False
        self.weighted = softmax  # the weights as the product with the values gets them
        self.zeroed: list[MaskReading] = []  # conditions under which weights are set to 0

    def site(self) -> AttentionSite:
        if self.context.modes.transformed([self.softmax, self.product]):
            raise NoMatch(TRANSFORMED)
        self.weights()
        sink = self.scaling_sink()
        scores = ScoreWalk(self.context, self.chain).product(self.softmax)
        if self.dropped_column != (self.chain.sinks is not None and not self.chain.scaled):
            raise NoMatch("a column of the weights is dropped" if self.dropped_column else "a column is added to the scores and kept")
        query, key = self.operands(scores)
        value, output, layout = self.value_and_output()
        return self.describe(query, key, value, output if sink is None else sink.output, layout, scores)

    # -- after the softmax -------------------------------------------------------------------------------------------------------

    def weights(self) -> None:
        here = self.softmax
        while here is not self.product:
            idle = unread(here)
            readers = [user for user in here.users if user not in idle]
            if len(readers) != 1:
                raise NoMatch("the attention weights are used elsewhere too")
            self.chain.nodes += [here, *idle]
            self.weighted, user = here, readers[0]
            if (tensor := tensor_of(user)) is None or not tensor.dtype.is_floating_point:
                raise NoMatch("the weights become integers")
            if user.target in DROPOUT:
                self.drop(user)
            elif user.target in CAST | SAME:
                check_cast(user)
            elif user.target in FILLS_FIRST:
                self.zero(here, user)
            elif user.target is operator.getitem:
                if user.args[1] not in ((Ellipsis, slice(None, -1, None)), (Ellipsis, slice(0, -1, None))):
                    raise NoMatch("a part of the weights is taken")
                self.dropped_column = True
            elif user.target in VIEW and user is not self.product:
                self.chain.note_split(heads_of_view(here, user))
            here = user

    def zero(self, weights: fx.Node, node: fx.Node) -> None:
        """masked_fill(weights, hidden, 0)"""
        call = bind_or_refuse(node, "input: tensor, mask: tensor, value")
        try:
            value = Reader(Facts(self.context.shape_env)).read(call.value)
            number = None if value.shape else value.at()
        except Unreadable:
            number = None
        if call.input is not weights or number != 0:
            raise NoMatch("weights are filled with another number than 0")
        if sizes(example_tensor(node)) != sizes(example_tensor(weights)):
            raise NoMatch("the weights are broadcast")
        self.zeroed.append((call.mask, "hidden", node))

    def scaling_sink(self) -> ScalingSink | None:
        """Notes a sink that scales the product with the values."""
        sink = scaling_sink(softmax_arguments(self.softmax).input, self.product) if self.product.target in MATMUL else None
        if sink is not None:
            self.chain.sinks, self.chain.scaled, self.chain.readers = sink.logits, sink.rank, sink.nodes
            self.chain.nodes += [self.product, *sink.nodes]
        return sink

    def drop(self, node: fx.Node) -> None:
        if node.target is F.dropout:
            call = bind_or_refuse(node, "input, p=0.5, training=True, inplace=False")
        else:
            call = bind_or_refuse(node, "input, p, train")
        probability, training = call.p, call.training if node.target is F.dropout else call.train
        if training is not False and probability != 0:
            if not isinstance(probability, (int, float)):
                raise NoMatch("the dropout probability is decided at run time")
            self.dropout = float(probability)

    # -- operands ----------------------------------------------------------------------------------------------------------------

    def operands(self, product: fx.Node) -> tuple[Operand, Operand]:
        """Query and key."""
        if product.target in EINSUM:
            query, key = einsum_scores(product)
        else:
            if product.target in BADDBMM:
                self.added_product(product)
            left, right = product_factors(product)
            merged = example_tensor(product).dim() == 3
            query, key = (left, "nld" if merged else "bhld"), (right, "ndl" if merged else "bhdl")
        return self.operand(*query), self.operand(*key)

    def added_product(self, product: fx.Node) -> None:
        call = baddbmm_arguments(product)
        if constant(call.beta) != 1.0 or self.chain.softcap:
            raise NoMatch("baddbmm of another form")
        self.chain.terms.append(Term(call.input, product, self.chain.factor, is_flat(call.input, product), self.chain.shift_sensitive))
        self.chain.multiply(constant(call.alpha))

    def operand(self, factor: fx.Node, layout: str) -> Operand:
        """An operand of a product: before views and copies, where it lies in the standard order there or has batch and heads apart."""
        found = [Operand(factor, factor, layout)]
        while found[-1].layout != STANDARD and (before := self.before(found[-1])) is not None:
            found.append(before)
        standard, apart = ([one for one in found if fits(one.layout)] for fits in (STANDARD.__eq__, lambda letters: "n" not in letters))
        best = (standard or apart or found)[0]
        for one in found[: found.index(best)]:
            self.chain.nodes.append(one.node)
            if "n" in one.layout and "n" not in best.layout:
                batch, heads, _, _ = arranged(sizes(example_tensor(best.node)), best.layout)
                self.chain.note_split((batch, heads))
        return replace(best, node=self.uncast(best.node))

    def before(self, operand: Operand) -> Operand | None:
        """The tensor of which an operand is a view, a copy or a conversion to float32, and how it is laid out; None where it is none."""
        node, layout = operand.node, operand.layout
        if (found := permutation(node)) is not None:
            source, order = found
            letters = dict(zip(order, layout, strict=True))
            return replace(operand, node=source, layout="".join(letters[place] for place in range(len(layout))))
        source = node.args[0] if node.args else None
        if not isinstance(source, fx.Node) or tensor_of(source) is None:
            return None
        if node.target in VIEW and layout[0] == "n" and merges_heads(source, node):
            return replace(operand, node=source, layout="bh" + layout[1:])
        if node.target in SAME:
            return replace(operand, node=source)
        return replace(operand, node=self.uncast(node)) if self.uncast(node) is not node else None

    def unwritten(self, operand: Operand, reader: fx.Node, output: fx.Node) -> bool:
        """Whether the operand still holds, where the output is computed, what `reader` got of it: the factor, a copy or a view."""
        memory, storage = self.context.memory, example_tensor(operand.node).untyped_storage()._cdata
        here = operand.factor
        while here is not operand.node:
            if example_tensor(here).untyped_storage()._cdata != storage and memory.written_between(here, None, output):
                return False
            reader, here = here, as_node(here.args[0])
        return not memory.written_between(operand.node, reader, output)

    def uncast(self, node: fx.Node) -> fx.Node:
        """Query and key before a conversion to float32: kernels accumulate in float32 anyway."""
        while node.op == "call_method" and node.target in CAST and example_tensor(node).dtype is torch.float32:
            source = as_node(node.args[0])
            if example_tensor(source).dtype is not self.value_dtype():
                break
            self.chain.nodes.append(node)
            node = source
        return node

    def value_dtype(self) -> torch.dtype:
        return next(example_tensor(factor).dtype for factor in product_factors(self.product) if factor is not self.weighted)

    def value_and_output(self) -> tuple[Operand, fx.Node, str]:
        """Values, the output and its layout."""
        product = self.product
        if product.target in EINSUM:
            value, layout, of_output = einsum_values(product, self.weighted)
            return self.operand(value, layout), product, of_output
        value = product_factors(product)[1]
        if example_tensor(product).dim() == 4:
            return self.operand(value, STANDARD), product, STANDARD
        users = list(product.users)
        if len(users) == 1 and users[0].target in VIEW and example_tensor(users[0]).dim() == 4:
            self.chain.note_split(heads_of_view(users[0], product))
            self.chain.nodes.append(product)
            return self.operand(value, "nld"), users[0], STANDARD
        return self.operand(value, "nld"), product, "nld"

    def batch_and_heads(self, *operands: Operand) -> tuple[sympy.Expr, ...]:
        """(batch, heads) where an operand or a view tells them apart; empty where none does."""
        if self.chain.splits:
            return self.chain.splits[0]
        known = [one for one in operands if "n" not in one.layout]
        return arranged(sizes(example_tensor(known[0].node)), known[0].layout)[:2] if known else ()

    # -- the record --------------------------------------------------------------------------------------------------------------

    def describe(self, query: Operand, key: Operand, value: Operand, output: fx.Node, of_output: str, scores: fx.Node) -> AttentionSite:
        context, chain, operands = self.context, self.chain, (query, key, value)
        layouts = Layouts(query.layout, key.layout, value.layout, of_output)
        key_group, value_group = (self.ungrouped(one, output) for one in (key, value))
        if not context.same(key_group.repeat, value_group.repeat):
            key_group, value_group = whole(key.node), whole(value.node)
        nodes = (query.node, key_group.node, value_group.node)
        if not all(plain_tensor(example_tensor(n)) for n in nodes):
            raise NoMatch("an operand is no plain tensor")
        heads = self.batch_and_heads(*operands)
        if not heads and "n" in "".join((*(one.layout for one in operands), of_output)):
            raise NoMatch("batch and heads are merged")
        if any(example_tensor(one.node).dim() != len(one.layout) for one in operands):
            raise NoMatch("operands do not have 4 dimensions")
        q, k, v = (arranged(sizes(example_tensor(n)), one.layout, heads) for n, one in zip(nodes, operands, strict=True))
        for one in (o for o in operands if "n" in o.layout):
            merged = sizes(example_tensor(one.node))[one.layout.index("n")]
            if not context.same(sympy.expand(heads[0] * heads[1]), merged):
                raise NoMatch("query, key and value differ in batch, heads or length")
        if not (context.same(q[0], k[0]) and context.same(q[0], v[0]) and context.same(k[1], v[1])) or context.differ(k[2], v[2]):
            raise NoMatch("query, key and value differ in batch, heads or length")
        if not context.same(sympy.expand(k[1] * key_group.repeat), q[1]) and k[1] != 1:
            raise NoMatch("the head dimension is broadcast")
        if not all(context.same(q[0], batch) and context.same(q[1], heads) for batch, heads in chain.splits):
            raise NoMatch("batch and heads are merged and taken apart in different ways")
        if autocast_to(output, nodes, scores) is None:
            raise NoMatch("query, key and value differ in dtype")
        if not all(self.unwritten(one, reader, output) for one, reader in zip(operands, (scores, scores, self.product), strict=True)):
            raise NoMatch("query, key or value is written before the output is computed")
        extents = Extents(q[0], q[1], q[2], k[2])
        if not all(self.reads_as_one(*mask, extents) for mask in chain.masks):
            raise NoMatch("a mask differs by merged batch and heads")
        added = self.added(extents, output)
        between = tuple(chain.nodes)
        masks = chain.masks + added.masks
        mask = context.proof(masks, extents) if masks else prove.none()
        self.check_gates(masks, mask, extents)
        empty, added_biases = empty_rows.rows_of_written_out(context, chain, self.softmax, masks, added, mask, extents)
        if self.zeroed:
            empty = self.zeroed_rows(masks, mask, empty, bool(added_biases), extents)
        return context.site(
            output,
            query.node,
            key_group,
            value_group,
            heads,
            layouts=layouts,
            mask_node=masks[0][0] if len(masks) == 1 else None,
            mask=mask,
            scale=chain.scale,
            softcap=chain.softcap,
            dropout=self.dropout,
            source="eager",
            sink_logits=self.sink_logits(extents, output),
            alibi_slopes=added.slopes,
            bias=tuple(replace(one, reader=None) for one in added_biases),  # whatever node a site names is an operand
            **vars(empty),
            between=between,
        )

    def check_gates(self, masks: list[MaskReading], mask: MaskPredicate, extents: Extents) -> None:
        """Refuses scores that are multiplied with anything but 1 where a mask shows them: beside the number that hides, 0 is a score like
        any other."""
        for gate in self.chain.gates:
            alone, both = self.context.proof([gate], extents), self.context.proof([*masks, gate], extents)
            if alone.opaque or not self.reads_as_one(*gate, extents):
                why = alone.reason or "it differs by merged batch and heads"
                raise NoMatch(f"scores are scaled by a tensor: {why}", both.inputs)
            if not mask.opaque and replace(both, condition="") != replace(mask, condition=""):
                raise NoMatch("scores are set to 0 that no mask hides")

    def zeroed_rows(
        self, masks: list[MaskReading], mask: MaskPredicate, empty: empty_rows.EmptyRows, biased: bool, extents: Extents
    ) -> empty_rows.EmptyRows:
        """What rows that see no key hold after weights were set to 0 where keys are hidden: there the weights of other rows are 0 anyway.

        Raises:
            NoMatch: weights of visible keys are set to 0, or not all of hidden ones where a row may have no others.
        """
        if mask.opaque:
            return empty
        if self.chain.sinks is not None or biased:
            raise NoMatch("weights are set to 0 beside a sink or a bias per key")
        if not all(self.reads_as_one(*one, extents) for one in self.zeroed):
            raise NoMatch("weights are set to 0 by a mask that differs by merged batch and heads")
        alone = self.context.proof(self.zeroed, extents)
        if alone.opaque:
            raise NoMatch(f"weights are set to 0: {alone.reason}", alone.inputs)
        if replace(alone, condition="") == replace(mask, condition=""):
            return empty_rows.ZERO if empty.empty_rows != "impossible" else empty
        both = self.context.proof([*masks, *self.zeroed], extents)
        if replace(both, condition="") != replace(mask, condition=""):
            raise NoMatch("weights are set to 0 that no mask hides")
        if empty.empty_rows != "impossible":
            raise NoMatch("rows may see no key, and some of their weights are set to 0")
        return empty

    def ungrouped(self, operand: Operand, output: fx.Node) -> Grouped:
        return ungroup(self.context.memory, operand.node, output) if operand.layout == STANDARD else whole(operand.node)

    def added(self, extents: Extents, output: fx.Node) -> AddedTerms:
        """What each added term is: slopes of a position bias, a bias per key, a mask, or the sum of a bias and a mask."""
        context, found = self.context, AddedTerms()
        for term in self.chain.terms:
            scaled = term.factor != 1.0
            slopes = self.slopes(term, extents, output) if not scaled and found.slopes is None else None
            whole = (term.node, "mask", term.reader)
            if slopes is not None:
                found.slopes = slopes
            elif not scaled and self.reads_as_one(*whole, extents) and not context.proof([whole], extents).opaque:
                found.masks.append(whole)
            elif isinstance(term.factor, float) and self.is_bias(term, extents, output):
                found.biases.append(ScoreBias(term.node, term.factor, term.flat, term.reader))
            elif not term.flat and not scaled and (parts := self.taken_apart(term, extents, output)) is not None:
                if parts.slopes is not None and found.slopes is not None:
                    raise NoMatch("two position biases are added to the scores")
                found.slopes = parts.slopes or found.slopes
                found.biases += [replace(one, reader=term.reader) for one in parts.biases]
                found.masks += parts.masks
            elif scaled:
                raise NoMatch("a mask or bias is added before the scale")
            elif len(self.chain.terms) > 1 or term.flat:
                proof = context.proof([whole], extents)
                unread = f": {proof.reason}" if proof.reason else ""
                proofs = [context.proof([(one.node, "mask", one.reader)], extents) for one in self.chain.terms]
                raise NoMatch(
                    f"the scores carry a bias that is neither slope times key position nor one number per key, nor a mask{unread}",
                    tuple(dict.fromkeys(node for one in proofs for node in one.inputs)),
                )
            else:
                found.masks.append(whole)
        return found

    def taken_apart(self, term: Term, extents: Extents, output: fx.Node) -> Bias | None:
        if self.chain.gates and self.context.proof([(term.node, "mask", term.reader)], extents).adds:
            return None  # beside a factor of ones and zeros it is part of what hides
        return self.context.biased(term.node, term.reader, output, extents, term.shift_sensitive)

    def reads_as_one(self, mask: fx.Node, form: prove.Form, reader: fx.Node, extents: Extents) -> bool:
        """Whether a mask may be read by batch row and head: one over merged batch and heads only where it is the same for all."""
        if not is_flat(mask, reader):
            return True
        merged = Extents(sympy.Integer(1), sympy.expand(extents.batch * extents.heads), extents.query_len, extents.key_len)
        proof = self.context.proof([(mask, form, reader)], merged)
        return not proof.opaque and proof.padding is None and proof.documents is None

    def slopes(self, term: Term, extents: Extents, output: fx.Node) -> fx.Node | None:
        found = biases.alibi_slopes(term.node, output, extents, self.context.memory, self.context.shape_env, term.flat)
        return found.node if found is not None and (found.constant == 0 or not term.shift_sensitive) else None

    def is_bias(self, term: Term, extents: Extents, output: fx.Node) -> bool:
        """One row of a mask that is made in the graph is taken apart instead: it may say which keys come first."""
        one_row = extents.query_len == 1 and term.factor == 1.0 and not term.flat
        # what its own step writes in place is what it adds
        if (one_row and self.taken_apart(term, extents, output)) or self.context.memory.written_between(term.node, term.node, output):
            return False
        if biases.of_scores(term.node, extents, term.flat):
            return True
        whole = biases.per_row(example_tensor(term.node), extents, term.flat) and not self.chain.gates
        return whole and self.context.proof([(term.node, "mask", term.reader)], extents).adds

    def sink_logits(self, extents: Extents, output: fx.Node) -> fx.Node | None:
        if self.chain.sinks is None:
            return None
        if not self.chain.scaled and example_tensor(self.chain.sinks).dim() == 3 and extents.batch != 1:
            raise NoMatch("the extra column is over merged batch and heads")
        sinks, memory = self.chain.sinks, self.context.memory
        node = biases.per_head(sinks, output, extents, memory, self.context.shape_env, self.chain.scaled or 4)
        if node is None and not self.chain.scaled and example_tensor(sinks).dim() == 4 and not memory.written_between(sinks, None, output):
            return sinks  # one for each row
        if node is None:
            raise NoMatch(
                "the sink that scales the output is no number per head" if self.chain.scaled else "the extra column is no number per head"
            )
        return node
