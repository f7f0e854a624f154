"""The part of written-out attention before the softmax: scale, softcap, masks, bias and sinks, walked back to query times key."""

from __future__ import annotations

import operator
from dataclasses import dataclass, field

import sympy
import torch
from torch import fx

from sparsify.graph.aliasing import example_tensor, tensor_of, written
from sparsify.graph.calls import as_node
from sparsify.masks.symbolic import sizes
from sparsify.matching import biases
from sparsify.matching.context import MaskReading, MatchContext
from sparsify.matching.eager_ops import (
    ADD,
    CAST,
    DIV,
    FILLS,
    FLOATS,
    MUL,
    SAME,
    SUB,
    VIEW,
    NoMatch,
    bind_or_refuse,
    constant,
    is_product,
    leads_to_product,
    lower_bound,
    reads_values,
    softmax_arguments,
    unread,
)
from sparsify.matching.sites import ScoreBias

_MAXIMA = (torch.max, "max", torch.amax, "amax")
_NAMES = {torch.where: "condition, input, other", "where": "input, condition, other"}


@dataclass(frozen=True)
class Term:
    """A float tensor that is added to the scores: a mask, a position bias or a bias per key. factor: what the sum is multiplied with
    afterwards. flat: batch and heads are merged, in the term too. shift_sensitive: as `Chain.shift_sensitive`, at the sum."""

    node: fx.Node
    reader: fx.Node
    factor: float | fx.Node = 1.0
    flat: bool = False
    shift_sensitive: str = ""


@dataclass
class AddedTerms:
    """The terms that are added to the scores, told apart.

    slopes: of a position bias.
    biases: of one number per key, or per row and key.
    masks: (condition, form, reader) each.
    """

    slopes: fx.Node | None = None
    biases: list[ScoreBias] = field(default_factory=list)
    masks: list[MaskReading] = field(default_factory=list)


@dataclass
class Chain:
    """What lies between the product of query and key and the softmax, gathered from the softmax backwards.

    masks: conditions that hide scores, as (condition, form, reader).
    gates: tensors of ones and zeros that scores are multiplied with, likewise.
    sinks: sink logits, broadcastable to a column of the scores. scaled: dimensions of the rows' log-sums
        from which they are subtracted to scale the output, 0 where they are a column; `readers` read the scores for it.
    bounds: nodes that raise scores to the lowest number of their dtype.
    splits: (batch, heads) of every view that merges the two or takes them apart.
    """

    factor: float | fx.Node = 1.0
    softcap: float = 0.0
    masks: list[MaskReading] = field(default_factory=list)
    gates: list[MaskReading] = field(default_factory=list)
    terms: list[Term] = field(default_factory=list)
    sinks: fx.Node | None = None
    scaled: int = 0
    readers: tuple[fx.Node, ...] = ()
    bounds: list[fx.Node] = field(default_factory=list)
    splits: list[tuple[sympy.Expr, sympy.Expr]] = field(default_factory=list)
    nodes: list[fx.Node] = field(default_factory=list)

    @property
    def scale(self) -> float | fx.Node:
        """What the product is multiplied with before everything else, a softcap's division undone."""
        if isinstance(self.factor, fx.Node):  # then there is no softcap
            return self.factor
        return self.factor * self.softcap if self.softcap else self.factor

    @property
    def bare(self) -> bool:
        """Nothing has happened to the scores yet that comes after a mask."""
        return not self.softcap and self.factor == 1.0

    @property
    def shift_sensitive(self) -> str:
        """What feels a number that is added to a whole row of scores here, empty where softmax alone follows, which does not.

        Whoever drops such a number asks. Scales, casts and sums carry it along and masks that hide are above it; whatever else a step
        may be must be named here.
        """
        return "a softcap" if self.softcap else "a sink logit" if self.sinks is not None else ""

    def note_split(self, heads: tuple[sympy.Expr, sympy.Expr] | None) -> None:
        if heads is not None:
            self.splits.append(heads)

    def multiply(self, by: float | fx.Node) -> None:
        if isinstance(by, fx.Node):
            if self.factor != 1.0 or self.softcap:
                raise NoMatch("the scale is a product of run-time numbers")
            self.factor = by
        elif isinstance(self.factor, fx.Node):
            raise NoMatch("the scale is a product of run-time numbers")
        else:
            self.factor *= by


def is_row_maximum(node: fx.Node) -> bool:
    return node.target in _MAXIMA and not any(isinstance(tensor_of(a), torch.Tensor) for a in (*node.args[1:], *node.kwargs.values()))


def heads_of_view(one: fx.Node, other: fx.Node) -> tuple[sympy.Expr, sympy.Expr] | None:
    """(batch, heads) of a view between four dimensions and three, in whichever direction; None where the shape stays.

    Raises:
        NoMatch: it does anything but merge batch and heads or take them apart.
    """
    if example_tensor(one).dtype is not example_tensor(other).dtype:
        raise NoMatch("a view reads numbers of another dtype")
    flat, wide = sorted((sizes(example_tensor(one)), sizes(example_tensor(other))), key=len)
    if wide == flat:
        return None
    if len(wide) != 4 or len(flat) != 3 or sympy.expand(wide[0] * wide[1] - flat[0]) != 0 or wide[2:] != flat[1:]:
        raise NoMatch("the scores or weights are reshaped")
    return wide[0], wide[1]


