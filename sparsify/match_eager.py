"""Finds attention that is written out: matmul, scale, [tanh softcap], mask, softmax, matmul. Every such chain either becomes a site or
a near miss with its reason; nothing is matched whose weights are read by anything else.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, field

import sympy
import torch
import torch.nn.functional as F
from torch import fx

from sparsify import biases, predicates
from sparsify.aliasing import tensor_of
from sparsify.describe import autocast_to, bare_site, whole
from sparsify.eager_ops import (
    ADD,
    BADDBMM,
    CAST,
    DIV,
    MATMUL,
    MUL,
    SAME,
    TRANSPOSE,
    VIEW,
    NoMatch,
    constant,
    leads_to_product,
    products,
    swaps_last_two,
)
from sparsify.masks import MaskPredicate
from sparsify.predicates import Extents
from sparsify.sites import AttentionSite
from sparsify.symbolic import sizes


@dataclass
class Chain:
    """What lies between the product of query and key and the softmax, gathered from the softmax backwards."""

    factor: float | fx.Node = 1.0
    softcap: float = 0.0
    mask: fx.Node | None = None
    mask_form: predicates.Form = "mask"
    mask_reader: fx.Node | None = None
    bias: fx.Node | None = None
    bias_form: str = "heads"
    sinks: fx.Node | None = None
    nodes: list[fx.Node] = field(default_factory=list)

    def multiply(self, by: object) -> None:
        if isinstance(by, fx.Node):
            if self.factor != 1.0 or self.softcap:
                raise NoMatch("the scale is a product of run-time numbers")
            self.factor = by
        elif isinstance(self.factor, fx.Node):
            raise NoMatch("the scale is a product of run-time numbers")
        else:
            self.factor *= by


def find_eager(matcher: object, softmax: fx.Node) -> AttentionSite | None:
    """The attention around a softmax: a site, a near miss, or None where it is no attention at all. `matcher` is `match.Matcher`."""
    product = next(products(softmax), None)
    if product is None or not leads_to_product(softmax.args[0]):
        return None
    try:
        return _Match(matcher, softmax, product).site()
    except NoMatch as why:
        value = product.args[1]
        return bare_site(product, softmax.args[0], value, value, None, str(why), source="eager")


class _Match:
    def __init__(self, matcher: object, softmax: fx.Node, product: fx.Node):
        self.matcher, self.softmax, self.product = matcher, softmax, product
        self.chain = Chain()
        self.dropout = 0.0
        self.dropped_column = False

    def site(self) -> AttentionSite:
        self.weights()
        scores = self.scores(self.softmax.args[0])
        if self.dropped_column != (self.chain.sinks is not None):
            raise NoMatch("a column of the weights is dropped" if self.dropped_column else "a column is added to the scores and kept")
        query, key = self.operands(scores)
        value, output = self.value_and_output()
        return self.describe(query, key, value, output, scores)

    # -- after the softmax -------------------------------------------------------------------------------------------------------

    def weights(self) -> None:
        here = self.softmax
        while here is not self.product:
            if len(here.users) != 1:
                raise NoMatch("the attention weights are used elsewhere too")
            self.chain.nodes.append(here)
            user = next(iter(here.users))
            if tensor_of(user) is None or not tensor_of(user).dtype.is_floating_point:
                raise NoMatch("the weights become integers")
            if user.target in (F.dropout, torch.dropout):
                self.drop(user)
            elif user.target is operator.getitem:
                if user.args[1] not in ((Ellipsis, slice(None, -1, None)), (Ellipsis, slice(0, -1, None))):
                    raise NoMatch("a part of the weights is taken")
                self.dropped_column = True
            elif user.target in VIEW and user is not self.product:
                self.flat_heads(here, user)
            here = user

    def drop(self, node: fx.Node) -> None:
        names = dict(zip(("input", "p", "training", "inplace"), node.args, strict=False)) | node.kwargs
        probability, training = names.get("p", 0.5), names.get("training", names.get("train", True))
        if training is not False and probability != 0:
            if not isinstance(probability, (int, float)):
                raise NoMatch("the dropout probability is decided at run time")
            self.dropout = float(probability)

    def flat_heads(self, four: fx.Node, three: fx.Node) -> None:
        """A view that merges batch and heads."""
        wide, flat = sizes(tensor_of(four)), sizes(tensor_of(three))
        if len(wide) != 4 or len(flat) != 3 or sympy.expand(wide[0] * wide[1] - flat[0]) != 0 or wide[2:] != flat[1:]:
            raise NoMatch("the weights are reshaped")

    # -- before the softmax ------------------------------------------------------------------------------------------------------

    def scores(self, node: fx.Node) -> fx.Node:
        """Walks back from the softmax to the product of query and key."""
        here = node
        while True:
            readers = {u for u in here.users if not self.is_row_maximum(u)}
            if len(readers) != 1:
                raise NoMatch("the attention scores are used elsewhere too")
            self.chain.nodes.append(here)
            if here.target in MATMUL | BADDBMM:
                return here
            here = self.step(here)

    def is_row_maximum(self, node: fx.Node) -> bool:
        return node.target in (torch.max, "max", torch.amax, "amax")

    def step(self, here: fx.Node) -> fx.Node:
        chain, target = self.chain, here.target
        if not tensor_of(here).dtype.is_floating_point:
            raise NoMatch("the scores are integers")
        if target in CAST | SAME:
            return here.args[0]
        if target in MUL | DIV:
            return self.scale(here)
        if target in (torch.tanh, "tanh"):
            if chain.softcap or isinstance(chain.factor, fx.Node) or chain.factor <= 0:
                raise NoMatch("a softcap of another form")
            chain.softcap, chain.factor = chain.factor, 1.0
            return here.args[0]
        if target in ADD:
            return self.add(here)
        if target in (torch.where, "where", torch.masked_fill, "masked_fill", "masked_fill_"):
            return self.fill(here)
        if target is operator.sub and self.subtracts_row_maximum(here):
            return here.args[0]
        if target is torch.cat:
            return self.concatenated(here)
        if target in VIEW:
            self.flat_heads(here, here.args[0])
            return here.args[0]
        raise NoMatch(f"the scores pass through {getattr(target, '__name__', target)}")

    def scale(self, node: fx.Node) -> fx.Node:
        left, right = node.args[:2]
        if set(node.kwargs):
            raise NoMatch("the scale has options")
        if node.target in MUL and not leads_to_product(left):
            left, right = right, left
        number = constant(right)
        if node.target in DIV:
            if isinstance(number, fx.Node) or number == 0:
                raise NoMatch("scores are divided by a run-time number")
            number = 1.0 / number
        self.chain.multiply(number)
        return left

    def add(self, node: fx.Node) -> fx.Node:
        if node.kwargs or self.chain.softcap or self.chain.factor != 1.0:
            raise NoMatch("a mask or bias is added before the scale")
        left, right = node.args[:2]
        if not leads_to_product(left):
            left, right = right, left
        if tensor_of(right) is None or leads_to_product(right):
            raise NoMatch("scores are a sum of other terms")
        if not tensor_of(right).dtype.is_floating_point:
            raise NoMatch("integers are added to the scores")
        if self.chain.mask is None and self.chain.bias is None:
            self.chain.mask, self.chain.mask_reader = right, node
        elif self.chain.bias is None:
            self.chain.bias = right
        else:
            raise NoMatch("three terms are added to the scores")
        return left

    def fill(self, node: fx.Node) -> fx.Node:
        """masked_fill(scores, hidden, lowest) and where(visible, scores, lowest)."""
        if self.chain.mask is not None or self.chain.softcap or self.chain.factor != 1.0:
            raise NoMatch("two masks")
        names = ("condition", "input", "other") if node.target is torch.where else ("input", "condition", "other")
        given = dict(zip(names, node.args, strict=False)) | {
            ("condition" if k == "mask" else "other" if k == "value" else k): v for k, v in node.kwargs.items()
        }
        where = node.target in (torch.where, "where")
        if not where or leads_to_product(given["input"]):
            scores, low = given["input"], given["other"]
        else:
            scores, low = given["other"], given["input"]
        form = "mask" if where and scores is given["input"] else "hidden"
        if not biases.hides(low, tensor_of(node).dtype, self.matcher.shape_env):
            raise NoMatch("hidden scores are filled with a number that is not the lowest")
        self.chain.mask, self.chain.mask_form, self.chain.mask_reader = given["condition"], form, node
        return scores

    def subtracts_row_maximum(self, node: fx.Node) -> bool:
        left, right = node.args[:2]
        found = right.args[0] if isinstance(right, fx.Node) and right.target is operator.getitem and right.args[1] == 0 else right
        if not isinstance(found, fx.Node) or not self.is_row_maximum(found) or found.args[0] is not left:
            raise NoMatch("something is subtracted from the scores")
        names = dict(zip(("input", "dim", "keepdim"), found.args, strict=False)) | found.kwargs
        if names.get("dim") not in (-1, tensor_of(left).dim() - 1) or not names.get("keepdim", False):
            raise NoMatch("something is subtracted from the scores")
        self.chain.nodes += [found, *([right] if right is not found else [])]
        return True

    def concatenated(self, node: fx.Node) -> fx.Node:
        """cat([scores, one more column], -1)."""
        parts = node.args[0]
        dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
        if len(parts) != 2 or dim not in (-1, tensor_of(node).dim() - 1) or tensor_of(parts[1]).shape[-1] != 1:
            raise NoMatch("scores are concatenated with something")
        if self.chain.mask is not None or self.chain.softcap or self.chain.factor != 1.0:
            raise NoMatch("sinks are changed before the softmax")
        self.chain.sinks = parts[1]
        return parts[0]

    # -- operands ----------------------------------------------------------------------------------------------------------------

    def operands(self, product: fx.Node) -> tuple[fx.Node, fx.Node]:
        if product.target in BADDBMM:
            names = dict(zip(("input", "batch1", "batch2"), product.args, strict=False)) | product.kwargs
            if constant(names.get("beta", 1)) != 1.0 or self.chain.bias is not None or self.chain.factor != 1.0 or self.chain.softcap:
                raise NoMatch("baddbmm of another form")
            self.chain.bias, self.chain.bias_form = names["input"], "flat"
            self.chain.multiply(constant(names.get("alpha", 1)))
        query, key, _ = self.factors(product)
        if key.target not in TRANSPOSE | {"permute"} or not swaps_last_two(key):
            raise NoMatch("keys are not transposed")
        self.chain.nodes.append(key)
        query, key = self.four(query), self.four(key.args[0])
        return self.uncast(query), self.uncast(key)

    def factors(self, scores: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node]:
        """What the two products multiply: query, transposed key, value."""
        named = dict(zip(("input", "batch1", "batch2"), scores.args, strict=False)) | scores.kwargs
        query, key = (named["batch1"], named["batch2"]) if scores.target in BADDBMM else scores.args[:2]
        return query, key, self.product.args[1]

    def unwritten(self, factor: fx.Node, operand: fx.Node, reader: fx.Node, output: fx.Node) -> bool:
        """Whether the operand still holds, where the output is computed, what `reader` got of it: the factor, a copy or a view."""
        memory, storage = self.matcher.memory, tensor_of(operand).untyped_storage()._cdata
        here = factor
        while here is not operand:
            if tensor_of(here).untyped_storage()._cdata != storage and memory.written_between(here, None, output):
                return False
            reader, here = here, here.args[0]
        return not memory.written_between(operand, reader, output)

    def four(self, node: fx.Node) -> fx.Node:
        """[batch, heads, length, dim], before batch and heads are merged."""
        if tensor_of(node).dim() == 4:
            return node
        if node.target not in VIEW or tensor_of(node.args[0]) is None or tensor_of(node.args[0]).dim() != 4:
            raise NoMatch("batch and heads are merged")
        self.flat_heads(node.args[0], node)
        self.chain.nodes.append(node)
        return node.args[0]

    def uncast(self, node: fx.Node) -> fx.Node:
        """Query and key before a conversion to float32: kernels accumulate in float32 anyway."""
        value = tensor_of(self.product.args[1])
        while node.op == "call_method" and node.target in CAST and tensor_of(node).dtype is torch.float32:
            source = tensor_of(node.args[0])
            if source.dtype is not value.dtype:
                break
            self.chain.nodes.append(node)
            node = node.args[0]
        return node

    def value_and_output(self) -> tuple[fx.Node, fx.Node]:
        value, output = self.product.args[1], self.product
        if tensor_of(output).dim() == 4:
            return value, output
        users = list(output.users)
        if len(users) != 1 or users[0].target not in VIEW or tensor_of(users[0]).dim() != 4:
            raise NoMatch("batch and heads are merged")
        self.flat_heads(users[0], output)
        self.chain.nodes.append(output)
        return self.four(value), users[0]

    # -- the record --------------------------------------------------------------------------------------------------------------

    def describe(self, query: fx.Node, key: fx.Node, value: fx.Node, output: fx.Node, scores: fx.Node) -> AttentionSite:
        matcher, chain = self.matcher, self.chain
        key_group, value_group = matcher.ungroup(key, output), matcher.ungroup(value, output)
        if not matcher.same(key_group.repeat, value_group.repeat):
            key_group, value_group = whole(key), whole(value)
        q, k, v = (sizes(tensor_of(n)) for n in (query, key_group.node, value_group.node))
        if any(len(s) != 4 for s in (q, k, v)):
            raise NoMatch("operands do not have 4 dimensions")
        if not (matcher.same(q[0], k[0]) and matcher.same(q[0], v[0]) and matcher.same(k[1], v[1])) or matcher.differ(k[2], v[2]):
            raise NoMatch("query, key and value differ in batch, heads or length")
        if not matcher.same(sympy.expand(k[1] * key_group.repeat), q[1]) and k[1] != 1:
            raise NoMatch("the head dimension is broadcast")
        if autocast_to(output, (query, key_group.node, value_group.node), scores) is None:
            raise NoMatch("query, key and value differ in dtype")
        readings = zip(self.factors(scores), (query, key, value), (scores, scores, self.product), strict=True)
        if not all(self.unwritten(*reading, output) for reading in readings):
            raise NoMatch("query, key or value is written before the output is computed")
        extents = Extents(q[0], q[1], q[2], k[2])
        slopes, proof = self.masks(extents, output)
        softcap = float(chain.softcap)
        factor = chain.factor * softcap if softcap else chain.factor
        between = tuple(chain.nodes)
        return matcher.site(
            output,
            query,
            key_group,
            value_group,
            mask_node=chain.mask,
            mask=proof,
            scale=factor,
            softcap=softcap,
            dropout=self.dropout,
            source="eager",
            sink_logits=self.sink_logits(extents, output),
            alibi_slopes=slopes,
            between=between,
        )

    def masks(self, extents: Extents, output: fx.Node) -> tuple[fx.Node | None, MaskPredicate]:
        """The slopes of an added position bias, and the mask. Of two added terms either may be the bias."""
        chain = self.chain
        if chain.bias is None and chain.mask is not None and tensor_of(chain.mask).dtype.is_floating_point:
            slopes = self.slopes(chain.mask, extents, output)
            if slopes is not None:
                return slopes, predicates.none()
        slopes = None
        if chain.bias is not None:
            slopes = self.slopes(chain.bias, extents, output)
            if slopes is None and chain.mask is not None and chain.bias_form == "heads":
                slopes = self.slopes(chain.mask, extents, output)
                if slopes is not None:
                    chain.mask, chain.bias = chain.bias, chain.mask
            if slopes is None:
                raise NoMatch("the scores carry a bias that is not slope times key position")
        if chain.mask is None:
            return slopes, predicates.none()
        return slopes, self.matcher.prove(chain.mask, chain.mask_reader, extents, chain.mask_form)

    def slopes(self, bias: fx.Node, extents: Extents, output: fx.Node) -> fx.Node | None:
        if self.chain.bias_form == "flat":
            return biases.alibi_slopes_flat(bias, output, extents, self.matcher.memory, self.matcher.shape_env)
        return biases.alibi_slopes(bias, output, extents, self.matcher.memory, self.matcher.shape_env)

    def sink_logits(self, extents: Extents, output: fx.Node) -> fx.Node | None:
        if self.chain.sinks is None:
            return None
        node = biases.per_head(self.chain.sinks, output, extents, self.matcher.memory, self.matcher.shape_env)
        if node is None:
            raise NoMatch("the extra column is no number per head")
        if self.chain.bias is not None:
            raise NoMatch("sinks beside a position bias")
        return node
