"""The part of written-out attention before the softmax: scale, softcap, masks, bias and sinks, walked back to query times key."""

from __future__ import annotations

import operator
from dataclasses import dataclass, field

import sympy
import torch
from torch import fx

from sparsify import biases, predicates
from sparsify.aliasing import tensor_of, written
from sparsify.eager_ops import ADD, CAST, DIV, MUL, SAME, SHAPE_ONLY, VIEW, NoMatch, constant, is_product, leads_to_product
from sparsify.symbolic import sizes

_FILLS = (torch.where, "where", torch.masked_fill, "masked_fill", "masked_fill_")
_MAXIMA = (torch.max, "max", torch.amax, "amax")


@dataclass(frozen=True)
class Term:
    """A float tensor that is added to the scores: a mask, a position bias or a bias per key. factor: what the sum is multiplied with
    afterwards. flat: batch and heads are merged."""

    node: fx.Node
    reader: fx.Node
    factor: float | fx.Node = 1.0
    flat: bool = False


@dataclass
class Chain:
    """What lies between the product of query and key and the softmax, gathered from the softmax backwards.

    masks: conditions that hide scores, as (condition, form, reader).
    """

    factor: float | fx.Node = 1.0
    softcap: float = 0.0
    masks: list[tuple[fx.Node, predicates.Form, fx.Node]] = field(default_factory=list)
    terms: list[Term] = field(default_factory=list)
    sinks: fx.Node | None = None
    nodes: list[fx.Node] = field(default_factory=list)

    @property
    def bare(self) -> bool:
        """Nothing has happened to the scores yet that comes after a mask."""
        return not self.softcap and self.factor == 1.0

    def multiply(self, by: object) -> None:
        if isinstance(by, fx.Node):
            if self.factor != 1.0 or self.softcap:
                raise NoMatch("the scale is a product of run-time numbers")
            self.factor = by
        elif isinstance(self.factor, fx.Node):
            raise NoMatch("the scale is a product of run-time numbers")
        else:
            self.factor *= by


def is_row_maximum(node: fx.Node) -> bool:
    return node.target in _MAXIMA


def flat_heads(four: fx.Node, three: fx.Node) -> None:
    """Refuses a view that does anything but merge batch and heads."""
    wide, flat = sizes(tensor_of(four)), sizes(tensor_of(three))
    if wide == flat:
        return
    if len(wide) != 4 or len(flat) != 3 or sympy.expand(wide[0] * wide[1] - flat[0]) != 0 or wide[2:] != flat[1:]:
        raise NoMatch("the weights are reshaped")


class ScoreWalk:
    """`chain` after `product()` is what the scores went through. `matcher` is `match.Matcher`."""

    def __init__(self, matcher: object, chain: Chain):
        self.matcher, self.chain = matcher, chain

    def product(self, softmax: fx.Node) -> fx.Node:
        """Walks back from the softmax to the product of query and key."""
        here, reader = softmax.args[0], softmax
        while True:
            edits = self.edits(here, reader)
            if {u for u in here.users if not is_row_maximum(u) and u.target not in SHAPE_ONLY} != {*edits, reader}:
                raise NoMatch("the attention scores are used elsewhere too")
            for edit in reversed(edits):
                self.chain.nodes.append(edit)
                if edit.users or self.step(edit) is not here:
                    raise NoMatch("the attention scores are used elsewhere too")
            self.chain.nodes.append(here)
            if is_product(here):
                return here
            here, reader = self.step(here), here

    def edits(self, node: fx.Node, reader: fx.Node) -> list[fx.Node]:
        """Calls that change a tensor in place before `reader` reads it, in order: statements such as `scores.mul_(scale)`."""
        position = self.matcher.memory.position
        found = [u for u in node.users if u is not reader and written(u) == [node] and position[u] < position[reader]]
        return sorted(found, key=position.__getitem__)

    def step(self, here: fx.Node) -> fx.Node:
        chain, target = self.chain, here.target
        if tensor_of(here) is None or not tensor_of(here).dtype.is_floating_point:
            what = "are integers" if tensor_of(here) is not None else f"pass through {getattr(target, '__name__', target)}"
            raise NoMatch(f"the scores {what}")
        if target in CAST | SAME:
            return here.args[0]
        if target in MUL | DIV:
            return self.scale(here)
        if target in (operator.neg, torch.neg, "neg"):
            chain.multiply(-1.0)
            return here.args[0]
        if target in (torch.tanh, "tanh"):
            if chain.softcap or isinstance(chain.factor, fx.Node) or chain.factor <= 0:
                raise NoMatch("a softcap of another form")
            chain.softcap, chain.factor = chain.factor, 1.0
            return here.args[0]
        if target in ADD:
            return self.add(here)
        if target in _FILLS:
            return self.fill(here)
        if target is operator.sub and self.subtracts_row_maximum(here):
            return here.args[0]
        if target is torch.cat:
            return self.concatenated(here)
        if target in VIEW:
            flat_heads(here, here.args[0])
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
        left, right = node.args[:2]
        if node.kwargs or self.chain.softcap:
            raise NoMatch("a mask or bias is added before the softcap")
        if not leads_to_product(left):
            left, right = right, left
        if tensor_of(right) is None or leads_to_product(right):
            raise NoMatch("scores are a sum of other terms")
        if not tensor_of(right).dtype.is_floating_point:
            raise NoMatch("integers are added to the scores")
        if len(self.chain.terms) == 3:
            raise NoMatch("many terms are added to the scores")
        self.chain.terms.append(Term(right, node, self.chain.factor))
        return left

    def fill(self, node: fx.Node) -> fx.Node:
        """masked_fill(scores, hidden, lowest) and where(visible, scores, lowest)."""
        if not self.chain.bare:
            raise NoMatch("a mask is applied before the scale")
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
        self.chain.masks.append((given["condition"], form, node))
        return scores

    def subtracts_row_maximum(self, node: fx.Node) -> bool:
        left, right = node.args[:2]
        found = right.args[0] if isinstance(right, fx.Node) and right.target is operator.getitem and right.args[1] == 0 else right
        if not isinstance(found, fx.Node) or not is_row_maximum(found) or found.args[0] is not left:
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
        if self.chain.masks or self.chain.terms or not self.chain.bare or self.chain.sinks is not None:
            raise NoMatch("sinks are changed before the softmax")
        self.chain.sinks = parts[1]
        return parts[0]
