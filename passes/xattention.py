"""xattention: antidiagonal scoring picks key blocks per query block and head; attention visits only those.

Xu et al., "XAttention: Block Sparse Attention with Antidiagonal Scoring", arXiv 2503.16428. Beside the published sum over a query
block's cells (`pool = "sum"`), `pool = "max"` takes their maximum: a block matters when one query needs it. With `pool = "row"`, the
default, every cell of queries keeps its own share of its mass, and the block of queries visits what some cell kept. `estimate` makes the
scores cheaper.

A head may do something else instead, beside others that choose so: see sinks and a window (`windows`), or columns and diagonals that the
last queries look at (`patterns`), as `sparsify.passes.minference` has them.

A block's choice depends on all queries of its query block: values stay causal, but changing the tail of a prompt can change
logits of up to block - 1 rows before it.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections import Counter
from typing import Any, ClassVar, Literal

import sympy
from pydantic import Field, field_validator, model_validator

from sparsify.ops import scratch
from sparsify.ops.estimate import DEFAULT, VARIANTS, Estimate, Pool, VariantName, label
from sparsify.ops.limits import MOST_BLOCKS, cdiv
from sparsify.ops.patterns import ALWAYS, operand_room
from sparsify.ops.selection import SelectCall, highest_share
from sparsify.ops.sparse_attention import SparseAttentionCall
from sparsify.ops.streaming import obstacles
from sparsify.planning.method import (
    AttentionSite,
    AttentionSizes,
    Computed,
    Context,
    Defaults,
    Editor,
    PromptPass,
    Proposal,
    Refusal,
    UnsupportedError,
    Work,
    attention_call,
    crossovers,
    empty_row_operands,
    expected_density,
    links,
    lists_are_large,
    refuse_common,
    work,
)

# what a region takes as operands, by the field of the call that they take the place of
_OPERANDS = {"threshold": "head_thresholds", "columns": "head_columns", "diagonals": "head_diagonals"}
# with two stages; measured beside `DEFAULT` in docs/decisions/0015
_STAGED: tuple[VariantName, ...] = ("quad", "int8", "peak")


class XAttention(PromptPass):
    """threshold: share of a row's estimated mass to keep, one for all heads or one per query head; 1 keeps everything.
    density: keep this share of each row's causal blocks instead of a threshold."""

    name: ClassVar[str] = "xattention"
    by_head: ClassVar[tuple[str, ...]] = ("threshold", "windows", "patterns")
    lists_blocks: ClassVar[bool] = True
    defaults: ClassVar[tuple[Defaults, ...]] = (
        # a density needs a rule that ranks blocks, and asks for a cost: the estimate's stays low at any length
        Defaults("with a density", lambda options: bool(options.density), {"pool": "max"}),
        # these keep blocks for all cells together, of which a larger share has to be kept
        Defaults("with sum or max", lambda options: options.pool != "row", {"refine_stride": None, "threshold": 0.95, "min_share": 0.0}),
        # who names a threshold or a stride has named all of it
        Defaults("where a threshold is given", lambda options: "threshold" in options.model_fields_set, {"min_share": 0.0}),
        Defaults("where a stride is given", lambda options: "stride" in options.model_fields_set, {"refine_stride": None}),
        Defaults("with patterns", lambda options: any(options.patterns), {"refine_stride": None}),
        # at four times the second's stride the first drops single facts, which it meets in one pair of tokens of sixteen
        Defaults(
            "in two stages",
            lambda options: bool(options.refine_stride),
            {
                "stride": Computed("twice `refine_stride`", lambda options: 2 * options.refine_stride),
                "coarse_threshold": Computed(
                    "a higher threshold", lambda options: max(options.coarse_threshold, highest_share(options._given_thresholds))
                ),
            },
        ),
        # by itself a stage scores pairs: of means of four tokens it loses what the first of two still lists
        Defaults("in one stage", lambda options: not options.refine_stride, {"estimate": DEFAULT.variants}),
        Defaults("in one stage under the row rule", lambda options: options.pool == "row" and not options.refine_stride, {"stride": 4}),
    )

    stride: Literal[4, 8, 16] = Field(
        8,
        description="tokens that one score of the estimate spans; smaller is finer and slower",
    )
    block: Literal[64, 128] = Field(128, description="tokens in a block of queries and of keys")
    pool: Pool = Field(
        "row",
        description="how a query block's cells are combined: by the sum or the maximum of their masses, or, with row, by the union of what "
        "each cell keeps by itself; sum is the published rule",
    )
    estimate: tuple[VariantName, ...] = Field(
        _STAGED,
        description="ways to make the estimate cheaper, any of them together: "
        + "; ".join(f"`{name}`: {one.computes.partition(';')[0]}" for name, one in VARIANTS.items()),
    )
    threshold: float | tuple[float, ...] = Field(
        0.8, description="share of a row's estimated mass to keep; a list gives one per query head"
    )
    min_share: float = Field(
        0.05,
        ge=0,
        le=1,
        description="with the row rule, a cell also keeps every block that holds at least this share of its mass, beside what the "
        "threshold keeps; 0: none",
    )
    density: float | None = Field(None, gt=0, le=1, description="share of causal blocks to keep per row; replaces the threshold")
    refine_stride: Literal[4, 8] | None = Field(
        4,
        description="two stages, with the row rule: blocks that `stride` lists with `coarse_threshold` are scored again at this finer "
        "stride, and `threshold` chooses among them. What two stages cannot serve (padding, packed documents, windows) is scored at this "
        "stride alone",
    )
    coarse_threshold: float = Field(
        0.95, ge=0, le=1, description="share of a row's mass that the first of two stages keeps, no less than the threshold"
    )
    windows: tuple[int, ...] = Field(
        (),
        description="one number per query head: a head with a positive one sees `sinks` first and so many last keys, by token, and no "
        "other; 0 chooses blocks",
    )
    sinks: int = Field(4, ge=0, le=64, description="first visible keys that heads with a window see, in tokens")
    patterns: tuple[tuple[int, ...], ...] = Field(
        (),
        description="one list per query head: a head with two numbers sees, as under `minference`, columns and diagonals of blocks that "
        "the last `queries` queries look at, so many tokens of each; one with an empty list chooses blocks",
    )
    queries: int = Field(64, ge=1, le=1024, description="last queries whose attention chooses columns and diagonals")
    expected: tuple[float, float] | None = Field(
        None, description="density to expect of a prompt of 8192 tokens and the power of the length by which it falls, for predicted times"
    )

    @field_validator("threshold")
    @classmethod
    def _in_range(cls, value: float | tuple[float, ...]) -> float | tuple[float, ...]:
        values = value if isinstance(value, tuple) else (value,)
        if not values or not all(0 <= v <= 1 for v in values):
            raise ValueError("must lie between 0 and 1")
        return value

    @field_validator("windows")
    @classmethod
    def _counts(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if not all(0 <= one <= 1 << 30 for one in value):
            raise ValueError("must lie between 0 and 2^30")
        return value

    @field_validator("patterns")
    @classmethod
    def _pairs(cls, value: tuple[tuple[int, ...], ...]) -> tuple[tuple[int, ...], ...]:
        if not all(len(one) in (0, 2) and all(0 <= tokens <= 1 << 22 for tokens in one) for one in value):
            raise ValueError("each must be empty, or two numbers between 0 and 2^22")
        return value

    @field_validator("estimate")
    @classmethod
    def _each_once(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        try:
            Estimate.from_names(value)
        except UnsupportedError as error:
            raise ValueError(str(error)) from None
        return value

    @model_validator(mode="after")
    def _heads_fit(self) -> XAttention:
        """What heads do beside others that choose blocks."""
        for name in ("windows", "patterns"):
            numbers: tuple[Any, ...] = getattr(self, name)
            if not any(numbers):
                continue
            if self.density:
                raise ValueError(f"{name} go with a threshold, not with a density")
            if isinstance(self.threshold, tuple) and len(self.threshold) not in (1, len(numbers)):
                raise ValueError(f"{len(self.threshold)} thresholds for {len(numbers)} {name}")
        if any(self.patterns) and self.refine_stride:
            raise ValueError("patterns go with one stage: the first of two lists blocks for the heads of a group together")
        if any(self.windows) and any(self.patterns) and len(self.windows) != len(self.patterns):
            raise ValueError(f"{len(self.windows)} windows for {len(self.patterns)} patterns")
        if any(window and pattern for window, pattern in zip(self.windows, self.patterns, strict=False)):
            raise ValueError("a head has either a window or a pattern")
        return self

    @model_validator(mode="after")
    def _stride_divides_block(self) -> XAttention:
        if self.block % self.stride:
            raise ValueError(f"stride {self.stride} does not divide block {self.block}")
        if self.pool == "row" and self.density:
            raise ValueError('pool = "row" keeps by threshold: a density needs one importance for each block, which "sum" and "max" have')
        if self.min_share and self.pool != "row":
            raise ValueError('min_share goes with pool = "row": it is a share of one cell\'s mass')
        if self.refine_stride:
            if self.pool != "row" or self.refine_stride >= self.stride:
                raise ValueError('refine_stride goes with pool = "row" and is finer than stride')
            if highest_share(self._thresholds()) > self.coarse_threshold:
                raise ValueError("coarse_threshold must not lie below threshold")
        return self

    def propose(self, site: AttentionSite, context: Context) -> Proposal | Refusal:
        refusal = refuse_common(self, site)
        if refusal is not None:
            return refusal
        if site.phase == "decode":
            return self.refuse("one query row: nothing to estimate, decode stays dense")
        if site.softcap or site.sink_logits is not None or site.alibi_slopes is not None or site.bias:
            return self.refuse("the estimate does not model softcap, sink logits, alibi or another bias")
        if (refusal := self.refuse_last_rows(site, context)) is not None:
            return refusal
        if obstacle := self._unrefined(site):
            answer = self._in_one_stage().propose(site, context)
            return answer if isinstance(answer, Refusal) else dataclasses.replace(answer, note=f"{answer.note}; no two stages {obstacle}")
        if isinstance(self.threshold, tuple) and len(self.threshold) not in (1, site.query_heads):
            return self.refuse(f"{len(self.threshold)} thresholds for {site.query_heads} query heads")
        if self.windows and len(self.windows) != site.query_heads:
            return self.refuse(f"{len(self.windows)} windows for {site.query_heads} query heads")
        if any(self.windows) and (site.mask.window is not None or site.mask.documents is not None):
            return self.refuse("heads with sinks and a window of their own in a layer with a window or packed documents")
        if any(self.for_all_heads().patterns) and (refusal := self._refuse_patterns(site, context)) is not None:
            return refusal
        if context.min_length is None and context.family == "reference":
            why = f" ({context.obstacle})" if context.obstacle else ""
            return self.refuse(
                f"no sparse kernel on this device{why}: the plain reference is never faster than dense", "min_length = 0 forces it"
            )
        if context.min_length is None and site.mask.window is not None:
            return self.refuse(
                f"a window of {site.mask.window} tokens is attended in less time than it is estimated", "min_length = 0 forces it"
            )
        start, solved = context.min_length, context.min_length is None
        # numbers by head are no reason: layers of one kind, and processes, may differ in them
        if start is None and not self.density and not self.head_numbers() and set(self._most_visited()) == {MOST_BLOCKS}:
            return self.refuse("a threshold of 1 visits every block", "min_length = 0 forces it")
        if start is None:
            sizes = site.example
            start = crossovers.sparse_from(
                context.device, self.stride, self.block, sizes.qk_head_dim, self.density, context.family,
                estimate=self.variants, pool=self.pool, heads=(sizes.query_heads, sizes.kv_heads),
                max_cost_ratio=1.0 if self.density else context.max_cost_ratio,
                query_len=site.query_len if site.phase == "chunk" and isinstance(site.query_len, int) else None,
                last_rows=self.last_rows, refine_stride=self.refine_stride or 0,
            )  # fmt: skip
        rule = f"density {self.density:g}" if self.density else f"τ {_shown(self.threshold)}"
        stages = f" (τ {self.coarse_threshold:g}), then {self.refine_stride}" if self.refine_stride else ""
        rule += f" and shares of {self.min_share:g}" if self.min_share else ""
        note = f"stride {self.stride}{stages}, {label(self.pool, self.variants)}, {rule}, block {self.block}"
        if any(self.windows):
            note += f", {len(self.windows) - self.windows.count(0)} of {site.query_heads} heads {self.sinks} sinks + window"
        if count := sum(map(bool, self.patterns)):
            note += f", {count} of {site.query_heads} heads columns + diagonals of the last {self.queries} queries"
        note += self.last_rows_note
        note += context.travels("the estimate's cells and visited keys and values", site, self._sent)
        works = functools.partial(self.works, kernel=context.family)
        limits = {"density": self.density, "min_key_len": start, "solved": solved, "scratch": self._scratch(site)}
        return Proposal.from_work(self, site, context, works, note=note, **limits)

    def _unrefined(self, site: AttentionSite) -> str:
        """Beside what no kernel serves a second stage, which the reference would take longer for than dense attention. Empty where one
        does, or none is asked for. A graph may not know how long its rows are: the op looks at that for each call."""
        if not self.refine_stride:
            return ""
        found = obstacles(
            padding=site.mask.padding is not None,
            documents=site.mask.documents is not None,
            windows=site.mask.window is not None or any(self.for_all_heads().windows),
            shared=self.variants.group,
            listed_cells=self.block // self.variants.span(self.refine_stride),
        )
        return found[0] if found else ""

    def _refuse_patterns(self, site: AttentionSite, context: Context) -> Refusal | None:
        if len(self.patterns) != site.query_heads:
            return self.refuse(f"{len(self.patterns)} patterns for {site.query_heads} query heads")
        if not site.mask.causal:
            return self.refuse("columns and diagonals of attention that is not causal", "diagonals of keys need an order")
        if site.mask.window is not None or site.mask.documents is not None:
            return self.refuse("heads with columns and diagonals in a layer with a window or packed documents")
        if context.sequence:
            return self.refuse(
                "heads with columns and diagonals in a prompt that is divided among processes", "minference serves all heads so"
            )
        return None

    def _in_one_stage(self) -> XAttention:
        """The second stage alone, which chooses among all blocks; what was not given goes with one stage."""
        given = self.model_fields_set - {"stride", "refine_stride", "coarse_threshold"}
        if self.estimate == _STAGED:  # as plans name it too, which write down what nobody gave
            given -= {"estimate"}
        single = XAttention.model_validate({name: getattr(self, name) for name in given} | {"stride": self.refine_stride})
        if self._whole is not None:
            single._whole = self.for_all_heads()._in_one_stage()
        return single

    def _sent(self, sizes: AttentionSizes, processes: int) -> int:
        """Bytes that a process sends in a layer, if every block is visited by some row."""
        cells = links.cell_bytes(sizes, processes, self.variants, self.stride, self.block)
        return cells + links.key_value_bytes(sizes, processes)

    def _scratch(self, site: AttentionSite) -> sympy.Expr:
        """Bytes of block lists (int16) and of the estimate's block sums (fp16), each up to its limit: `sparsify.ops.scratch` counts all."""
        rows, blocks = sympy.sympify(site.query_len) / self.block, sympy.sympify(site.key_len) / self.block
        heads = self.variants.scored_heads(site.query_heads, site.kv_heads)
        cells = sympy.sympify(site.query_len) / self.variants.span(self.refine_stride or self.stride)
        # a first stage's are one for each KV head
        lists = 2 * site.batch * (site.query_heads + (site.kv_heads if self.refine_stride else 0)) * rows * blocks
        sums = 2 * site.batch * heads * cells * blocks
        return sympy.Min(lists, scratch.LIST_BYTES) + sympy.Min(sums, scratch.SUM_BYTES)

    def works(self, sizes: AttentionSizes, kernel: str) -> tuple[Work, ...]:
        """Estimate, selection and lists; then attention at the density asked for, or the one to expect at this length."""
        share = self.density or self._expected(sizes.key_len)
        kept = self._kept_of_lists(sizes.key_len) if self.refine_stride and not self.density else share
        selecting = work.selections(sizes, self.stride, self.block, self.variants, self.pool, self.refine_stride or 0, kept)
        if any(self.for_all_heads().patterns):
            selecting = *selecting, work.pattern_choice(sizes, self.queries)
        return *self.last_rows_works(sizes, kernel), *selecting, work.attention(sizes, kernel, share=share, listed=True)

    def _kept_of_lists(self, length: Any) -> sympy.Expr:
        """Of two stages, the density that says what the second does: that of heads that choose. What the first lists does not depend on
        heads with a threshold of 1."""
        chooses = [blocks is None for blocks in self._most_visited()]
        if self.expected is None or not any(chooses):
            return expected_density(length)
        at = max(0.0, self.expected[0] * len(chooses) - chooses.count(False)) / chooses.count(True)
        return work.smallest(1, at * (sympy.Integer(8192) / length) ** self.expected[1])

    def _expected(self, length: Any) -> sympy.Expr:
        """Density to expect of a prompt: from calibration, else the published one, and of heads that choose nothing what these visit."""
        if self.expected is not None:
            at, power = self.expected
            return work.smallest(1, at * (sympy.Integer(8192) / length) ** power)
        visited = Counter(self._most_visited())
        if set(visited) == {None}:
            return expected_density(length)
        every = [
            count * (expected_density(length) if blocks is None else work.listed_share(blocks, self.block, length))
            for blocks, count in visited.items()
        ]
        return sympy.Add(*every) / sum(visited.values())

    def density_at(self, key_len: int) -> float | None:
        return self.density or float(self._expected(sympy.Integer(key_len)))

    def _most_visited(self) -> tuple[int | None, ...]:
        """Key blocks that a query block visits at most, of each head or of one for all; None: as many as the estimate says."""
        thresholds = self._thresholds()
        windows, patterns = self.windows or (0,) * len(thresholds), self._pattern_blocks() or ((),) * len(thresholds)

        def most(threshold: float, window: int, pattern: tuple[int, ...]) -> int | None:
            if pattern:
                return sum(pattern) + ALWAYS
            if window:  # both edges cut blocks, and the sinks are one more
                return cdiv(window, self.block) + 2
            return MOST_BLOCKS if threshold >= 1 else None

        return tuple(map(most, thresholds, windows, patterns))

    @property
    def variants(self) -> Estimate:
        """The option `estimate` as a value."""
        return Estimate.from_names(self.estimate)

    def rewrite(self, editor: Editor, site: AttentionSite) -> None:
        windows = self.windows if any(self.windows) else ()
        own, sinks = ((site.mask.window,) if site.mask.window else ()), self.sinks if windows else 0
        mask = editor.move_to(site).mask_operands(site, sinks=sinks)
        selection = {
            "key_flags": mask.key_flags,
            "segments": mask.segments,
            "query_start": mask.query_start,
            "scale": site.scale,
            "causal": mask.causal,
            "windows": windows or own,
            **self.selection(),
        }
        operands = {_OPERANDS[name]: editor.head_numbers(site, name) for name in self.head_numbers()}
        if operands and None not in operands.values():
            selection |= dict.fromkeys(self.head_numbers(), ()) | operands | {"most": self._operand_room}
        if editor.sequence or lists_are_large(site, self.block):
            attending = {"sinks": sinks, "seq_major": site.output_stride_order != "bhqd", **empty_row_operands(editor, site)}
            both = SparseAttentionCall.bind(site.query, site.key, site.value, **selection, **attending)
            self.replace(editor, site, editor.items(editor.emit(both), 1)[0])
            return
        counts, indices = editor.items(editor.emit(SelectCall.bind(site.query, site.key, **selection)), 2)
        lists = (counts, indices)
        output = attention_call(editor, site, sinks=sinks, windows=windows or own, blocks=lists, block_size=self.block)
        self.replace(editor, site, output)

    @classmethod
    def kind(cls, options: dict[str, Any]) -> dict[str, Any]:
        method = cls.model_validate(options)
        apart = {"expected", *(("patterns",) if any(method.patterns) else ()), *method.head_numbers()}
        shared = {name: value for name, value in options.items() if name not in apart}
        return {**shared, "room": method._operand_room} if any(method.patterns) else shared

    def head_numbers(self) -> dict[str, tuple[float, ...]]:
        model_wide = self.for_all_heads().threshold  # a process may have one head of many
        by_head = isinstance(model_wide, tuple) and len(model_wide) > 1
        if any(self.for_all_heads().patterns):
            return {"threshold": self._thresholds(), **self._columns_and_diagonals()}
        return {"threshold": self._thresholds()} if by_head and not self.density else {}

    def selection(self) -> dict[str, Any]:
        """The fields of `SelectCall` that the options decide, but for windows."""
        return {
            "pool": self.pool,
            "estimate": self.variants,
            "stride": self.stride,
            "block_size": self.block,
            "threshold": self._thresholds(),
            "min_share": self.min_share,
            "density": self.density or 0.0,
            **({"refine_stride": self.refine_stride, "coarse_threshold": self.coarse_threshold} if self.refine_stride else {}),
            **({**self._columns_and_diagonals(), "queries": self.queries} if self.patterns else {}),
        }

    @property
    def _given_thresholds(self) -> tuple[float, ...]:
        return self.threshold if isinstance(self.threshold, tuple) else (self.threshold,)

    def _thresholds(self) -> tuple[float, ...]:
        """One for all heads or one per query head; a head with a window keeps every block of it, one with a pattern needs no estimate."""
        thresholds = self._given_thresholds
        heads = max((len(one) for one in (self.windows, self.patterns) if any(one)), default=0)
        if not heads:
            return thresholds
        given = itertools.zip_longest(thresholds * (heads // len(thresholds)), self.windows, self.patterns)
        return tuple(1.0 if window or pattern else threshold for threshold, window, pattern in given)

    def _pattern_blocks(self) -> tuple[tuple[int, ...], ...]:
        """Of each head columns and diagonals in blocks; empty where the estimate chooses."""
        return tuple(tuple(cdiv(tokens, self.block) for tokens in one) for one in self.patterns)

    def _columns_and_diagonals(self) -> dict[str, tuple[int, ...]]:
        """As `SelectCall` has them."""
        columns, diagonals = zip(*(one or (-1, -1) for one in self._pattern_blocks()), strict=True)
        return {"columns": columns, "diagonals": diagonals}

    @property
    def _operand_room(self) -> int:
        """Of all of the model's heads, as layers are."""
        return operand_room(max(map(sum, self.for_all_heads()._pattern_blocks()), default=0))

    def keep_all(self) -> XAttention:
        return self.for_heads_alike(threshold=1.0, density=None, windows=(), patterns=())


def _shown(threshold: float | tuple[float, ...]) -> str:
    values = sorted(set(threshold)) if isinstance(threshold, tuple) else [threshold]
    return f"{values[0]:g}" if len(values) == 1 else f"{values[0]:g} to {values[-1]:g} by head"
