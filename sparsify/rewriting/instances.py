"""Makes small instances of a region: numbers for its sizes, and contents for its input tensors.

Symbolic sizes get small numbers that the graph's guards allow. Constants of the graph (a prompt of 32768 tokens, a window of 4096) are
mapped to small ones, in sizes, literals and guards alike. The map keeps neighbours, sums and the order: `q - 4095` with a window of 4096
becomes `q - 11` with a window of 12.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch import fx
from torch.fx.node import map_aggregate
from torch.utils._sympy.numbers import int_oo

from sparsify.graph.compat import symbol_values
from sparsify.rewriting.region import Region

# Constants between these are mapped to smaller ones. Others are no numbers of tokens and stay, so that integers overflow as in the graph.
LARGE, HUGE = 32, 1 << 26
_NEAR = 4  # numbers that are at most this far apart keep their distance
_TRIES = 40
STYLES = ("ones", "left", "random", "right", "documents")


class InstanceError(Exception):
    """No small instance can be made; the message says why."""


@dataclass
class Numbers:
    """Sizes and integers of a region in one instance.

    symbols: number of every symbolic size.
    fixed: map of the graph's constants to small ones.
    """

    symbols: dict[sympy.Symbol, Any] = field(default_factory=dict)
    fixed: dict[int, int] = field(default_factory=dict)
    _known: dict[sympy.Basic, Any] = field(default_factory=dict, repr=False)

    def concrete(self, value: Any) -> Any:
        """The value that a size, a number, or a container of these has in this instance."""
        if isinstance(value, bool):
            return value
        if isinstance(value, int):
            return self.fixed.get(value, value)
        if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
            return self.evaluate(value.node.expr, type(value))
        if isinstance(value, (tuple, list)):
            numbers = [self.concrete(v) for v in value]
            return tuple(numbers) if isinstance(value, torch.Size) else type(value)(numbers)
        return value

    def evaluate(self, expr: sympy.Basic, kind: type = torch.SymInt) -> Any:
        if expr not in self._known:
            mapped = {a: sympy.Integer(self.fixed[int(a)]) for a in expr.atoms(sympy.Integer) if int(a) in self.fixed}
            result: Any = expr.xreplace({**mapped, **self.symbols})
            convert: Callable[[Any], Any] = {torch.SymInt: int, torch.SymFloat: float, torch.SymBool: bool}[kind]
            try:
                self._known[expr] = convert(result)
            except TypeError as error:
                raise InstanceError(f"{expr} has no number here") from error
        return self._known[expr]


def integers(graph: fx.Graph) -> Iterator[int]:
    """Every integer constant of a graph: literals, sizes, and integers in expressions of sizes."""
    found: list[int] = []

    def collect(value: Any) -> Any:
        if isinstance(value, int) and not isinstance(value, bool):
            found.append(value)
        return value

    for node in graph.nodes:
        map_aggregate((node.args, node.kwargs), collect)
        example = node.meta.get("example_value")
        for tensor in example if isinstance(example, (tuple, list)) else (example,):
            sizes = tensor.shape if isinstance(tensor, torch.Tensor) else (tensor,)
            for size in sizes:
                if isinstance(size, torch.SymInt):
                    found += [int(a) for a in size.node.expr.atoms(sympy.Integer)]
                else:
                    collect(size)
    yield from found


def symbols(graph: fx.Graph) -> set[sympy.Symbol]:
    """All symbols in sizes, strides and numbers of a graph."""
    found: set[sympy.Symbol] = set()
    for node in graph.nodes:
        example = node.meta.get("example_value")
        for value in example if isinstance(example, (tuple, list)) else (example,):
            for size in (*value.shape, *value.stride()) if isinstance(value, torch.Tensor) else (value,):
                if isinstance(size, (torch.SymInt, torch.SymFloat, torch.SymBool)):
                    found |= size.node.expr.free_symbols
    return found


def shrink(numbers: Iterable[int], keep: set[int], draw: random.Random) -> dict[int, int]:
    """A map of large integers to small ones.

    Args:
        numbers: all integers of the graph.
        keep: those that stay, such as head dimensions.
        draw: source of randomness.
    """
    every = {n for n in numbers if n > 4}
    known = {n: n for n in every if n < LARGE or n in keep}
    small = [n for n in known if n < LARGE]
    last = max([4, *(n for n in small if n not in keep)])
    mapped: dict[int, int] = {}
    anchor = None
    for number in sorted(n for n in every if n not in known and n < HUGE):
        if anchor is not None and number - anchor <= _NEAR:
            mapped[number] = mapped[anchor] + number - anchor
        else:
            target = _as_sum(number, {**known, **mapped}) if mapped else None
            if target is None or target <= last:
                target = last + draw.randint(2, 4)
            mapped[number], anchor = target, number
        last = max(last, mapped[number])
    return mapped


def _as_sum(number: int, known: dict[int, int]) -> int | None:
    """The small number for a multiple of a known number or a sum of two; None for any other number."""
    for one in sorted(known, reverse=True):
        for times in (2, 3, 4):
            if one * times == number:
                return known[one] * times
        if number - one in known and known[one] != one:
            return known[one] + known[number - one]
    return None


class Guards:
    """What Dynamo assumed about symbolic sizes when the graph was matched.

    ranges: of each symbol.
    hints: its value in the example inputs.
    statements: guards over several symbols.
    """

    def __init__(self, shape_env: Any | None):
        self.ranges = dict(shape_env.var_to_range) if shape_env is not None else {}
        self.hints = {s: int(v) for s, v in symbol_values(shape_env).items() if v.is_integer} if shape_env is not None else {}
        self.statements = [g.expr for g in shape_env.guards if len(g.expr.free_symbols) > 1] if shape_env is not None else []

    def draw(self, wanted: set[sympy.Symbol], fixed: dict[int, int], top: int, draw: random.Random) -> dict[sympy.Symbol, Any]:
        """Draws numbers for the symbols: first those of the example, mapped as the graph's constants are, then any up to `top`.

        Raises:
            InstanceError: no draw satisfied the guards.
        """
        mine = [s for s in self.statements if s.free_symbols & wanted]
        every = self.related(wanted)
        small = {s: sympy.Integer(fixed.get(self.hints[s], self.hints[s])) for s in every if s in self.hints}
        small |= {s: sympy.Float(draw.uniform(0.2, 0.8)) for s in every if not s.is_integer}
        if len(small) == len(every) and all(n < 4 * LARGE for n in small.values()) and self.allow(small, fixed, mine):
            return small
        same = self._same(every, mine)
        # of symbols that are equal the one with the highest lower bound is drawn, which the others may not share
        drawn = {same[symbol]: symbol for symbol in sorted(every, key=lambda s: self._bounds(s, fixed)[0] if s.is_integer else 0)}
        for _ in range(_TRIES):
            found = {stands: self._number(symbol, fixed, top, draw) for stands, symbol in drawn.items()}
            found = {symbol: found[same[symbol]] for symbol in every}
            if self.allow(found, fixed, mine):
                return found
        raise InstanceError("no small sizes fit the graph's guards")

    @staticmethod
    def _same(symbols: list[sympy.Symbol], statements: list[sympy.Basic]) -> dict[sympy.Symbol, sympy.Symbol]:
        """For each symbol the one that stands for all which guards say are equal to it: drawn apart, several would hardly ever be."""
        stands = {symbol: symbol for symbol in symbols}
        for statement in statements:
            sides = [side for side in statement.args if isinstance(side, sympy.Symbol) and side in stands]
            if isinstance(statement, sympy.Eq) and len(sides) == 2:
                kept, gone = (stands[side] for side in sides)
                stands = {symbol: kept if one == gone else one for symbol, one in stands.items()}
        return stands

    def related(self, wanted: set[sympy.Symbol]) -> list[sympy.Symbol]:
        """These symbols and those that guards compare them with."""
        mine = (s.free_symbols for s in self.statements if s.free_symbols & wanted)
        return sorted(wanted.union(*mine), key=str)

    def allow(self, found: dict[sympy.Symbol, Any], fixed: dict[int, int], statements: list[sympy.Basic]) -> bool:
        """Whether the numbers lie in their ranges and satisfy the guards."""
        numbers = Numbers(found, fixed)
        bounds = ((n, *self._bounds(symbol, fixed)) for symbol, n in found.items() if symbol.is_integer)
        try:
            return all(low <= n <= high for n, low, high in bounds) and all(numbers.evaluate(s, torch.SymBool) for s in statements)
        except InstanceError:
            return False

    def _bounds(self, symbol: sympy.Symbol, fixed: dict[int, int]) -> tuple[float, float]:
        known = self.ranges.get(symbol)
        if known is None:
            return 2, math.inf
        unbounded = 0 if self.hints.get(symbol) == 0 else 1  # an offset, which may be 0, or a size
        low = unbounded if known.lower in (-int_oo, -sympy.oo) else int(known.lower)
        high = math.inf if known.upper in (int_oo, sympy.oo) else int(known.upper)
        return fixed.get(low, low), fixed.get(high, high) if isinstance(high, int) else high

    def _number(self, symbol: sympy.Symbol, fixed: dict[int, int], top: int, draw: random.Random) -> Any:
        if not symbol.is_integer:
            return sympy.Float(draw.uniform(0.2, 0.8))
        if self.hints.get(symbol) == 0 and draw.random() < 0.5:  # what several sizes may have to leave room for
            return sympy.Integer(0)
        low, high = self._bounds(symbol, fixed)
        return sympy.Integer(draw.randint(int(low), int(max(low, min(high, max(top, low + 6))))))


def tensor(node: fx.Node, numbers: Numbers, style: str, generator: torch.Generator) -> torch.Tensor:
    """Random contents for an input tensor of a region, on the CPU, with its dimensions in the same order of strides as in the graph."""
    example = node.meta["example_value"]
    shape = numbers.concrete(example.shape)
    strides = numbers.concrete(tuple(example.stride()))
    order = sorted(range(len(shape)), key=lambda d: -strides[d])
    wide = [1 if strides[d] == 0 else shape[d] for d in order]
    values = _contents(wide, example.dtype, style, generator)
    back = [order.index(d) for d in range(len(shape))]
    return values.permute(back).expand(shape) if shape else values


def _contents(shape: list[int], dtype: torch.dtype, style: str, generator: torch.Generator) -> torch.Tensor:
    if dtype.is_floating_point or dtype.is_complex:
        drawn = torch.randn(shape, generator=generator, dtype=torch.float32)
        # what is no query, key or value may go through a logarithm or a root
        return (drawn if len(shape) > 3 or style == STYLES[0] else drawn.abs()).to(dtype)
    if not shape or not any(size != 1 for size in shape):  # a counter or an offset
        return torch.randint(0, 4, shape, generator=generator).to(dtype)
    draws = lambda high: torch.randint(0, high, shape, generator=generator)
    length = shape[-1]
    places = torch.arange(length).expand(shape)
    edge = torch.randint(0, max(1, length // 2), (*shape[:-1], 1), generator=generator)
    made = {
        "ones": lambda: torch.ones(shape, dtype=torch.int64),
        "left": lambda: (places >= edge).long(),
        "right": lambda: (places < length - edge).long(),
        "random": lambda: (draws(10) < 7).long(),
        # numbers that rise by one and start anew: packed positions, and with bool or a comparison to 0 padding in the midst
        "documents": lambda: places % (2 + length // 2),
    }[style]()
    return made.to(dtype)


def make(
    region: Region, wanted: set[sympy.Symbol], guards: Guards, seed: int, style: str, mapped: bool = True
) -> tuple[Numbers, dict[str, Any]]:
    """Makes one instance of a region.

    Args:
        wanted: symbols that need a number.
        guards: what the numbers must satisfy.
        seed: of all random choices.
        style: kind of contents of integer and boolean tensors, one of STYLES.
        mapped: map the graph's constants to small ones.

    Returns:
        numbers for sizes, and values for the region's placeholders by name.

    Raises:
        InstanceError: no small sizes satisfy the guards.
    """
    draw = random.Random(seed)
    keep = kept_sizes(region.site)
    window = getattr(getattr(region.site, "mask", None), "window", None) or 0
    own = [*integers(region.graph), window, *(guards.hints.get(symbol, 0) for symbol in guards.related(wanted))]
    fixed = shrink(own, keep, draw) if mapped else {}
    top = max([6, *fixed.values(), *(n for n in own if n < LARGE and n not in keep)]) + 6
    numbers = Numbers(guards.draw(wanted, fixed, top, draw) if wanted else {}, fixed)
    generator = torch.Generator().manual_seed(seed)
    values = {}
    for node in region.graph.nodes:
        if node.op != "placeholder":
            continue
        example = node.meta.get("example_value")
        values[node.name] = tensor(node, numbers, style, generator) if isinstance(example, torch.Tensor) else numbers.concrete(example)
    return numbers, values


def kept_sizes(site: Any) -> set[int]:
    """Sizes that are not mapped: heads and head dimensions, on which the default scale and the groups depend, and their products."""
    named = [getattr(site, n, None) for n in ("batch", "query_heads", "kv_heads", "qk_head_dim", "v_head_dim")]
    batch, heads, kv_heads, *dims = (int(n) if isinstance(n, int) else 0 for n in named)
    return {batch, heads, kv_heads, *dims, batch * heads, batch * kv_heads}
