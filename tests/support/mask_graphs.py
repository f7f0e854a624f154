"""Random mask graphs as Dynamo would trace them: every node has its example value (a fake tensor or a symbolic size) and its real value.

Calls mix positions and names; dtypes, fractions, overflow, negative dimensions and deprecated signatures are drawn too. What eager
PyTorch refuses is not added to the graph.
"""

from __future__ import annotations

import operator
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import reject
from hypothesis import strategies as st
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.fx.node import map_arg

INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


class Refused(Exception):
    """Eager PyTorch does not run the call."""


class Builder:
    """A graph that grows. real: the value of every node. inputs: the placeholders, with their values. sizes: B, H, Q, K as numbers."""

    def __init__(self, draw: Any, sizes: dict[str, int], dynamic: bool):
        self.draw, self.sizes, self.dynamic = draw, sizes, dynamic
        self.graph, self.real, self.inputs = fx.Graph(), {}, {}
        self.shape_env = ShapeEnv() if dynamic else None
        self.fake_mode = FakeTensorMode(shape_env=self.shape_env)
        b, h, q, k = sizes.values()
        self.query = self.input("query", torch.zeros(b, h, q, 4), (0, 2))
        self.key = self.input("key", torch.zeros(b, h, k, 4), (0, 2))
        self.B, self.Q, self.K = self.size(self.query, 0), self.size(self.query, 2), self.size(self.key, 2)

    def pick(self, *options: Any) -> Any:
        return self.draw(st.sampled_from(options))

    def input(self, name: str, tensor: torch.Tensor, dynamic: tuple[int, ...]) -> fx.Node:
        node = self.graph.placeholder(name)
        kinds = [DimDynamic.DYNAMIC if self.dynamic and d in dynamic and n > 1 else DimDynamic.STATIC for d, n in enumerate(tensor.shape)]
        context = StatelessSymbolicContext(dynamic_sizes=kinds) if self.dynamic else None
        node.meta["example_value"] = self.fake_mode.from_tensor(tensor, symbolic_context=context, static_shapes=not self.dynamic)
        self.inputs[node], self.real[node] = tensor, tensor
        return node

    def size(self, node: fx.Node, dim: int) -> fx.Node | int:
        """A size, as a node where it is symbolic."""
        if isinstance(node.meta["example_value"].shape[dim], int):
            return self.real[node].shape[dim]
        return self.call("size", node, dim)

    def call(self, target: str | Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        """Adds a call of a method or of a function. Raises Refused where eager PyTorch raises."""
        try:
            value = _run(target, *map_arg((args, kwargs), self.real.__getitem__))
            with self.fake_mode:
                example = _run(target, *map_arg((args, kwargs), lambda n: n.meta["example_value"]))
        except Exception as error:
            raise Refused(str(error)) from error
        node = self.graph.create_node("call_method" if isinstance(target, str) else "call_function", target, args, kwargs)
        node.meta["example_value"], self.real[node] = example, value
        return node

    def spell(self, name: str, *positional: Any, forms: str = "fm", module: Any = torch, **named: Any) -> fx.Node:
        """A call by method or function ("m", "f", "o" for the operator), with so many arguments by position as is drawn."""
        form = self.pick(*forms)
        given = list(named.items())
        count = self.draw(st.integers(0, len(given)))
        if form == "o":
            return self.call(getattr(operator, name), *positional, *named.values())
        args, rest = (*positional, *(v for _, v in given[:count])), given[count:]
        kwargs = dict(reversed(rest) if self.draw(st.booleans()) else rest)
        if form == "f" and count == 0 and len(positional) == 1 and isinstance(positional[0], fx.Node) and self.draw(st.integers(0, 3)) == 3:
            return self.call(getattr(module, name), input=positional[0], **kwargs)
        return self.call(name if form == "m" else getattr(module, name), *args, **kwargs)

    def rank(self, x: fx.Node) -> int:
        return self.real[x].dim()

    def dtype(self, x: fx.Node) -> torch.dtype:
        return self.real[x].dtype


def _run(target: str | Callable[..., Any], args: tuple, kwargs: dict) -> Any:
    args = _plain(args)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return getattr(args[0], target)(*args[1:], **_plain(kwargs)) if isinstance(target, str) else target(*args, **_plain(kwargs))


def _plain(value: Any) -> Any:
    """Without fx's own containers."""
    if isinstance(value, (list, tuple)):
        return (list if isinstance(value, list) else tuple)(map(_plain, value))
    return {k: _plain(v) for k, v in value.items()} if isinstance(value, dict) else value


# -- integers ------------------------------------------------------------------------------------------------------------------------------

_CONSTANTS = (1, 2, -1, 3, -2, 5, 0, 7, True, 2**31 - 1, 2**30, 2**62, -(2**31), 300)
_FRACTIONS = (0.5, 1.5, -0.5, 2.0, 0.9, 1e9, float("inf"), -2.5)


def constant(b: Builder) -> Any:
    """A number, mostly small; or a size."""
    return b.pick(*_CONSTANTS[:8], *_CONSTANTS, *_FRACTIONS, b.Q, b.K, *(_FRACTIONS[:4]))


def small(b: Builder) -> int:
    return b.draw(st.integers(-3, 3))


def counting(b: Builder, length: Any, rows: bool) -> fx.Node:
    """0, 1, 2 ... as a column (rows) or as a row, in some spelling; now and then something near it."""
    form = b.pick(*[0] * 6, *range(1, 12))
    kind = b.pick({}, {}, {}, {"dtype": torch.int64}, {"dtype": torch.int32}, {"dtype": b.pick(*INTEGERS, *FLOATS)})
    if form == 0:
        x = b.call(torch.arange, length, **kind)
    elif form in (1, 2, 3):
        start, step = b.pick(0, 1, -1, 0.5, 2), b.pick(1, 1, 1, 2, 1.0)
        end = b.call(operator.add, length, start) if isinstance(length, fx.Node) and isinstance(start, int) else None
        end = end if end is not None else (length + start if isinstance(length, int) else length)
        x = [
            lambda: b.call(torch.arange, start, end, **kind),
            lambda: b.call(torch.arange, start, end=end, **kind),
            lambda: b.call(torch.arange, end=end, start=start, step=step, **kind),
        ][form - 1]()
    elif form == 4:
        x = b.spell("cumsum", b.call(torch.ones, length, dtype=b.pick(torch.int64, torch.int32, torch.bool)), dim=b.pick(0, -1))
        x = b.call(operator.sub, x, 1)
    elif form == 5:
        x = b.call(torch.full, (length,), b.pick(2, 1.7, -1.5, True), **kind)
    elif form == 6:
        x = b.call(operator.add, b.call(torch.arange, length), b.call(torch.tensor, constant(b), **kind))
    elif form == 7:
        x = b.spell("sub", b.call(torch.arange, length), other=b.call(torch.arange, length), alpha=b.pick(1, 2, -1))
    elif form == 8:
        x = b.call("add", b.call(torch.arange, length), b.pick(2, -1), b.call(torch.ones, length, dtype=torch.int64))
    elif form == 9:
        x = b.spell("rsub", b.call(torch.arange, length), other=constant(b), forms="f")
    elif form == 10:
        x = b.call(torch.arange, length, **kind)
        x = b.spell(b.pick("full_like", "ones_like", "zeros_like"), x, forms="f", **b.pick({}, {"fill_value": constant(b)}))
    else:
        x = b.call(torch.arange, length, **kind)
        made = {
            "new_full": {"size": (length,), "fill_value": constant(b)},
            "new_ones": {"size": (length,)},
            "new_zeros": {"size": (length,)},
        }
        name = b.pick(*made)
        x = b.spell(name, x, forms="m", **made[name])
    if not rows:
        return x if b.draw(st.booleans()) else b.call(operator.getitem, x, (None, slice(None)))
    lifts: tuple[Callable[[], fx.Node], ...] = (
        lambda: b.call(operator.getitem, x, (slice(None), None)),
        lambda: b.spell("unsqueeze", x, dim=b.pick(1, -1)),
        lambda: b.call("view", x, *b.pick((-1, 1), ((-1, 1),))),
        lambda: b.spell("reshape", x, shape=(-1, 1)),
        lambda: b.call(operator.getitem, x, (Ellipsis, None)),
        lambda: b.call(getattr, b.call(operator.getitem, x, None), b.pick("mT", "T")),
        lambda: b.spell("unflatten", x, dim=b.pick(0, -1), sizes=(length, 1)),
    )
    return b.pick(*lifts)()


def changed(b: Builder, x: fx.Node) -> fx.Node:
    """One more operator on integers or floats."""
    rank = b.rank(x)
    dim = b.draw(st.integers(-rank, rank - 1)) if rank else 0
    other = b.pick(constant(b), small(b), small(b))
    wide = b.pick(torch.int64, torch.int32, *INTEGERS, *FLOATS, torch.bool)
    names = {"float": 0, "double": 0, "half": 0, "bfloat16": 0, "int": 0, "long": 0, "contiguous": 0, "clone": 0, "detach": 0}
    options: tuple[Callable[[], fx.Node], ...] = (
        lambda: b.spell("add", x, other=other, forms="fmo"),
        lambda: b.spell("sub", x, other=other, forms="fmo"),
        lambda: b.spell("add", x, other=small(b), alpha=b.pick(1, 2, -1)),
        lambda: b.spell("mul", x, other=other, forms="fmo"),
        lambda: b.call(operator.sub, other, x),
        lambda: b.spell(b.pick("neg", "abs"), x, forms="fmo"),
        lambda: b.spell("to", x, dtype=wide, forms="m"),
        lambda: b.call("type", x, wide),
        lambda: b.call("type_as", x, b.call(torch.tensor, 1, dtype=wide)),
        lambda: b.call(b.pick(*names), x),
        lambda: b.spell("transpose", b.spell("transpose", x, dim0=-1, dim1=dim), dim0=dim, dim1=-1),
        lambda: b.spell(b.pick("movedim", "moveaxis"), x, source=dim, destination=b.pick(0, -1, dim)),
        lambda: b.spell("adjoint", x),
        lambda: b.spell(b.pick("transpose", "swapaxes"), x, **b.pick({"dim0": -1, "dim1": -2}, {"dim1": dim, "dim0": -1})),
        lambda: b.spell("squeeze", b.spell("unsqueeze", x, dim=dim), dim=dim),
        lambda: b.call("squeeze", b.call("unsqueeze", x, dim), *b.pick((), (dim,), ((dim, -1),))),
        lambda: b.call(b.pick("view_as", "reshape_as", "expand_as"), x, x),
        lambda: b.spell("flatten", b.spell("unsqueeze", x, dim=dim), start_dim=0, end_dim=b.pick(1, -rank - 1 + 1)),
        lambda: b.call(operator.getitem, x, b.pick(Ellipsis, slice(None), (Ellipsis, slice(None, None, 1)), (slice(1, None),), (-1,), 0)),
        lambda: b.call(operator.getitem, x, (Ellipsis, b.pick(slice(0, None), slice(-2, None), slice(None, -1), slice(None, None, 2)))),
        lambda: b.spell("narrow", x, dim=dim, start=b.pick(0, -1, 1), length=1),
        lambda: b.spell("select", b.spell("unsqueeze", x, dim=dim), dim=dim, index=b.pick(0, -1)),
        lambda: b.call("permute", x, *b.pick(tuple(range(rank)), (tuple(range(-rank, 0)),), tuple(range(rank))[::-1])),
        lambda: b.spell("where", compared(b, x, small(b)), b.pick(x, other), other, forms="f"),
        lambda: b.spell("where", x, compared(b, x, small(b)), other, forms="m"),
        lambda: b.spell("masked_fill", x, mask=compared(b, x, small(b)), value=other),
        lambda: b.spell("cumsum", x, dim=dim, **b.pick({}, {"dtype": b.pick(torch.int64, torch.int32, torch.int8)})),
        lambda: b.spell("diff", x, dim=dim, prepend=b.call(operator.getitem, x, (Ellipsis, slice(0, 1)))),
        lambda: b.spell(b.pick("ones_like", "zeros_like"), x, forms="f", **b.pick({}, {"dtype": wide})),
        lambda: b.spell(b.pick("tril", "triu"), x, **b.pick({}, {"diagonal": small(b)})),
    )
    return b.pick(*options)()


# -- conditions ----------------------------------------------------------------------------------------------------------------------------


def compared(b: Builder, left: Any, right: Any) -> fx.Node:
    name = b.pick("le", "lt", "ge", "gt", "eq", "ne")
    return b.spell(name, left, other=right, forms="fmoo")


def clause(b: Builder, rows: fx.Node, columns: fx.Node, data: dict[str, fx.Node]) -> fx.Node:
    """A condition that may be a clause of a mask."""
    shift = constant(b) if "spare" not in data else b.pick(b.size(data["spare"], 0), small(b))
    keep, documents = data["keep"], data["documents"]
    per_key = lambda x: b.call(operator.getitem, x, (slice(None), None, None, slice(None)))
    per_row = lambda x: b.call(operator.getitem, x, (slice(None), None, slice(None), None))
    moved = lambda: b.spell(b.pick("add", "sub"), rows, other=shift, forms="fmo")
    distance = lambda: b.call(operator.sub, columns, rows)
    square = lambda size: b.call(b.pick(torch.ones, torch.zeros), *b.pick((b.Q, b.K), ((b.Q, b.K),)), dtype=b.pick(torch.bool, torch.int64))
    length, fractions = b.pick(2, 3, -2), b.dtype(columns).is_floating_point or b.dtype(rows).is_floating_point
    chunk = lambda x: b.spell("floor_divide", x, other=length, forms="f") if length == 3 else b.call(operator.floordiv, x, length)
    options: tuple[Callable[[], fx.Node], ...] = (
        *(lambda: b.call(operator.le, columns, rows),) * 3,
        lambda: compared(b, columns, rows),
        lambda: compared(b, columns, moved()),
        lambda: b.call(operator.gt, columns, b.call(operator.sub, rows, b.pick(1, 2, 3, 4))),
        lambda: compared(b, distance(), shift),
        lambda: compared(b, b.spell("abs", b.call(operator.sub, distance(), shift), forms="fmo"), b.pick(2, 4)),
        lambda: compared(b, per_key(keep), b.pick(0, 1, 0.5)),
        lambda: b.call(b.pick("bool", "to"), per_key(keep), *b.pick((), (torch.bool,))),
        lambda: b.call(operator.eq, per_key(documents), per_row(documents)),
        *(() if fractions else (lambda: b.call(operator.eq, chunk(columns), chunk(rows)),)),
        lambda: b.spell(b.pick("tril", "triu"), square(0), **b.pick({}, {"diagonal": small(b)})),
        lambda: b.call(operator.getitem, keep, (0, columns)),
        lambda: compared(b, columns, shift),
    )
    found = b.pick(*options)()
    return found if b.dtype(found) is torch.bool else b.call(operator.ne, found, 0)


def edited(b: Builder, x: fx.Node) -> fx.Node:
    """One more operator on a condition."""
    other = b.pick(x, True, False)
    options: tuple[Callable[[], fx.Node], ...] = (
        lambda: b.call(operator.invert, b.spell(b.pick("logical_not", "bitwise_not"), x)),
        lambda: b.call(operator.ne, b.call(b.pick("int", "long", "float", "half"), x), 0),
        lambda: b.call("bool", b.call(operator.mul, x, b.pick(2, 0.5, 256, -1))),
        lambda: b.call("bool", b.call("to", b.call(operator.mul, x, b.pick(2, 0.5, 1.5, 256)), b.pick(*INTEGERS))),
        lambda: b.spell("where", x, b.pick(True, False), b.pick(True, False), forms="f"),
        lambda: b.call(b.pick(operator.and_, operator.or_, operator.xor), x, other),
        lambda: b.spell(b.pick("logical_and", "logical_or", "logical_xor", "bitwise_and", "eq", "ne", "mul"), x, other=x),
        lambda: b.spell("masked_fill", x, mask=x, value=b.pick(True, False, 0.5, 2, 0)),
        lambda: b.call(b.pick("expand", "broadcast_to"), x, b.pick((b.B, 1, b.Q, b.K), (-1, -1, b.Q, b.K), (b.Q, b.K))),
        lambda: b.spell("add", x, other=x),
        lambda: b.call(operator.getitem, b.call(F.pad, x, (0, 1), value=b.pick(True, 0)), (Ellipsis, slice(b.pick(1, 0), None))),
        lambda: b.call(operator.getitem, b.call(F.pad, x, (1, 0), "constant", b.pick(True, 0)), (Ellipsis, slice(None, -1))),
        lambda: b.call(b.pick("repeat", "tile"), x, *[1] * b.rank(x)),
        lambda: b.call(operator.getitem, b.call("repeat_interleave", x, 2, dim=-1), (Ellipsis, slice(None, None, 2))),
        lambda: b.call(operator.invert, x),
    )
    found = b.pick(*options)()
    return found if b.dtype(found) is torch.bool else b.call(operator.ne, found, 0)


def additive(b: Builder, x: fx.Node) -> fx.Node:
    """A condition as what is added to scores of float32."""
    low = b.pick(torch.finfo(torch.float32).min, float("-inf"), -1e9)
    zeros = lambda: b.call(torch.zeros, b.Q, b.K)
    options: tuple[Callable[[], fx.Node], ...] = (
        lambda: b.call("float", b.spell("where", x, b.pick(0.0, 0), low, forms="f")),
        lambda: b.spell("masked_fill", zeros(), mask=b.call(operator.invert, x), value=low),
        lambda: b.call(operator.mul, b.call(operator.sub, 1.0, b.call("float", x)), low),
        lambda: b.spell("where", x, zeros(), low, forms="f"),
        lambda: b.call(operator.mul, b.call("float", b.call(operator.invert, x)), low),
    )
    return b.pick(*options)()


def attempt(make: Callable[[], fx.Node], otherwise: fx.Node) -> fx.Node:
    """What eager refuses, or what has grown too large, leaves the graph as it was."""
    try:
        return make()
    except Refused:
        return otherwise


def changed_or_same(b: Builder, x: fx.Node) -> fx.Node:
    return attempt(lambda: changed(b, x), x)


@st.composite
def mask_graphs(draw: Any) -> tuple[Builder, fx.Node]:
    """The builder, whose graph ends with scaled_dot_product_attention under the mask, and the mask."""
    query_len = draw(st.integers(1, 4))
    key_len = draw(st.sampled_from([query_len, query_len, query_len + 2, draw(st.integers(1, 5))]))
    sizes = {"B": draw(st.sampled_from([2, 1])), "H": draw(st.sampled_from([1, 2])), "Q": query_len, "K": key_len}
    b = Builder(draw, sizes, dynamic=draw(st.integers(0, 3)) == 3)
    seed = torch.Generator().manual_seed(draw(st.integers(0, 5)))
    kind = b.pick(torch.int64, torch.int64, torch.int32, torch.int8)
    data = {"keep": b.input("keep", torch.randint(0, 3, (sizes["B"], key_len), generator=seed).to(kind), (0, 1))}
    data["documents"] = b.input("documents", torch.randint(0, 2, (sizes["B"], key_len), generator=seed).cumsum(-1), (0, 1))
    if draw(st.integers(0, 4)) == 4:
        data["spare"] = b.input("spare", torch.zeros(draw(st.sampled_from([2, 3]))), (0,))
    try:
        rows, columns = counting(b, b.Q, True), counting(b, b.K, False)
        if draw(st.booleans()):
            past = b.call(operator.sub, b.K, b.Q) if isinstance(b.K, fx.Node) or isinstance(b.Q, fx.Node) else key_len - query_len
            rows = b.call(operator.add, rows, past)
    except Refused:
        rows, columns = (b.call("view", b.call(torch.arange, b.Q), -1, 1), b.call(torch.arange, b.K))
    for _ in range(draw(st.sampled_from([0, 0, 1, 2]))):
        source = draw(st.booleans())
        rows, columns = (changed_or_same(b, rows), columns) if source else (rows, changed_or_same(b, columns))
    mask = b.call(operator.le, b.call(torch.arange, b.K), b.call("view", b.call(torch.arange, b.Q), -1, 1))
    first = attempt(lambda: clause(b, rows, columns, data), mask)
    mask = attempt(lambda: b.call(operator.and_, mask, first), first) if draw(st.booleans()) else first
    for _ in range(draw(st.sampled_from([0, 1, 1, 2]))):
        if draw(st.integers(0, 3)) < 3:
            mask = attempt(lambda: b.call(b.pick(*[operator.and_] * 6, operator.or_), mask, clause(b, rows, columns, data)), mask)  # noqa: B023
        else:
            mask = attempt(lambda: edited(b, mask), mask)  # noqa: B023
    if draw(st.integers(0, 2)) == 2:
        mask = attempt(lambda: additive(b, mask), mask)
    try:
        call = b.call(F.scaled_dot_product_attention, b.query, b.key, b.key, attn_mask=mask)
    except Refused:
        reject()
    b.graph.output((call,))
    return b, mask
