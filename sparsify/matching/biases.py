"""What else may be added to attention scores: a slope per head times the key position (ALiBi), or one extra logit per head (a sink)."""

from __future__ import annotations

import contextlib
import operator
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import fx

from sparsify.graph.aliasing import Memory, example_tensor, tensor_of
from sparsify.graph.calls import Unbound, as_node, bind
from sparsify.graph.compat import operator_word
from sparsify.masks.prove import SOURCES, Extents, Form
from sparsify.masks.reader import Reader
from sparsify.masks.symbolic import BATCH, CONDITION, HEAD, KEY, QUERY, Cases, Facts, Unreadable, loads, scalar, sizes

NUMBERS = "sparsify_numbers"  # in the meta of a float input that holds more numbers than masks do
_SUMS = (operator.add, torch.add, "add")
# by the words of their operators: steps that keep the numbers of a tensor or change each, those that give several, products, sums, which
# keep the numbers of all terms, and choices
_SAME = {
    *("to", "type", "float", "half", "bfloat16", "double", "type_as", "contiguous", "clone", "getitem", "select", "narrow", "squeeze"),
    *("pad", "view", "reshape", "flatten", "unflatten", "permute", "transpose", "swapaxes", "expand", "expand_as", "repeat"),
    *("unsqueeze", "neg"),
}
_SPLITS = {"split", "chunk", "unbind", "tensor_split"}
_FACTORS = {"mul", "imul", "truediv", "itruediv", "div"}
_POINTWISE = {"exp", "softplus", "sigmoid", "tanh", "relu", "silu", "gelu", "log", "log1p", "sqrt", "square", "sin", "cos"}
_TERMS = {"add", "iadd", "sub", "isub"}
_FILLS = {"masked_fill", "where"}


class _Reading:
    """Reads float tensors at (b, h, q, k) of a site."""

    def __init__(self, site: fx.Node, extents: Extents, memory: Memory, shape_env: object):
        self.site, self.memory = site, memory
        bounds = (extents.batch, extents.heads, extents.query_len, extents.key_len)
        self.facts = Facts(shape_env, dict(zip((BATCH, HEAD, QUERY, KEY), bounds, strict=True)))
        self.reader = Reader(self.facts)

    def index(self, symbol: sympy.Symbol) -> sympy.Expr:
        return sympy.Integer(0) if self.facts.extents[symbol] == 1 else symbol

    def at(self, node: fx.Node, *indices: sympy.Expr) -> sympy.Expr | None:
        """The element, where it is one number over memory that nothing writes before the site has run."""
        try:
            element = self.reader.read(node).broadcast(len(indices))(*indices)
        except Unreadable:
            return None
        if isinstance(element, (Cases, *CONDITION)) or any(self.memory.written_between(n, None, self.site) for n in self.reader.nodes):
            return None
        return sympy.expand(typing.cast(sympy.Expr, element))

    def of_head(self, element: sympy.Expr) -> fx.Node | None:
        """The float tensor [heads] or [batch, heads] that holds this element of the site's (batch and) head."""
        batch, heads = self.facts.extents[BATCH], self.facts.extents[HEAD]
        for node in reversed(self.reader.nodes):
            tensor = example_tensor(node)
            if not tensor.dtype.is_floating_point or sizes(tensor) not in ((heads,), (batch, heads)):
                continue
            place = (self.index(BATCH), self.index(HEAD))[-tensor.dim() :]
            if self.at(node, *place) == element:
                return node
        return None


@dataclass(frozen=True)
class Slopes:
    """A bias of slope · (k + constant). node: the slopes, [query_heads] or [batch, query_heads]. constant: the same for all keys of a row,
    so that softmax alone does not see it; who drops it looks at what else is there."""

    node: fx.Node
    constant: sympy.Expr


def alibi_slopes(bias: fx.Node, site: fx.Node, extents: Extents, memory: Memory, shape_env: object, flat: bool = False) -> Slopes | None:
    """The slopes of what is provably a bias by key position, None of anything else. Bias is broadcastable to [batch, query_heads,
    query_len, key_len]; flat: batch and heads are merged.
    """
    if flat:
        return alibi_slopes_flat(bias, site, extents, memory, shape_env)
    reading = _Reading(site, extents, memory, shape_env)
    if not 2 <= example_tensor(bias).dim() <= 4:
        return None
    return _slopes(reading, reading.at(bias, *(reading.index(s) for s in (BATCH, HEAD, QUERY, KEY))))


