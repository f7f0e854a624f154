"""What every candidate at a site does: FLOPs, bytes, tiles and launches as sympy expressions in batch, lengths, heads and density.

Nothing here knows how fast a device is. `features` turns a candidate's work into the terms whose coefficients a profile holds, and
`sparsify.costs.seconds` adds them up.

Conventions: a head's keys and values are cut into blocks of 128, rows into tiles of 128; the diagonal is computed as whole blocks. FLOPs
count both products, 2 · pairs · (qk_head_dim + v_head_dim). Causal pairs of Q rows over N keys, the last row on the last key: Q·(N - Q/2).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from dataclasses import dataclass
from typing import Any

import sympy
import torch

from sparsify.costs.device import Device
from sparsify.costs.sizes import AttentionSizes, Size
from sparsify.ops import quantised
from sparsify.ops.estimate import EXACT, Estimate, Pool
from sparsify.ops.limits import cdiv, score_tile
from sparsify.ops.pages import GROUP, Clusters, Pages
from sparsify.ops.streaming import faster, too_long

TILE = 128  # query rows of a tile and keys of a block, in every attention kernel that the model knows
# kernels before prepared cells are multiplied: over queries and over keys, and before 8 bits the keys' mean (a sum, a quotient, a check)
_ROUNDING_PASSES, _MERGING_PASSES = 5, 2
# kernels whose decode step cuts the keys of one head into splits for many processors
_SPLITTING = {"sdpa", "cache", "masked", "split"}
_MOST_SPILL = 8
# passes over scores that are made whole: product, mask, softmax, sums, in fp32
SCORE_PASSES = 7
_ZERO = sympy.Integer(0)


def largest(*args: Any) -> sympy.Expr:
    """The maximum, without the simplification that takes sympy milliseconds to seconds."""
    return _extreme(sympy.Max, args)


def smallest(*args: Any) -> sympy.Expr:
    """The minimum, likewise."""
    return _extreme(sympy.Min, args)


def _extreme(kind: type, args: tuple[Any, ...]) -> sympy.Expr:
    terms = [sympy.sympify(arg) for arg in args]
    return kind(*terms, evaluate=all(term.is_number for term in terms))


@dataclass(frozen=True)
class Work:
    """What one kernel, or the kernels of one step, does.

    family: whose coefficients apply, `kernel/kind`.
    dtype: of the operands.
    flops: matrix FLOPs of whole tiles.
    longest: FLOPs of the longest tile, which one processor computes alone.
    scores: softmax entries.
    masses: of cells over key blocks, each compared with one cutoff after the other.
    flops8: operations on 8-bit numbers.
    size: bytes that must move.
    stream: of those, bytes that one processor reads alone.
    scratch: bytes of scratch.
    prepare: bytes that kernels over the operands move before the main one.
    passes: how many kernels those are.
    steps: loads that a program waits for one after the other.
    rows: row tiles.
    tiles: tiles that all take as long as the longest, one at a time on a processor.
    kept: bytes of one KV head's keys and values, which rows read again and again; 0 where nothing is read twice.
    """

    family: str
    dtype: torch.dtype = torch.bfloat16
    flops: sympy.Expr = _ZERO
    longest: sympy.Expr = _ZERO
    scores: sympy.Expr = _ZERO
    masses: sympy.Expr = _ZERO
    flops8: sympy.Expr = _ZERO
    size: sympy.Expr = _ZERO
    stream: sympy.Expr = _ZERO
    scratch: sympy.Expr = _ZERO
    prepare: sympy.Expr = _ZERO
    passes: int = 0
    steps: int = 0
    rows: sympy.Expr = _ZERO
    tiles: sympy.Expr = _ZERO
    kept: sympy.Expr = _ZERO

    def features(self, device: Device) -> dict[str, sympy.Expr]:
        """The terms that a profile has coefficients for, in seconds but for `call` and `rows`; see `sparsify.costs.profile`."""
        ceiling = device.matrix_flops(self.dtype)
        even, alone = self.flops / ceiling, self.longest * device.processors / ceiling
        work, eight, tail = even, self.flops8 / (2 * ceiling), self.stream * device.processors / device.bandwidth
        if self.tiles != 0:
            waves = sympy.ceiling(self.tiles / device.processors) * alone
            work, eight = (_ZERO, waves / 2) if self.flops8 != 0 else (waves, _ZERO)
        elif alone != 0 and self.rows != 0:  # an empty batch has no rows
            work, tail = largest(even, alone), _tail(even, alone, self.rows / device.processors)
        # half of the cache: the other half holds what else is in flight; at eight times that, all that can miss does
        times = 2 * self.kept / device.l2_bytes
        missed = sympy.log(largest(1, smallest(_MOST_SPILL, times))) / math.log(2) if self.kept != 0 else _ZERO
        found = {
            "call": sympy.Integer(1),
            "work": work,
            "scores": self.scores / ceiling,
            "masses": self.masses / ceiling,
            "work8": eight,
            "bytes": self.size / device.bandwidth,
            "scratch": self.scratch / device.bandwidth,
            "prepare": self.prepare / device.bandwidth,
            "passes": sympy.Integer(self.passes),
            "steps": sympy.Integer(self.steps),
            "rows": self.rows / device.processors,
            "tail": tail,
            "spill": work * missed,
        }
        return {name: term for name, term in found.items() if term != 0}


def _tail(even: sympy.Expr, alone: sympy.Expr, waves: sympy.Expr) -> sympy.Expr:
    """How long processors wait at the end of a causal launch, at worst: the longest tile's time, less the fewer tiles a processor has.

    Rows of a causal tile grow evenly, so that one wave holds half of its longest tile's work on average.

    Args:
        even: seconds when all processors share the work.
        alone: seconds of the longest tile.
        waves: tiles a processor; with one or none, `alone` is all the launch takes.
    """
    return largest(0, alone * (1 - 1 / (2 * waves)) - largest(0, alone - even))


def pairs(sizes: AttentionSizes, window: Size | None = None) -> sympy.Expr:
    """Query-key pairs of one head: the causal part of the rectangle, or the band of a window."""
    rows, keys = sympy.sympify(sizes.query_len), sympy.sympify(sizes.key_len)
    every = rows * (keys - rows / 2) if sizes.causal else rows * keys
    return every - _beyond(sizes, window or sizes.window, 0)


def _beyond(sizes: AttentionSizes, band: Size | None, margin: Size) -> sympy.Expr:
    """Pairs that a band of keys takes from the causal ones: those further back than `band + margin` keys."""
    if not band:
        return _ZERO
    rows, keys = sympy.sympify(sizes.query_len), sympy.sympify(sizes.key_len)

    def past(position: sympy.Expr) -> sympy.Expr:
        return largest(0, position - band - margin)

    if not sizes.causal:
        return rows * past(keys)
    return (past(keys) ** 2 - past(keys - rows) ** 2) / 2


def computed_pairs(sizes: AttentionSizes, window: Size | None = None) -> sympy.Expr:
    """Pairs of the blocks that a head visits: the diagonal and a window's edges count as whole blocks."""
    rows, keys = sympy.sympify(sizes.query_len), sympy.sympify(sizes.key_len)
    rows = largest(rows, TILE) if not rows.is_number or rows < TILE else rows
    every = rows * (keys - rows / 2 + sympy.Rational(TILE, 2)) if sizes.causal else rows * keys
    # both edges of a band cut blocks, and the sinks are one more; the diagonal's half block is in `every`
    return every - _beyond(sizes, window or sizes.window, 2 * TILE - TILE // 2)


def attention(sizes: AttentionSizes, kernel: str, *, share: Any = 1, window: Size | None = None, listed: bool = False) -> Work:
    """Attention over `share` of the blocks that a row could visit.

    Args:
        kernel: "sdpa", "hopper", "triton", "cpp" or "reference".
        share: of the blocks.
        window: keys a row sees besides what the site's own mask says, sinks included, tokens.
        listed: along block lists, with `share` the density over causal blocks.
    """
    return _attention(sizes, kernel, share, window, listed)


# sympy's Max takes milliseconds, and the layers of a model are alike
@functools.lru_cache(maxsize=1024)
def _attention(s: AttentionSizes, kernel: str, share: Any, window: Size | None, listed: bool) -> Work:
    if s.query_len == 1:
        return decode(s, step_kernel(kernel))
    band = window or s.window
    kind = "lists" if listed else "window" if band else "causal"
    heads, dims = s.batch * s.query_heads, s.qk_head_dim + s.v_head_dim
    visited = computed_pairs(s, window) * share
    longest = smallest(s.key_len, band + 2 * TILE) if band else sympy.sympify(s.key_len)
    return Work(
        family=f"{kernel}/{kind}",
        dtype=s.dtype,
        flops=sympy.sympify(2 * heads * visited * dims),
        longest=sympy.sympify(2 * TILE * longest * dims * share),
        scores=sympy.sympify(heads * visited),
        size=s.operand_bytes,
        rows=sympy.sympify(heads * s.query_len) / TILE,
        kept=_ZERO if band else sympy.sympify(s.key_len * dims * s.dtype.itemsize),
    )


def step_kernel(kernel: str) -> str:
    """What serves a decode step where a kernel serves prompts: all but one of a tile's 128 rows would be empty. Keys are split, or read
    by the reference."""
    return {"hopper": "split", "triton": "split", "cpp": "reference"}.get(kernel, kernel)


def decode(s: AttentionSizes, kernel: str, kept: Size | None = None) -> Work:
    """One query row of each sequence over `kept` keys (default: all of them): keys and values are read once."""
    slots = sympy.sympify(s.key_len if kept is None else kept)
    slots = smallest(slots, s.window) if s.window else slots
    read = s.batch * s.kv_heads * slots * (s.qk_head_dim + s.v_head_dim)
    return Work(
        family=f"{kernel}/decode",
        dtype=s.dtype,
        size=sympy.sympify(read * s.dtype.itemsize),
        stream=_ZERO if kernel in _SPLITTING else sympy.sympify(slots * (s.qk_head_dim + s.v_head_dim) * s.dtype.itemsize),
        rows=sympy.sympify(s.batch * s.kv_heads),
    )


def code_reading(s: AttentionSizes, codes: str) -> Work:
    """One query row of each sequence over keys and values in few bits, scales included."""
    return _in_codes(decode(s, "cache"), s, codes)


def _in_codes(whole: Work, s: AttentionSizes, codes: str) -> Work:
    """The same keys and values in few bits."""
    dims = int(s.qk_head_dim), int(s.v_head_dim)
    share = quantised.token_bytes(*dims, codes, s.dtype) / quantised.token_bytes(*dims, "", s.dtype)
    return dataclasses.replace(whole, size=whole.size * sympy.Rational(round(share * 1000), 1000))


def page_reading(s: AttentionSizes, pages: Pages, codes: str = "") -> tuple[Work, Work]:
    """One query row of each sequence over some pages of its keys: the bounds of all of them are read, which are 16-bit numbers beside codes
    too, then what is chosen. Of clusters the means of all groups are read, and those of the clusters of some; what came after the prefix,
    which is read whole, is not counted."""
    slots = sympy.sympify(s.key_len)
    looked_at: Any = 2
    if isinstance(pages, Clusters):
        share = sympy.Rational(pages.parts * max(1, pages.reach), 10**6)
        reached = pages.count * pages.reach * pages.size / slots if pages.count else share
        looked_at = smallest(sympy.Integer(1), sympy.Rational(1, GROUP) + reached) if pages.reach else 1
    # both ends of each channel, a page at a time
    bounds = Work(
        family="cache/decode",
        dtype=s.dtype,
        size=sympy.sympify(s.batch * s.kv_heads * looked_at * s.qk_head_dim * s.dtype.itemsize * slots / pages.size),
        rows=sympy.sympify(s.batch * s.kv_heads),
    )
    chosen = sympy.Integer(pages.count * pages.size) if pages.count else slots * sympy.Rational(pages.parts, 10**6)
    read = decode(s, "cache", smallest(slots, chosen + pages.sinks + pages.recent))
    return bounds, _in_codes(read, s, codes) if codes else read


def selection(sizes: AttentionSizes, stride: int, block: int = 128, estimate: Estimate = EXACT, pool: Pool = "max", share: Any = 1) -> Work:
    """Antidiagonal scores, the choice of blocks from them, and their lists (arXiv 2503.16428).

    Args:
        pool: how a query block's cells are combined.
        share: of the causal blocks that are scored at all: those that an earlier, coarser stage lists.
    """
    streamed = faster(pool, estimate, stride, sizes.qk_head_dim) and not estimate.group and not _too_long(sizes.key_len, block)
    return _selection(sizes, stride, block, estimate, pool, share, streamed)


# blocks that a coarse list holds for one that the finer stage keeps, on models that were measured
LISTED = 3


def selections(
    sizes: AttentionSizes,
    stride: int,
    block: int,
    estimate: Estimate,
    pool: Pool,
    refine_stride: int = 0,
    share: Any = 1,
    listed: Any = None,
) -> tuple[Work, ...]:
    """`selection` in one stage or two.

    Args:
        refine_stride: of the second stage; 0: there is one.
        share: of the causal blocks that are kept in the end.
        listed: of the causal blocks, what the first of two stages lists; None: `LISTED` times what is kept.
    """
    if not refine_stride or _too_long(sizes.key_len, block):
        return (selection(sizes, refine_stride or stride, block, estimate, pool),)
    if listed is None:
        listed = smallest(1, LISTED * share)
    # of 16 bits nothing was measured where keys pass by: the other kernels' products stand in
    first = _selection(sizes, stride, block, estimate, pool, 1, estimate.int8)
    second = _selection(sizes, refine_stride, block, estimate, pool, listed, estimate.int8)
    # cells are made once for both stages, but for those of every second query cell, which are others
    return first, second if estimate.half else dataclasses.replace(second, prepare=_ZERO, passes=0)


def _too_long(key_len: Size, block: int) -> bool:
    """A length that nobody knows yet is none."""
    length = sympy.sympify(key_len)
    return bool(length.is_number) and too_long(cdiv(int(length), block))


@functools.lru_cache(maxsize=1024)
def _selection(s: AttentionSizes, stride: int, block: int, estimate: Estimate, pool: Pool, share: Any, streamed: bool) -> Work:
    """streamed: by the kernels whose query cells stay while keys pass by, which have no waves of equal tiles and take all cells of a query
    block together."""
    span = estimate.span(stride)
    scored = s.batch * estimate.scored_heads(s.query_heads, s.kv_heads)
    rows, columns = sympy.sympify(s.query_len) / span, sympy.sympify(s.key_len) / stride
    tile_rows, tile_columns, at_once = score_tile(estimate.int8)
    # causal cells; the column tile that the diagonal cuts is computed whole
    start = columns - rows * span / stride
    cells = rows * (start + (columns - start) / 2 + sympy.Rational(tile_columns, 2)) if s.causal else rows * columns
    cells = cells * share
    depth = sympy.Rational(stride, estimate.merge) * s.qk_head_dim
    flops = sympy.sympify(2 * scored * cells * depth)
    blocks = sympy.sympify(s.query_len) / block
    masses = rows * sympy.sympify(s.key_len) / block / (2 if s.causal else 1) * share
    sums = scored * masses * 2  # fp16
    lists = s.batch * s.query_heads * blocks * sympy.sympify(s.key_len) / block / (2 if s.causal else 1) * 2  # int16
    tile = 2 * at_once * tile_rows * tile_columns * depth
    return Work(
        family="select/streamed" if streamed else "select",
        dtype=s.dtype,
        flops=_ZERO if estimate.int8 else flops,
        flops8=flops if estimate.int8 else _ZERO,
        scores=sympy.sympify(scored * cells) * sympy.Rational(estimate.entry.numerator, estimate.entry.denominator),
        # every query head bisects each of its cells' masses
        masses=sympy.sympify(s.batch * s.query_heads * masses) if pool == "row" else _ZERO,
        longest=_ZERO if streamed else sympy.sympify(tile),
        tiles=_ZERO if streamed else sympy.sympify(scored * cells) / (at_once * tile_rows * tile_columns),
        size=s.operand_bytes / 2,
        scratch=2 * sums + lists,
        prepare=_prepared(s, span // stride, scored, estimate),
        passes=_ROUNDING_PASSES if estimate.int8 else _MERGING_PASSES if estimate.prepared else 0,
        steps=0 if streamed else block // span,
        rows=sympy.sympify(s.batch * s.query_heads) * blocks,
    )


def _prepared(s: AttentionSizes, skipped: int, scored: Size, estimate: Estimate) -> sympy.Expr:
    """Bytes that passes over queries and keys move before the product: the group's mean, means of neighbours and rounding to 8 bits."""
    queries, keys = s.query_len * s.qk_head_dim, s.batch * s.kv_heads * s.key_len * s.qk_head_dim
    item, moved = s.dtype.itemsize, _ZERO
    if estimate.group:
        moved += (s.batch * s.query_heads + scored) * queries * item
    eight = estimate.int8
    if estimate.prepared:  # with 8 bits the keys are read twice, once for their mean
        written = sympy.Rational(1 if eight else item, estimate.merge)
        moved += scored * queries * (item + written) / skipped + keys * ((2 if eight else 1) * item + written)
    return sympy.sympify(moved)


def pattern_choice(sizes: AttentionSizes, queries: int) -> Work:
    """What the last rows look at, by column and by diagonal. queries: how many of them."""
    keys = sizes.batch * sizes.kv_heads * sizes.key_len * sizes.qk_head_dim * sizes.dtype.itemsize
    return elementwise(keys + 4 * SCORE_PASSES * sizes.batch * sizes.query_heads * queries * sizes.key_len)


def listed_share(blocks: int, block: int, key_len: Any) -> sympy.Expr:
    """Of a prompt's causal blocks, those that a head visits of which every query block lists `blocks`, of `block` tokens."""
    return smallest(1, 2 * blocks * block / sympy.sympify(key_len))


def linear(rows: Size, inputs: Size, outputs: Size, dtype: torch.dtype = torch.bfloat16) -> Work:
    """A matrix product of activations [rows, inputs] with a weight [outputs, inputs] when there are many rows."""
    moved = (rows * (inputs + outputs) + inputs * outputs) * dtype.itemsize
    return Work("linear", dtype, flops=sympy.sympify(2 * rows * inputs * outputs), size=sympy.sympify(moved))


def stream(rows: Size, inputs: Size, outputs: Size, dtype: torch.dtype = torch.bfloat16) -> Work:
    """The same with few rows: the weight is streamed from memory once for all of them."""
    moved = (rows * (inputs + outputs) + inputs * outputs) * dtype.itemsize
    return Work("stream", dtype, size=sympy.sympify(moved))


def skipped_ffn(rows: Size, weight_bytes: Size, dtype: torch.dtype, share: Any = 1) -> Work:
    """The kernels of `ffn_skip` on one block: its weights are streamed for `share` of the calls, its launches always happen."""
    return Work("ffn/skip", dtype, size=sympy.sympify(weight_bytes * share), rows=sympy.sympify(rows * share))


def elementwise(size: Size | float) -> Work:
    """Norms, activations, rotations and sums: `size` bytes read and written."""
    return Work("elementwise", size=sympy.sympify(size))
