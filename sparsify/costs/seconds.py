"""Seconds of every candidate at a site, as sympy expressions in batch, lengths, heads and density.

    seconds = call + rows · tiles / processors + work / efficiency + … , never less than the bytes that must move take

`sparsify.costs.work` counts what a candidate does; a device's profile says what that costs (`sparsify.costs.profile` lists the terms).
Estimate, selection and attention are works of their own. `sparsify.costs.decoder` adds up whole models, `sparsify.costs.crossovers` solves
for lengths.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import sympy
import torch

from sparsify.costs import work
from sparsify.costs.device import Device
from sparsify.costs.work import AttentionSizes, Work, operand_bytes, sizes_of
from sparsify.matching.sites import AttentionSite, FeedForwardSite

__all__ = [
    "AttentionSizes",
    "antidiagonal_crossover",
    "attention_seconds",
    "decode_seconds",
    "estimate_seconds",
    "example",
    "expected",
    "expected_density",
    "ffn_seconds",
    "formula",
    "number",
    "operand_bytes",
    "roofline",
    "seconds",
    "visited",
]


def seconds(works: Work | Iterable[Work], device: Device) -> sympy.Expr:
    """Time of kernels that run one after the other."""
    return _seconds(works, device) if isinstance(works, Work) else sympy.Add(*(_seconds(one, device) for one in works))


@functools.lru_cache(maxsize=4096)
def _seconds(one: Work, device: Device) -> sympy.Expr:
    coefficients = device.coefficients(one.family)
    total = sympy.Add(*(coefficients[name] * term for name, term in one.features(device).items() if coefficients.get(name)))
    if coefficients.get("bytes") or one.size == 0:
        return total
    return work.largest(total, one.size / device.bandwidth)


def roofline(flops: sympy.Expr, size: sympy.Expr, device: Device, efficiency: float, launches: int) -> sympy.Expr:
    """Seconds for `flops` FLOPs and `size` bytes in `launches` kernels of a family that no profile knows."""
    return work.largest(flops / (device.flops * efficiency), size / device.bandwidth) + launches * device.launch


def visited(site: AttentionSite | AttentionSizes, window: int | None = None) -> sympy.Expr:
    """Query-key pairs a head computes: the causal part of the rectangle, or the band of a window."""
    return work.pairs(sizes_of(site), window)


def attention_seconds(
    site: AttentionSite | AttentionSizes,
    device: Device,
    *,
    share: Any = 1,
    window: Any = None,
    kernel: str = "triton",
    listed: bool | None = None,
) -> sympy.Expr:
    """Attention over `share` of the blocks that a row could visit; by block lists (`listed`) where that is less than all of them."""
    listed = share != 1 if listed is None else listed
    return seconds(work.attention(site, kernel, share=share, window=window, listed=listed), device)


def decode_seconds(site: AttentionSite | AttentionSizes, device: Device, *, kernel: str = "cache", kept: Any = None) -> sympy.Expr:
    """One query row of each sequence over `kept` keys; `kernel` "cache" is sparsify's step over a cache's slots, "sdpa" torch's own."""
    return seconds(work.decode(site, kernel, kept), device)


def estimate_seconds(
    site: AttentionSite | AttentionSizes, device: Device, stride: int, block: int = 128, variants: Iterable[str] = ()
) -> sympy.Expr:
    """Antidiagonal scores, the choice of blocks and their lists; `variants` are the method's option `estimate`."""
    return seconds(work.selection(site, stride, block, tuple(variants)), device)


def ffn_seconds(site: FeedForwardSite, device: Device, share: Any = 1) -> sympy.Expr:
    """A feed-forward block of which `share` of the calls is computed: few rows stream its weights once for all of them."""
    streamed = seconds(work.skipped_ffn(site.rows, site.weight_bytes, site.dtype, share), device)
    flops = Work("linear", site.dtype, flops=sympy.sympify(2 * site.rows * site.weight_bytes * share / site.dtype.itemsize))
    return work.largest(streamed, seconds(flops, device))


@functools.lru_cache(maxsize=1024)
def expected_density(length: sympy.Expr) -> sympy.Expr:
    """Share of causal blocks kept at a threshold of .95: a power law through the densities published for stride 8 between 8K and 128K
    tokens (arXiv 2503.16428, table of RULER densities: 43.8 % to 6.9 %)."""
    return work.smallest(1, sympy.Rational(44, 100) * (8192 / length) ** sympy.Rational(2, 3))


def antidiagonal_crossover(
    device: Device,
    stride: int,
    block: int,
    head_dim: int,
    density: float | None,
    kernel: str = "triton",
    *,
    variants: tuple[str, ...] = (),
    heads: tuple[int, int] = (32, 8),
    batch: int = 1,
    worth: float | None = None,
    query_len: int | None = None,
) -> int:
    """Smallest prompt length from which block-sparse attention pays; see `sparsify.costs.crossovers.sparse_from`."""
    from sparsify.costs import crossovers

    return crossovers.sparse_from(device, stride, block, head_dim, density, kernel, variants, heads, batch, worth, query_len)