def alibi_slopes_flat(bias: fx.Node, site: fx.Node, extents: Extents, memory: Memory, shape_env: object) -> Slopes | None:
    """Likewise for a bias [batch · query_heads, 1 or query_len, key_len] made by repeating one per head, or by a reshape."""
    reading = _Reading(site, extents, memory, shape_env)
    place = {s: reading.index(s) for s in (BATCH, HEAD, QUERY, KEY)}
    while bias.op == "call_method" and bias.target in ("to", "contiguous"):
        converted = as_node(bias.args[0])
        if example_tensor(converted).dtype is not example_tensor(bias).dtype:
            break
        bias = converted
    source = bias.args[0] if bias.op == "call_method" else None
    if not isinstance(source, fx.Node) or (tensor := tensor_of(source)) is None:
        return None
    shape = sizes(tensor)
    if bias.target == "repeat" and len(shape) == 3 and shape[0] == extents.heads:
        repeats = bind(bias, "input, *repeats").repeats
        if len(repeats) != 3 or repeats[1:] != (1, 1) or sympy.expand(typing.cast(sympy.Expr, scalar(repeats[0])) - extents.batch) != 0:
            return None
        return _slopes(reading, reading.at(source, place[HEAD], place[QUERY], place[KEY]))
    if bias.target in ("reshape", "view") and len(shape) == 4 and shape[:2] == (extents.batch, extents.heads):
        if shape[2:] != sizes(example_tensor(bias))[1:]:
            return None
        return _slopes(reading, reading.at(source, *place.values()))
    # transformers 5.17: [batch, heads, keys], which gets a dimension of one query
    if bias.target in ("reshape", "view") and shape == (extents.batch, extents.heads, extents.key_len):
        if sizes(example_tensor(bias))[1:] != (1, extents.key_len):
            return None
        return _slopes(reading, reading.at(source, place[BATCH], place[HEAD], place[KEY]))
    return None


def per_key(bias: torch.Tensor, extents: Extents, flat: bool = False) -> bool:
    """Whether a float tensor that is added to the scores is one number per (batch row, head and) key by its very shape."""
    shape = sizes(bias)
    if flat:
        return shape == (sympy.expand(extents.batch * extents.heads), 1, extents.key_len)
    padded = (1,) * (4 - len(shape)) + shape
    leads = len(padded) == 4 and padded[0] in (1, extents.batch) and padded[1] in (1, extents.heads)
    return leads and padded[2] == 1 and padded[3] == extents.key_len


def per_row(bias: torch.Tensor, extents: Extents, flat: bool = False) -> bool:
    """Likewise for a number per (batch row, head,) query row and key."""
    shape = sizes(bias)
    if flat:
        return shape == (sympy.expand(extents.batch * extents.heads), extents.query_len, extents.key_len)
    padded = (1,) * (4 - len(shape)) + shape
    leads = len(padded) == 4 and padded[0] in (1, extents.batch) and padded[1] in (1, extents.heads)
    return leads and padded[2:] == (extents.query_len, extents.key_len)


def of_scores(bias: fx.Node, extents: Extents, flat: bool = False) -> bool:
    """Whether what is added to the scores is a bias: a number per key, or one per row and key that is no mask that could not be read."""
    tensor = example_tensor(bias)
    return per_key(tensor, extents, flat) or (per_row(tensor, extents, flat) and computed(bias))


def computed(bias: fx.Node) -> bool:
    """Whether a product or a table of the model gives a tensor's floats: then it is no mask, though one may be put into it."""
    return _computed(bias, {})


def _computed(value: object, known: dict[fx.Node, bool]) -> bool:
    if isinstance(value, fx.Node) and operator_word(value) in _SPLITS:
        return _computed(value.args[0], known)
    if not isinstance(value, fx.Node) or (tensor := tensor_of(value)) is None or not tensor.dtype.is_floating_point:
        return False
    if value not in known:
        known[value] = False
        known[value] = _step_is_computed(value, known)
    return known[value]


def _step_is_computed(node: fx.Node, known: dict[fx.Node, bool]) -> bool:
    word = operator_word(node).removesuffix("_")
    operands = [*node.args, *node.kwargs.values()]
    if node.meta.get(NUMBERS):
        return True
    if word == "einsum" and len(node.all_input_nodes) == 1:  # an order of dimensions
        return _computed(node.all_input_nodes[0], known)
    if word in SOURCES or (word == "getitem" and _looks_up(operands[1])):
        return True
    if word in _SAME | _POINTWISE:
        return _computed(operands[0], known)
    if word in _FACTORS:
        return any(_computed(one, known) for one in operands)
    if word in _FILLS and any(_computed(one, known) for one in operands if tensor_of(one) is not None):
        return True
    if word in _TERMS:
        terms = [one for one in operands if not _is_small(one)]
        return bool(terms) and all(_computed(one, known) for one in terms)
    return False


