"""`sparsify::select_blocks`, which makes block lists from an estimate of the scores, and who observes it.

A cell is `stride` consecutive tokens. Key cell j starts at key j · stride; query cell i starts at query row i · span, where span is the
stride, or a multiple of it when only every second query cell is scored.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
from collections.abc import Callable, Generator, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Annotated, Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

from sparsify.ops.attention import VERSION
from sparsify.ops.block_lists import Listing
from sparsify.ops.call import Operand
from sparsify.ops.estimate import EXACT, Estimate, Pool
from sparsify.ops.library import define
from sparsify.ops.limits import cdiv
from sparsify.ops.listing import ListingCall
from sparsify.ops.patterns import SelectPatternCall
from sparsify.ops.streaming import obstacles, too_long

# longer than any prompt, and far from where int32 ends
_LONGEST_WINDOW = 1 << 30
# a density is a fixed-point number of this many bits, so that kernels agree on how many blocks it keeps
DENSITY_BITS = 24


@dataclass(frozen=True)
class RuleArgument:
    """What the kernels of a rule read of a call.

    name: in the kernels' text.
    type: as a Triton signature writes it: "fp32" or "i32" for a number, "*fp32" for one number per query head.
    value: from a call: a number, or one per query head in a tuple or tensor.
    """

    name: str
    type: Literal["fp32", "i32", "*fp32"]
    value: Callable[[SelectCall], Any]


@dataclass(frozen=True)
class Rule:
    """How blocks are chosen from their importances; `backends.select` has the rule itself, in plain PyTorch and in a kernel's text.

    holds: whether a call asks for it.
    arguments: of the kernels.
    """

    holds: Callable[[SelectCall], bool]
    arguments: tuple[RuleArgument, ...]


# by name; the first that holds decides
RULES: dict[str, Rule] = {
    # a share of each row's possible blocks
    "density": Rule(lambda call: call.density > 0, (RuleArgument("share", "i32", lambda call: int(call.density * (1 << DENSITY_BITS))),)),
    # a share of each row's mass, one per query head
    "taus": Rule(lambda call: call.by_head, (RuleArgument("thresholds", "*fp32", lambda call: call.thresholds),)),
    # a share of each row's mass, one for all heads
    "tau": Rule(lambda call: True, (RuleArgument("tau", "fp32", lambda call: call.threshold[0]),)),
}


def highest_share(thresholds: Sequence[float]) -> float:
    """The highest threshold of heads that leave something out: no less than that has to be listed by the first of two stages."""
    return max((threshold for threshold in thresholds if threshold < 1), default=0.0)


@dataclass(frozen=True, eq=False)
class SelectCall(ListingCall):
    """One call of `sparsify::select_blocks`.

    query: [batch, query_heads, query_len, head_dim], floating point; key has its dtype.
    key: [batch, kv_heads, key_len, head_dim].
    key_flags, segments, query_start, scale, causal, windows: as in `sparsify.ops.attention.AttentionCall`.
    pool: how a query block's cells are combined: "sum" or "max" of their masses, or "row": every cell chooses by its own, and the query
        block visits what some cell chose.
    estimate: what is multiplied.
    stride: tokens that one score spans.
    block_size: query rows and keys of a block.
    threshold: share of each row's mass to keep, one for all heads or one per query head; 1 or more keeps everything.
    min_share: when positive, under the row rule, a cell keeps every block that holds at least this share of its mass too, when others hold
        `threshold` of it already.
    density: when positive, keep this share of each row's possible blocks instead.
    refine_stride: when positive, two stages under the row rule: cells of `stride` keep at least `coarse_threshold` of their mass, and what
        they keep is listed for all heads of their group. Of the blocks listed so, cells of this finer stride keep `threshold` of their
        mass, and what `min_share` adds, counted over that list alone. Heads with a threshold of 1 or more keep everything, whatever is
        listed. Rows of more than `sparsify.ops.limits.WIDEST_ROW` blocks have no first stage: the second chooses among all blocks.
    coarse_threshold: share of each row's mass that the first of two stages keeps at least, no less than any threshold below 1.
    head_thresholds: the thresholds per query head as a tensor, where one graph serves layers that differ in them.
    columns, diagonals: one number per query head, for heads whose blocks are not chosen by the estimate but by what the last `queries`
        rows look at, as `sparsify.ops.patterns.SelectPatternCall` chooses them, in blocks. -1 in both: the estimate chooses. Empty: it does
        for all heads. Causal attention without segments, in one stage.
    head_columns, head_diagonals: these per query head as tensors; then `most` is the highest sum of both that a head may have.
    queries: last query rows whose attention chooses columns and diagonals.
    key_mean: what 8-bit cells are rounded beside, fp32; None: the mean of the keys that take part. A call over some of a text's keys gets
        that of all of them, to choose what a call over all of them chooses.
    prepared_keys: the key cells as they are multiplied, where they were made before (`backends.registration.prepare_keys`): int8 or the
        keys' dtype, `steps` rows for each cell. The keys themselves are then not read.
    prepared_scales: of each of these cells, fp32 [batch, kv_heads, cells], where they are int8.
    """

    NAME: ClassVar[str] = "select_blocks"
    VERSION: ClassVar[int] = VERSION

    query: Annotated[Tensor, Operand("batch query_heads query_len head_dim")]
    key: Annotated[Tensor, Operand("batch kv_heads key_len head_dim")]
    _: KW_ONLY
    key_flags: Annotated[Tensor | None, Operand("batch|1 key_len", "integers")] = None
    segments: Annotated[Tensor | None, Operand("batch|1 key_len", "integers")] = None
    query_start: Annotated[Tensor | None, Operand("", "integers", anywhere=True)] = None
    head_thresholds: Annotated[Tensor | None, Operand("query_heads", "floats")] = None
    head_columns: Annotated[Tensor | None, Operand("query_heads", "integers")] = None
    head_diagonals: Annotated[Tensor | None, Operand("query_heads", "integers")] = None
    key_mean: Annotated[Tensor | None, Operand("batch kv_heads head_dim", "floats")] = None
    prepared_keys: Annotated[Tensor | None, Operand("batch kv_heads * head_dim", "anything")] = None
    prepared_scales: Annotated[Tensor | None, Operand("batch kv_heads *", "floats")] = None
    scale: float
    causal: bool
    windows: tuple[int, ...] = ()
    pool: str = "max"
    estimate: Estimate = EXACT
    stride: int = 8
    block_size: int = 128
    threshold: tuple[float, ...] = ()
    min_share: float = 0.0
    density: float = 0.0
    refine_stride: int = 0
    coarse_threshold: float = 0.9
    columns: tuple[int, ...] = ()
    diagonals: tuple[int, ...] = ()
    most: int = 0
    queries: int = 64

    @property
    def patterned(self) -> bool:
        """Whether some heads may visit columns and diagonals."""
        return self.head_columns is not None or any(columns >= 0 for columns in self.columns)

    @property
    def pattern(self) -> SelectPatternCall:
        """What lists the blocks of heads that visit columns and diagonals; of other heads it lists what every pattern visits."""
        given = SelectPatternCall(**self.common(SelectPatternCall))
        visited: Callable[[tuple[int, ...]], tuple[int, ...]] = lambda numbers: tuple(max(0, number) for number in numbers)
        if self.head_columns is None or self.head_diagonals is None:
            return dataclasses.replace(given, columns=visited(self.columns), diagonals=visited(self.diagonals))
        operands = self.head_columns.clamp(min=0), self.head_diagonals.clamp(min=0)
        return dataclasses.replace(given, head_columns=operands[0], head_diagonals=operands[1])

    @property
    def served(self) -> SelectCall:
        """What serves this call is asked for: itself, or of two stages over rows that are too long the second alone, since no kernel makes
        both of them and scores of all blocks would be held at once. Keys that were prepared are the first stage's."""
        if not self.refine_stride or not too_long(self.key_blocks) or self.prepared_keys is not None:
            return self
        return dataclasses.replace(self, stride=self.refine_stride, refine_stride=0)

    def unstreamed(self, *, listed: bool, widest: int | None = None) -> tuple[str, ...]:
        """`sparsify.ops.streaming.obstacles` of this call as one stage.

        Args:
            listed: whether it scores listed blocks. widest: key blocks of a row that are served.
        """
        return obstacles(
            padding=self.key_flags is not None,
            documents=self.segments is not None,
            windows=bool(self.bounded_windows),
            shared=self.estimate.group,
            listed_cells=self.block_size // self.span if listed else None,
            key_blocks=self.key_blocks,
            widest=widest,
        )

    @property
    def stages(self) -> tuple[SelectCall, SelectCall]:
        """The two calls that this one is when it refines: the coarse one, and the fine one, which chooses among what the first lists for
        some head of a group."""
        single = dataclasses.replace(SelectCall(**self.common(SelectCall)), refine_stride=0)
        # of all heads alike: one that keeps everything looks at no list, and others must not choose among more for being beside it
        first = dataclasses.replace(single, threshold=(self.coarse_threshold,), head_thresholds=None, min_share=0.0)
        # of every second query cell the finer ones are others
        whole = self.refine_stride if self.estimate.half else self.stride
        fine = dataclasses.replace(single, stride=self.refine_stride)
        return first, FineCall(**fine.common(SelectCall), whole_stride=whole)

    @property
    def whole(self) -> SelectCall:
        """The call whose cells are prepared: this one, or that which finer cells are cut out of."""
        return self

    @property
    def finer(self) -> int:
        """Cells that are cut out of one of `whole`."""
        return self.whole.stride // self.stride

    @property
    def bounded_windows(self) -> tuple[int, ...]:
        """Empty where no head has a window, else one or one per query head, in 32 bits; 0: none for that head."""
        if not any(window > 0 for window in self.windows):
            return ()
        return tuple(min(max(window, 0), _LONGEST_WINDOW) for window in self.windows)

    @property
    def span(self) -> int:
        """Query rows from one scored query cell to the next."""
        return self.estimate.span(self.stride)

    @property
    def steps(self) -> int:
        """Products of tokens, or of neighbours' means, in one score."""
        return self.stride // self.estimate.merge

    @property
    def sharing(self) -> int:
        """Neighbouring key cells that share a scale where cells are rounded."""
        return self.block_size // self.stride if self.estimate.peak else 1

    @property
    def query_cells(self) -> int:
        return cdiv(self.query_len, self.span)

    @property
    def key_cells(self) -> int:
        return cdiv(self.key_len, self.stride)

    @property
    def empty(self) -> bool:
        return 0 in (self.batch, self.heads, self.query_len, self.key_len)

    @property
    def by_head(self) -> bool:
        """Whether heads have thresholds of their own."""
        return self.head_thresholds is not None or len(set(self.threshold)) > 1

    @property
    def thresholds(self) -> tuple[float, ...] | Tensor:
        """One for all heads, or one per query head."""
        return self.threshold if self.head_thresholds is None else self.head_thresholds

    @property
    def rule(self) -> str:
        """How blocks are chosen: a name in `RULES`."""
        return next(name for name, rule in RULES.items() if rule.holds(self))

    def check(self) -> None:
        """Checks that the arguments fit together.

        Raises:
            UnsupportedError: says what is wrong and what would do.
        """
        super().check()
        need, heads, pools = self.need, self.heads, get_args(Pool)
        need(self.pool in pools, f"unknown pool {self.pool!r}", ", ".join(pools))
        need(self.stride in (4, 8, 16), f"stride {self.stride}", "4, 8 or 16")
        fits = self.block_size in (32, 64, 128) and self.block_size % self.span == 0
        need(fits, f"block size {self.block_size} for stride {self.stride}", "64 or 128")
        need(len(self.windows) in (0, 1, heads), f"{len(self.windows)} windows for {heads} query heads", "none, one, or one per query head")
        thresholds = len(self.threshold) in (1, heads) or self.density > 0 or self.head_thresholds is not None
        need(thresholds, f"{len(self.threshold)} thresholds for {heads} query heads", "one, or one per query head")
        need(all(t >= 0 for t in self.threshold), f"threshold {self.threshold}", "0 or more")
        need(0 <= self.min_share <= 1, f"a least share of {self.min_share}", "0 (none) to 1")
        need(self.pool == "row" or not self.min_share, f"a least share under the rule {self.pool}", "row: a share of each cell's own mass")
        need(0 <= self.density <= 1, f"density {self.density}", "0 (use the threshold) to 1")
        whole = self.pool != "row" or not self.density
        need(
            whole, "a density under the row rule", "a threshold, or another pool: no block has one importance that others are compared with"
        )
        if self.refine_stride:
            need(
                self.refine_stride in (4, 8) and self.refine_stride < self.stride,
                f"stride {self.stride}, then {self.refine_stride}",
                "4 or 8, finer than the first",
            )
            need(self.pool == "row", f"two stages under the rule {self.pool}", "row")
            highest = highest_share(self.threshold)
            need(
                highest <= self.coarse_threshold <= 1,
                f"a coarse threshold of {self.coarse_threshold} for {highest}",
                "no less than any threshold, at most 1",
            )
        if self.prepared_keys is not None:
            rows, scales = self.prepared_keys.shape[2], self.prepared_scales
            need(self.estimate.prepared and rows == self.key_cells * self.steps, f"{rows} rows of prepared keys")
            cells = None if scales is None else scales.shape[2]
            need(cells == (self.key_cells if self.estimate.int8 else None), f"scales of {cells} prepared cells")
            need(not (self.refine_stride and self.estimate.half), "two stages of half the cells over keys that were made before")
        self._check_patterns()
        self.check_length()

    def _check_patterns(self) -> None:
        need = self.need
        need((self.head_columns is None) == (self.head_diagonals is None), "head_columns without head_diagonals, or the reverse", "both")
        both = len(self.columns) == len(self.diagonals) and len(self.columns) in (0, self.heads)
        need(both, f"{len(self.columns)} columns and {len(self.diagonals)} diagonals for {self.heads} query heads", "none, or one per head")
        alike = all((columns < 0) == (diagonals < 0) for columns, diagonals in zip(self.columns, self.diagonals, strict=True))
        need(alike, "columns without diagonals, or the reverse", "-1 in both, or in none")
        if self.patterned:
            need(self.causal, "columns and diagonals of attention that is not causal")
            need(self.segments is None, "columns and diagonals of packed documents")
            need(not self.refine_stride, "columns and diagonals beside two stages, whose lists are of groups", "one stage")
            need(self.queries > 0, f"{self.queries} queries", "1 or more")
            need(self.most >= 0, f"room for {self.most} blocks", "0 or more")

    def empty_lists(self) -> tuple[Tensor, Tensor]:
        """Uninitialised block lists (`sparsify.ops.block_lists`).

        Returns:
            counts: int32, [batch, query_heads, query_blocks].
            indices: int16, [batch, query_heads, query_blocks, key_blocks]; int16 holds 32767 blocks, 4 million keys at block 128, in half
                the memory of int32.
        """
        counts = self.query.new_empty(self.batch, self.heads, self.query_blocks, dtype=torch.int32)
        return counts, self.query.new_empty(*counts.shape, self.key_blocks, dtype=torch.int16)