def number(expr: sympy.Expr, hints: dict[sympy.Symbol, int]) -> float | None:
    """The expression at the example's sizes; None when a symbol has no hint."""
    value = _at(sympy.sympify(expr), hints)
    return float(value) if value.is_number else None


def _at(expr: sympy.Expr, values: Mapping[sympy.Symbol, float]) -> sympy.Expr:
    """The expression with all symbols replaced at once, which never compares half of a maximum's arguments with the rest."""
    return expr.xreplace({symbol: sympy.sympify(value) for symbol, value in values.items()})


LETTERS = {"batch": "B", "query_heads": "H", "kv_heads": "G", "query_len": "Q", "key_len": "N"}


_DIMS = ("qk_head_dim", "v_head_dim")


def formula(build: Callable[[AttentionSizes], Iterable[Work]], site: AttentionSite | AttentionSizes, device: Device) -> str:
    """A candidate's seconds in letters and in numbers, kernel by kernel: B batch, H and G query and KV heads, Q and N query and key length.

    What a maximum or minimum comes to at the example's sizes is what is shown: `hopper/causal 54.6 ms: 7.7e-13·B·H·N² + 6.0e-6`.

    Args:
        build: the candidate's works from sizes. site: one whose example sizes are known; else there is no text.
    """
    s, known = sizes_of(site), example(site)
    if not {*LETTERS, *_DIMS} <= set(known):
        return ""
    letters = {name: sympy.Symbol(letter, positive=True) for name, letter in LETTERS.items()}
    if known["query_len"] == known["key_len"]:
        letters["query_len"] = letters["key_len"]
    if known["query_len"] == 1:
        letters["query_len"] = sympy.Integer(1)
    at = {letter: known[name] for name, letter in letters.items()}
    fixed = {name: known[name] for name in _DIMS} | {"dtype": s.dtype, "causal": s.causal, "window": s.window}
    return "; ".join(_words(one, device, tuple(at.items())) for one in build(AttentionSizes(**letters, **fixed)))


def expected(build: Callable[[AttentionSizes], Iterable[Work]], site: AttentionSite | AttentionSizes, device: Device) -> float | None:
    """A candidate's seconds at the example's sizes; None where the site does not tell them. Installs no guard."""
    s, known = sizes_of(site), example(site)
    if not {*LETTERS, *_DIMS} <= set(known):
        return None
    return float(seconds(build(AttentionSizes(**known, dtype=s.dtype, causal=s.causal, window=s.window)), device))


@functools.lru_cache(maxsize=1024)
def _words(one: Work, device: Device, example: tuple[tuple[sympy.Symbol, float], ...]) -> str:
    cost, at = seconds(one, device), dict(example)
    return f"{one.family} {in_units(float(_at(cost, at)))}: {_short(_settled(cost, at))}"


def example(site: Any) -> dict[str, int]:
    """The example's batch, heads, lengths and head dims by field, of those that the site tells: a symbolic size by its hint.

    Reading a hint installs no guard, so that what follows from it must not change a result.
    """
    found = {name: value for name in (*LETTERS, *_DIMS) if isinstance(value := getattr(site, name), int)}
    if isinstance(site, AttentionSizes):
        return found
    heads = {"query": "query_heads", "key": "kv_heads", "value": "kv_heads"}
    lengths, dims = {"query": "query_len", "key": "key_len"}, {"query": "qk_head_dim", "value": "v_head_dim"}
    for operand in heads:
        value = getattr(site, operand).meta.get("example_value")
        names = ("batch", heads[operand], lengths.get(operand), dims.get(operand))
        for name, size in zip(names, () if value is None else value.shape, strict=False):
            hint = size.node.hint if isinstance(size, torch.SymInt) else size
            if name and name not in found and hint is not None:
                found[name] = int(hint)
    return found


def _settled(expr: sympy.Expr, at: dict[sympy.Symbol, float]) -> sympy.Expr:
    """The expression with every maximum and minimum replaced by the argument that it takes at these values."""
    if not expr.args:
        return expr
    args = [_settled(arg, at) for arg in expr.args]
    if isinstance(expr, sympy.Max | sympy.Min):
        choose = max if isinstance(expr, sympy.Max) else min
        return choose(args, key=lambda arg: float(_at(arg, at)))
    return expr.func(*args)


def _short(expr: sympy.Expr) -> str:
    """A sum with two digits to a number, the largest powers first."""
    text = str(sympy.N(sympy.expand(expr), 2))
    for power in (4, 2):
        text = text.replace(f"**{power}", {4: "⁴", 2: "²"}[power])
    return text.replace("**", "^").replace("*", "·")


def in_units(value: float) -> str:
    """Seconds as people read them."""
    for unit, scale in (("s", 1.0), ("ms", 1e-3)):
        if value >= scale:
            return f"{value / scale:.3g} {unit}"
    return f"{value * 1e6:.3g} µs"
