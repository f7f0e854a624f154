"""Lengths at which one candidate overtakes another, solved from the cost formulas. Plans turn them into guards: three regimes at most.

A difference of two costs without Max and Min is a polynomial in the length, and its roots are found in closed form; any other is bisected.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import sympy

from sparsify.costs import work
from sparsify.costs.device import Device
from sparsify.costs.seconds import attention_seconds, expected_density, seconds
from sparsify.costs.sizes import AttentionSizes
from sparsify.ops.estimate import EXACT, Estimate, Pool
from sparsify.ops.limits import cdiv

LONGEST = 4096 * 1024  # tokens: where block lists' int16 indices end
STEP = 1024  # lengths are multiples of this, so that measuring noise does not move a guard

# A lossy method acts by default only where it takes at most this share of dense attention's time (`max_cost_ratio` in the configuration):
# less is no price for an answer.
MAX_COST_RATIO = 0.5

# Another exact kernel is worth a compiled graph of its own where it takes at most this share of attention's time, and saves what the host
# needs more for it: so many launches' time, since it is launched from Python.
EXACT_WORTH, EXACT_LAUNCHES = 0.97, 3

LENGTH = sympy.Symbol("n", integer=True, positive=True)


def solve_from(gain: sympy.Expr, step: int = STEP, longest: int = LONGEST) -> int:
    """Smallest multiple of `step` from which `gain`, an expression in `LENGTH`, is positive up to `longest`; `longest` where it never is.

    Roots of polynomials are solved for; anything with Max or Min is bisected between powers of two at which the sign is looked up.
    """
    roots = _roots(gain)
    at = sympy.lambdify(LENGTH, gain, "math")
    if roots is not None:
        above = [n for n in roots if 0 < n < longest]
        last = max(above, default=0.0)
        start = min(longest, max(step, cdiv(int(last + 1), step) * step))
        return start if at(start) > 0 else longest
    return _bisect(at, step, longest)


def _roots(gain: sympy.Expr) -> list[float] | None:
    """Real roots of a polynomial of degree 4 at most; None for anything else."""
    if gain.has(sympy.Max, sympy.Min) or not gain.is_polynomial(LENGTH):
        return None
    polynomial = sympy.Poly(gain, LENGTH)
    if not 0 < polynomial.degree() <= 4:
        return None
    return [float(sympy.re(root)) for root in polynomial.nroots() if abs(sympy.im(root)) < 1e-6 * (1 + abs(root))]


def _bisect(at: Callable[[int], float], step: int, longest: int) -> int:
    if at(longest) <= 0:
        return longest
    low, high = 0, longest // step  # the gain is positive at high; the last power of two where it is not bounds the sign change
    tried = high
    while tried >= 1:
        if at(tried * step) <= 0:
            low = tried
            break
        high = tried
        tried //= 2
    while high > low + 1:
        middle = (low + high) // 2
        low, high = (low, middle) if at(middle * step) > 0 else (middle, high)
    return high * step


def _prompt(head_dim: int, heads: tuple[int, int], batch: int) -> AttentionSizes:
    return AttentionSizes(batch, *heads, LENGTH, LENGTH, head_dim, head_dim)


def fastest_dense(sizes: AttentionSizes, device: Device, kernel: str) -> sympy.Expr:
    """Seconds of dense attention by SDPA or by our own kernel, whichever is faster at a length; SDPA has no causal chunks."""
    names = dict.fromkeys(("sdpa", kernel) if sizes.query_len == sizes.key_len else (kernel,))
    return work.smallest(*(attention_seconds(sizes, device, kernel=name) for name in names))


@functools.cache
def sparse_from(
    device: Device,
    stride: int,
    block: int,
    head_dim: int,
    density: float | None,
    kernel: str,
    estimate: Estimate = EXACT,
    pool: Pool = "max",
    heads: tuple[int, int] = (32, 8),
    batch: int = 1,
    max_cost_ratio: float | None = None,
    query_len: int | None = None,
    last_rows: int = 0,
    refine_stride: int = 0,
) -> int:
    """Smallest key length (a multiple of 1024 tokens) from which estimate, selection and block-sparse attention together take at most
    `max_cost_ratio` of dense attention's time. By default that is MAX_COST_RATIO, at the density expected for a length; with a density
    given, whatever beats dense is worth it.

    Args:
        query_len: rows of a chunk; None: a whole prompt.
        last_rows: rows that dense attention serves besides.
        refine_stride: of a second stage of the estimate; 0: none.
    """
    sizes = _prompt(head_dim, heads, batch)
    if query_len is not None:
        sizes = dataclasses.replace(sizes, query_len=work.smallest(query_len, LENGTH))
    share = expected_density(LENGTH) if density is None else sympy.Float(density)
    if max_cost_ratio is None:
        max_cost_ratio = MAX_COST_RATIO if density is None else 1.0
    sparse = seconds(work.selections(sizes, stride, block, estimate, pool, refine_stride, share), device)
    sparse += seconds(work.attention(sizes, kernel, share=share, listed=True), device)
    if last_rows:
        last = dataclasses.replace(sizes, query_len=work.smallest(last_rows, sizes.query_len))
        sparse += seconds(work.attention(last, kernel), device)
    return solve_from(max_cost_ratio * fastest_dense(sizes, device, kernel) - sparse)


@functools.cache
def kernel_from(device: Device, kernel: str, head_dim: int, heads: tuple[int, int] = (32, 8), batch: int = 1) -> int:
    """Smallest prompt length from which our exact kernel is enough faster than SDPA to deserve a graph of its own."""
    sizes = _prompt(head_dim, heads, batch)
    ours, sdpa = (attention_seconds(sizes, device, kernel=name) for name in (kernel, "sdpa"))
    return solve_from(EXACT_WORTH * sdpa - ours - EXACT_LAUNCHES * device.launch)
