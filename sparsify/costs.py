"""FLOPs, bytes and seconds of every candidate at a site, as sympy expressions in batch and lengths.

A roofline: seconds = max(FLOPs / (ceiling · efficiency), bytes / bandwidth) + launches. Causal work counts half of the
query × key rectangle plus what a chunk sees before its own keys.
"""

from __future__ import annotations

import functools

import sympy

from sparsify.hardware import Device
from sparsify.sites import AttentionSite, FeedForwardSite

# Share of the matrix ceiling that each kernel family sustains, from benchmarks/results on an H200.
EFFICIENCY = {"sdpa": 0.86, "hopper": 0.95, "triton": 0.62, "reference": 0.05, "estimate": 0.9}

# A lossy method acts by default only where it takes at most this share of dense attention's time: less is no price for an answer.
_WORTH = 0.5

_LENGTH = sympy.Symbol("n", integer=True, positive=True)


def visited(site: AttentionSite, window: int | None = None) -> sympy.Expr:
    """Query-key pairs a head computes: the causal part of the rectangle, or the band of a window."""
    rows, keys = sympy.sympify(site.query_len), sympy.sympify(site.key_len)
    pairs = rows * (keys - rows / 2) if site.mask.causal else rows * keys
    band = window or site.mask.window
    return sympy.Min(pairs, rows * sympy.Min(band, keys)) if band else pairs


def roofline(flops: sympy.Expr, size: sympy.Expr, device: Device, efficiency: float, launches: int) -> sympy.Expr:
    """Seconds for `flops` FLOPs and `size` bytes in `launches` kernels."""
    return sympy.Max(flops / (device.flops * efficiency), size / device.bandwidth) + launches * device.launch


def operand_bytes(site: AttentionSite) -> sympy.Expr:
    """Bytes of Q, K, V and the output, each moved once."""
    query = site.query_heads * site.query_len * (site.qk_head_dim + site.v_head_dim)
    cache = site.kv_heads * site.key_len * (site.qk_head_dim + site.v_head_dim)
    return sympy.sympify(site.batch * (query + cache) * site.dtype.itemsize)


def attention_seconds(
    site: AttentionSite, device: Device, *, share: float = 1.0, window: int | None = None, kernel: str = "triton"
) -> sympy.Expr:
    """Attention over `share` of the visited pairs."""
    flops = 2 * site.batch * site.query_heads * visited(site, window) * (site.qk_head_dim + site.v_head_dim) * share
    return roofline(sympy.sympify(flops), operand_bytes(site), device, EFFICIENCY[kernel], 1)


def estimate_seconds(site: AttentionSite, device: Device, stride: int, block: int) -> sympy.Expr:
    """Antidiagonal estimate and selection: 1/stride of QKᵀ, and block sums written and read once (fp16)."""
    flops = 2 * site.batch * site.query_heads * visited(site) * site.qk_head_dim / stride
    sums = 4 * site.batch * site.query_heads * visited(site) / (stride * block)
    return roofline(sympy.sympify(flops), operand_bytes(site) + sums, device, EFFICIENCY["estimate"], 2)


def ffn_seconds(site: FeedForwardSite, device: Device, share: float = 1.0) -> sympy.Expr:
    """A feed-forward block of which `share` of the calls is computed: its weights are streamed once for all rows."""
    size = sympy.sympify(site.weight_bytes) * share
    flops = 2 * site.rows * size / site.dtype.itemsize
    return roofline(sympy.sympify(flops), size, device, EFFICIENCY["sdpa"], 3)


def expected_density(length: sympy.Expr) -> sympy.Expr:
    """Share of causal blocks kept at a threshold of .95: a power law through the densities published for stride 8 between 8K and 128K
    tokens (arXiv 2503.16428, table of RULER densities: 43.8 % to 6.9 %)."""
    return sympy.Min(1, sympy.Rational(44, 100) * (8192 / length) ** sympy.Rational(2, 3))


@functools.cache
def antidiagonal_crossover(device: Device, stride: int, block: int, head_dim: int, density: float | None, kernel: str = "triton") -> int:
    """Smallest prompt length (a multiple of 1024 tokens) from which estimate + block-sparse attention is expected to halve dense
    attention's time; with a density given, to beat it.

    Solved per head on the formulas above for a causal prefill of n tokens; launches are shared by 32 heads.
    """
    pairs = _LENGTH * _LENGTH / 2
    dense = 4 * pairs * head_dim / (device.flops * max(EFFICIENCY["sdpa"], EFFICIENCY[kernel]))
    share = expected_density(_LENGTH) if density is None else sympy.Float(density)
    sparse = 4 * pairs * head_dim * share / (device.flops * EFFICIENCY[kernel])
    sparse += 2 * pairs * head_dim / stride / (device.flops * EFFICIENCY["estimate"]) + 3 * device.launch / 32
    worth = _WORTH if density is None else 1  # who asks for a density has decided what it is worth
    gain = sympy.lambdify(_LENGTH, dense * worth - sparse)
    low, high = 1, 4096
    if gain(high * 1024) <= 0:
        return high * 1024
    while high > low:  # the gain changes sign once: dense grows faster
        middle = (low + high) // 2
        low, high = (low, middle) if gain(middle * 1024) > 0 else (middle + 1, high)
    return high * 1024


def number(expr: sympy.Expr, hints: dict[sympy.Symbol, int]) -> float | None:
    """The expression at the example's sizes; None when a symbol has no hint."""
    value = sympy.sympify(expr).subs(hints)
    return float(value) if value.is_number else None