def merges_heads(source: fx.Node, view: fx.Node) -> bool:
    """Whether a view of four dimensions merges the first two."""
    try:
        return example_tensor(source).dim() == 4 and heads_of_view(source, view) is not None
    except NoMatch:
        return False


def is_flat(tensor: fx.Node, scores: fx.Node) -> bool:
    """Whether batch and heads are merged, in scores and in a tensor that is broadcast to them."""
    return example_tensor(scores).dim() == 3 and example_tensor(tensor).dim() == 3 and sizes(example_tensor(tensor))[0] != 1


def check_cast(node: fx.Node) -> None:
    """Refuses conversions that do more than round."""
    tensor, source = example_tensor(node), example_tensor(node.args[0])
    if tensor.dtype not in FLOATS or tensor.device != source.device:
        raise NoMatch(f"a conversion to {tensor.dtype} on {tensor.device}")


class ScoreWalk:
    """`chain` after `product()` is what the scores went through."""

    def __init__(self, context: MatchContext, chain: Chain):
        self.context, self.chain = context, chain

    def product(self, softmax: fx.Node) -> fx.Node:
        """Walks back from the softmax to the product of query and key."""
        here, reader = softmax_arguments(softmax).input, softmax
        while True:
            edits = self.edits(here, reader)
            idle = unread(here)
            read = {u for u in here.users if not is_row_maximum(u) and reads_values(u, here) and u not in idle}
            if read - {*self.chain.readers} != {*edits, reader}:
                raise NoMatch("the attention scores are used elsewhere too")
            self.chain.nodes += idle
            for edit in reversed(edits):
                self.chain.nodes.append(edit)
                if edit.users or self.before(edit) is not here:
                    raise NoMatch("the attention scores are used elsewhere too")
            self.chain.nodes.append(here)
            if is_product(here):
                return here
            here, reader = self.before(here), here

    def edits(self, node: fx.Node, reader: fx.Node) -> list[fx.Node]:
        """Calls that change a tensor in place before `reader` reads it, in order: statements such as `scores.mul_(scale)`."""
        position = self.context.memory.position
        found = [u for u in node.users if u is not reader and written(u) == [node] and position[u] < position[reader]]
        return sorted(found, key=position.__getitem__)

    def before(self, here: fx.Node) -> fx.Node:
        """The scores that a step got; the step is noted in the chain."""
        scores = self.step(here)
        before, after = sizes(example_tensor(scores)), sizes(example_tensor(here))
        if here.target not in VIEW and (len(before) != len(after) or any(b == 1 != a for b, a in zip(before, after))):
            raise NoMatch("the scores are broadcast")
        return scores

    def step(self, here: fx.Node) -> fx.Node:
        chain, target = self.chain, here.target
        tensor = tensor_of(here)
        if tensor is None or not tensor.dtype.is_floating_point:
            what = "are integers" if tensor is not None else f"pass through {getattr(target, '__name__', target)}"
            raise NoMatch(f"the scores {what}")
        if target in CAST | SAME:
            check_cast(here)
            return as_node(here.args[0])
        if target in MUL | DIV:
            return self.scale(here)
        if target in (operator.neg, torch.neg, "neg"):
            chain.multiply(-1.0)
            return bind_or_refuse(here, "input").input
        if target in (torch.tanh, "tanh"):
            if chain.softcap or isinstance(chain.factor, fx.Node) or chain.factor <= 0:
                raise NoMatch("a softcap of another form")
            chain.softcap, chain.factor = chain.factor, 1.0
            return bind_or_refuse(here, "input").input
        if target in ADD:
            return self.add(here)
        if target in FILLS:
            return self.fill(here)
        if target in SUB:
            return self.subtract(here)
        if target in (torch.cat, "cat"):
            return self.concatenated(here)
        if target in VIEW:
            scores = here.all_input_nodes[0]
            chain.note_split(heads_of_view(here, scores))
            return scores
        if (bounded := lower_bound(here)) is not None:
            return self.bound(here, *bounded)
        raise NoMatch(f"the scores pass through {getattr(target, '__name__', target)}")

    def scale(self, node: fx.Node) -> fx.Node:
        call = bind_or_refuse(node, "input, other" if node.target in MUL else "input, other, *, rounding_mode=None")
        left, right = call.input, call.other
        if getattr(call, "rounding_mode", None) is not None:
            raise NoMatch("the scores are rounded")
        if node.target in MUL and not leads_to_product(left):
            left, right = right, left
        if node.target in MUL and (factor := tensor_of(right)) is not None and 2 <= factor.dim() <= 4 and not leads_to_product(right):
            self.chain.gates.append((right, "ones", node))
            return left
        number = constant(right)
        if node.target in DIV:
            if isinstance(number, fx.Node) or number == 0:
                raise NoMatch("scores are divided by a run-time number")
            number = 1.0 / number
        self.chain.multiply(number)
        return left

    def add(self, node: fx.Node) -> fx.Node:
        call = bind_or_refuse(node, "input, other, *, alpha=1")
        left, right = call.input, call.other
        if self.chain.softcap:
            raise NoMatch("a mask or bias is added before the softcap")
        if call.alpha != 1:
            raise NoMatch("what is added to the scores is scaled by alpha")
        if not leads_to_product(left):
            left, right = right, left
        if right == 0:
            return left
        if leads_to_product(right) and not self.is_bias(right) and self.is_bias(left):
            left, right = right, left
        self.add_term(node, right, self.chain.factor)
        return left

    def add_term(self, node: fx.Node, term: object, factor: float | fx.Node) -> None:
        if tensor_of(term) is None or (leads_to_product(term) and not self.is_bias(as_node(term))):
            raise NoMatch("scores are a sum of other terms")
        if not example_tensor(term).dtype.is_floating_point:
            raise NoMatch("integers are added to the scores")
        if len(self.chain.terms) == 3:
            raise NoMatch("many terms are added to the scores")
        self.chain.terms.append(Term(as_node(term), node, factor, is_flat(as_node(term), node), self.chain.shift_sensitive))

    def is_bias(self, term: fx.Node) -> bool:
        """Whether a term is a bias that is computed, or the sum of one and of what hides."""
        return any(biases.computed(part) for part, _ in biases.parts(term, self.context.shape_env))

    def fill(self, node: fx.Node) -> fx.Node:
        """masked_fill(scores, hidden, lowest) and where(visible, scores, lowest)."""
        if not self.chain.bare:
            raise NoMatch("a mask is applied before the scale")
        if node.target in _NAMES:
            call = bind_or_refuse(node, _NAMES[node.target])
            condition, scores, low = call.condition, call.input, call.other
        else:
            call = bind_or_refuse(node, "input: tensor, mask: tensor, value")
            condition, scores, low = call.mask, call.input, call.value
        form = "mask" if node.target in _NAMES else "hidden"
        if form == "mask" and not leads_to_product(scores):
            scores, low, form = low, scores, "hidden"
        if tensor_of(scores) is None or tensor_of(condition) is None:
            raise NoMatch("a mask of another form")
        if not biases.hides(low, example_tensor(node).dtype, self.context.shape_env):
            raise NoMatch("hidden scores are filled with a number that is not the lowest")
        self.chain.masks.append((condition, form, node))
        return scores

    def bound(self, node: fx.Node, scores: fx.Node, low: object) -> fx.Node:
        """max(scores, lowest): no score is below it, and one that is hidden by -inf is hidden still."""
        if not self.chain.bare:
            raise NoMatch("scores are bounded from below before the scale")
        if tensor_of(scores) is None or not biases.hides(low, example_tensor(node).dtype, self.context.shape_env):
            raise NoMatch("scores are bounded from below by a number that is not the lowest")
        self.chain.bounds.append(node)
        return scores

    def subtract(self, node: fx.Node) -> fx.Node:
        """The row's maximum, which softmax does not see, or a term."""
        call = bind_or_refuse(node, "input, other, *, alpha=1")
        right = call.other
        found = right.args[0] if isinstance(right, fx.Node) and right.target is operator.getitem and right.args[1] == 0 else right
        if call.alpha != 1 or not leads_to_product(call.input):
            raise NoMatch("something is subtracted from the scores")
        if not isinstance(found, fx.Node) or not is_row_maximum(found):
            if self.chain.softcap or isinstance(self.chain.factor, fx.Node) or (leads_to_product(right) and not self.is_bias(right)):
                raise NoMatch("something is subtracted from the scores")
            self.add_term(node, right, -self.chain.factor)
            return call.input
        maximum = bind_or_refuse(found, "input, dim, keepdim: bool = False")
        last = (-1, example_tensor(call.input).dim() - 1)
        if (
            maximum.input is not call.input
            or not maximum.keepdim
            or maximum.dim not in (*last, *((d,) for d in last), *([d] for d in last))
        ):
            raise NoMatch("something is subtracted from the scores")
        if self.chain.shift_sensitive:
            raise NoMatch(f"the row's maximum is subtracted before {self.chain.shift_sensitive}")
        self.chain.nodes += [found, *([right] if right is not found else [])]
        return call.input

    def concatenated(self, node: fx.Node) -> fx.Node:
        """cat([scores, one more column], -1)."""
        call = bind_or_refuse(node, "tensors, dim: int = 0")
        parts, dim = call.tensors, call.dim
        if (
            len(parts) != 2
            or any(tensor_of(p) is None for p in parts)
            or dim not in (-1, example_tensor(node).dim() - 1)
            or example_tensor(parts[1]).shape[-1] != 1
        ):
            raise NoMatch("scores are concatenated with something")
        if self.chain.masks or self.chain.terms or not self.chain.bare or self.chain.sinks is not None:
            raise NoMatch("sinks are changed before the softmax")
        self.chain.sinks = parts[1]
        return parts[0]