def _looks_up(index: object) -> bool:
    """Whether an index chooses by the numbers of a tensor."""
    parts = index if isinstance(index, tuple) else (index,)
    return any((tensor := tensor_of(one)) is not None and tensor.dtype is not torch.bool for one in parts)


def _is_small(value: object) -> bool:
    """Whether a number is none by which masks hide."""
    return isinstance(value, (int, float)) and abs(value) < 1000


def _slopes(reading: _Reading, element: sympy.Expr | None) -> Slopes | None:
    if element is None or len(found := loads(element)) != 1:
        return None
    load = next(iter(found))
    position = element.coeff(load, 1)
    exact = sympy.expand(element - position * load) == 0
    constant = sympy.expand(position - reading.index(KEY))
    if not exact or constant.has(KEY) or loads(constant):
        return None
    node = reading.of_head(load)
    return Slopes(node, constant) if node is not None else None


def per_head(column: fx.Node, site: fx.Node, extents: Extents, memory: Memory, shape_env: object, rank: int = 4) -> fx.Node | None:
    """The tensor [query_heads] that `column` repeats; None where it is anything else. column: broadcastable to [batch, query_heads,
    query_len, 1], of rank 3 to the first three of these."""
    reading = _Reading(site, extents, memory, shape_env)
    place = [*(reading.index(s) for s in (BATCH, HEAD, QUERY)), sympy.Integer(0)]
    if example_tensor(column).dim() > rank:
        return None
    element = reading.at(column, *place[:rank])
    if element is None or not loads(element):
        return None
    node = reading.of_head(element)
    return node if node is not None and example_tensor(node).dim() == 1 else None


def parts(mask: fx.Node, shape_env: object) -> Iterator[tuple[fx.Node, tuple[fx.Node, Form] | None]]:
    """Ways to see a float mask as a bias and a condition: (bias, (condition, form) or None). Not all of them need hold."""
    dtype, whole = example_tensor(mask).dtype, mask
    while _only_broadcasts(mask):
        mask = as_node(mask.args[0])
    with contextlib.suppress(Unbound):  # a call of another form is not taken apart
        yield from _halves(mask, dtype, shape_env)
    yield whole, None


def _halves(mask: fx.Node, dtype: torch.dtype, shape_env: object) -> Iterator[tuple[fx.Node, tuple[fx.Node, Form]]]:
    if mask.target in _SUMS:
        call = bind(mask, "input: tensor, other: tensor, *, alpha=1")
        if call.alpha == 1:
            yield call.input, (call.other, "mask")
            yield call.other, (call.input, "mask")
    elif mask.target in (torch.masked_fill, "masked_fill"):
        call = bind(mask, "input: tensor, mask: tensor, value")
        if hides(call.value, dtype, shape_env):
            yield call.input, (call.mask, "hidden")
    elif mask.target in (torch.where, "where"):
        call = bind(mask, "condition, input, other" if mask.target is torch.where else "input, condition, other")
        ways: tuple[tuple[Any, Any, Form], ...] = ((call.input, call.other, "mask"), (call.other, call.input, "hidden"))
        for bias, low, form in ways:
            if tensor_of(bias) is not None and hides(low, dtype, shape_env):
                yield bias, (call.condition, form)


def _only_broadcasts(node: fx.Node) -> bool:
    """Whether a step does no more than broadcasting would, dimensions of size 1 in front or a wider shape, or copies."""
    if node.op == "call_method" and node.target == "unsqueeze":
        return node.args[1:] == (0,)
    if node.target is operator.getitem and tensor_of(node.args[0]) is not None:
        index = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
        leading = index[: len(index) - next((n for n, i in enumerate(reversed(index)) if i is None), len(index))]
        return all(i is None for i in leading) and all(i is Ellipsis or i == slice(None) for i in index[len(leading) :])
    return node.op == "call_method" and node.target in ("expand", "contiguous", "clone")


def hides(value: object, dtype: torch.dtype, shape_env: object) -> bool:
    """Whether a filling value is -inf or no more than the dtype's minimum."""
    try:
        number = Reader(Facts(shape_env)).read(value).at()
    except (Unreadable, TypeError):
        return False
    return bool(number == -sympy.oo or (isinstance(number, sympy.Rational) and number <= sympy.Rational(torch.finfo(dtype).min)))