@dataclass(frozen=True, eq=False)
class FineCall(SelectCall):
    """The second of two stages.

    whole_stride: tokens of the cells that this stage's are cut out of after they were rounded, so that both stages read what was prepared
        once; its own stride where they are prepared apart.
    """

    _: KW_ONLY
    whole_stride: int = 0

    @property
    def whole(self) -> SelectCall:
        return self if self.whole_stride == self.stride else dataclasses.replace(self.single, stride=self.whole_stride)

    @property
    def single(self) -> SelectCall:
        """The same without the other stage."""
        return SelectCall(**self.common(SelectCall))


Observer = Callable[[Listing, Tensor, Tensor], None]
_observers: contextvars.ContextVar[tuple[Observer, ...]] = contextvars.ContextVar("sparsify_select_observers", default=())

_piece: contextvars.ContextVar[tuple[int, int]] = contextvars.ContextVar("sparsify_select_piece", default=(0, 1))

select_blocks = define(SelectCall, SelectCall.empty_lists)


@contextlib.contextmanager
def observing(observer: Observer) -> Generator[None]:
    """Calls `observer(call, counts, indices)` after each block selection of this block and thread.

    Reading the block lists costs a device synchronisation, so nobody observes unless a tool asks.
    """
    token = _observers.set((*_observers.get(), observer))
    try:
        yield
    finally:
        _observers.reset(token)


def observed(call: Listing, counts: Tensor, indices: Tensor, number: int = 0, count: int = 1) -> None:
    """Shows a selection to who observes it here.

    Args:
        counts, indices: its block lists.
        number, count: which of how many selections this is that make up one of a site: some rows, or some heads.
    """
    token = _piece.set((number, count))
    try:
        for observer in observers():
            observer(call, counts, indices)
    finally:
        _piece.reset(token)


def piece() -> tuple[int, int]:
    """For an observer: which of how many selections of one site it is shown, 0 and 1 where it is all of it."""
    return _piece.get()


def observers() -> tuple[Observer, ...]:
    """Who observes block selections here."""
    return _observers.get()
