"""Seconds of every candidate at a site, as sympy expressions in batch, lengths, heads and density.

    seconds = call + rows · tiles / processors + work / efficiency + … , never less than the bytes that must move take

`sparsify.costs.work` counts what a candidate does; a device's profile says what that costs (`sparsify.costs.profile` lists the terms).
Estimate, selection and attention are works of their own. `sparsify.costs.crossovers` solves for lengths.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, cast

import sympy
import torch

from sparsify.costs import work
from sparsify.costs.device import Device
from sparsify.costs.sizes import AttentionSizes, FeedForwardSizes, Size
from sparsify.costs.work import Work
from sparsify.ops.estimate import EXACT, Estimate

Share = float | sympy.Expr  # of blocks or of calls, from 0 to 1

# What the host needs for a compiled decode step that is waited for, in launches' times: guards, the graph's launch and the token's way back
# (8B decode in benchmarks/results, beside the same steps in one go).
STEP_LAUNCHES = 120
# Kernels between the matrix products of a layer's decode step: two norms with their residual sums, the rotation, the cache's store and
# the activation.
SMALL_KERNELS = 5

# How formulas write sizes: batch, query and KV heads, query and key length.
_LETTERS = {"batch": "B", "query_heads": "H", "kv_heads": "G", "query_len": "Q", "key_len": "N"}


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


def attention_seconds(
    sizes: AttentionSizes,
    device: Device,
    *,
    share: Share = 1,
    window: Size | None = None,
    kernel: str = "triton",
    listed: bool | None = None,
) -> sympy.Expr:
    """Attention over `share` of the blocks that a row could visit; by block lists (`listed`) where that is less than all of them."""
    listed = share != 1 if listed is None else listed
    return seconds(work.attention(sizes, kernel, share=share, window=window, listed=listed), device)


def decode_seconds(sizes: AttentionSizes, device: Device, *, kernel: str = "cache", kept: Size | None = None) -> sympy.Expr:
    """One query row of each sequence over `kept` keys; `kernel` "cache" is sparsify's step over a cache's slots, "sdpa" torch's own."""
    return seconds(work.decode(sizes, kernel, kept), device)


def estimate_seconds(sizes: AttentionSizes, device: Device, stride: int, block: int = 128, estimate: Estimate = EXACT) -> sympy.Expr:
    """Antidiagonal scores, the choice of blocks and their lists."""
    return seconds(work.selection(sizes, stride, block, estimate), device)


def feed_forward_seconds(sizes: FeedForwardSizes, device: Device, share: Share = 1) -> sympy.Expr:
    """A feed-forward block of which `share` of the calls is computed: few rows stream its weights once for all of them."""
    streamed = seconds(work.skipped_ffn(sizes.rows, sizes.weight_bytes, sizes.dtype, share), device)
    flops = Work("linear", sizes.dtype, flops=sympy.sympify(2 * sizes.rows * sizes.weight_bytes * share / sizes.dtype.itemsize))
    return work.largest(streamed, seconds(flops, device))


def feed_forward_in_parts_seconds(sizes: FeedForwardSizes, device: Device, part_rows: int) -> sympy.Expr:
    """A feed-forward block for `part_rows` rows at a time: its products, the activation's own pass over what they give, and launches."""
    moved = sizes.matrices * sympy.sympify(sizes.rows) * sizes.intermediate * sizes.dtype.itemsize
    launches = (sizes.matrices + 1) * sympy.ceiling(sympy.sympify(sizes.rows) / part_rows)
    return feed_forward_seconds(sizes, device) + moved / device.bandwidth + launches * device.launch


def linear_seconds(device: Device, rows: Size, inputs: Size, outputs: Size, dtype: torch.dtype = torch.bfloat16) -> sympy.Expr:
    """One linear layer over `rows` tokens: a matrix product, or the stream of its weight where there are few rows."""
    return work.largest(
        seconds(work.linear(rows, inputs, outputs, dtype), device), seconds(work.stream(rows, inputs, outputs, dtype), device)
    )


@functools.lru_cache(maxsize=1024)
def expected_density(length: sympy.Expr) -> sympy.Expr:
    """Share of causal blocks to expect of a lossless choice: a power law through the densities published for the sum rule, stride 8 and a
    threshold of .95 between 8K and 128K tokens (arXiv 2503.16428, table of RULER densities: 43.8 % to 6.9 %)."""
    return work.smallest(1, sympy.Rational(44, 100) * (8192 / length) ** sympy.Rational(2, 3))


def value_at(expr: sympy.Expr, hints: Mapping[sympy.Symbol, int]) -> float | None:
    """The expression at the example's sizes; None when a symbol has no hint."""
    value = _substituted(sympy.sympify(expr), hints)
    return float(value) if value.is_number else None


def _substituted(expr: sympy.Expr, values: Mapping[Any, float]) -> sympy.Expr:
    """The expression with all symbols replaced at once, which never compares half of a maximum's arguments with the rest."""
    return expr.xreplace({symbol: sympy.sympify(value) for symbol, value in values.items()})


def formula(works: Callable[[AttentionSizes], Iterable[Work]], example: AttentionSizes, device: Device) -> str:
    """A candidate's seconds in letters and in numbers, kernel by kernel: B batch, H and G query and KV heads, Q and N query and key length.

    What a maximum or minimum comes to at the example's sizes is what is shown: `hopper/causal 54.6 ms: 7.7e-13·B·H·N² + 6.0e-6`.

    Args:
        works: what the candidate does, from sizes.
        example: the example's sizes; there is no text where one of them is unknown, or nothing.
    """
    if not example.numeric:
        return ""
    known = {name: getattr(example, name) for name in _LETTERS}
    if not all(known.values()):  # what is divided among so many has no seconds
        return ""
    letters: dict[str, sympy.Expr] = {name: sympy.Symbol(letter, positive=True) for name, letter in _LETTERS.items()}
    if known["query_len"] == known["key_len"]:
        letters["query_len"] = letters["key_len"]
    if known["query_len"] == 1:
        letters["query_len"] = sympy.Integer(1)
    values = {letter: known[name] for name, letter in letters.items()}
    return "; ".join(_work_text(one, device, tuple(values.items())) for one in works(dataclasses.replace(example, **letters)))


@functools.lru_cache(maxsize=1024)
def _work_text(one: Work, device: Device, example: tuple[tuple[sympy.Expr, float], ...]) -> str:
    cost, values = seconds(one, device), dict(example)
    return f"{one.family} {in_units(float(_substituted(cost, values)))}: {_short(_settled(cost, values))}"


def _settled(expr: sympy.Expr, values: Mapping[sympy.Expr, float]) -> sympy.Expr:
    """The expression with every maximum and minimum replaced by the argument that it takes at these values."""
    if not expr.args:
        return expr
    args = [_settled(cast(sympy.Expr, arg), values) for arg in expr.args]
    if isinstance(expr, sympy.Max | sympy.Min):
        choose = max if isinstance(expr, sympy.Max) else min
        return choose(args, key=lambda arg: float(_substituted(arg, values)))
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
