"""minference: key columns and diagonals that the last queries look at, head by head; attention visits only those blocks.

Jiang et al., "MInference 1.0", arXiv 2407.02490: the vertical-slash pattern, and with no columns and few diagonals its A-shape. There
columns and diagonals are of tokens; here of blocks, so that the attention kernels of any block list serve them.

What a row sees depends on the last rows of its call: values stay causal, but which of them is not.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import sympy
from pydantic import Field, field_validator, model_validator

from sparsify.ops.limits import cdiv
from sparsify.ops.pattern_attention import PatternAttentionCall
from sparsify.ops.patterns import ALWAYS, SelectPatternCall, most_together, operand_room
from sparsify.planning.method import (
    AttentionSite,
    AttentionSizes,
    Context,
    Editor,
    PromptPass,
    Proposal,
    Refusal,
    Work,
    attention_call,
    empty_row_operands,
    links,
    lists_are_large,
    refuse_common,
    work,
)

MOST = 1 << 22  # of columns: every key
_FEW = 0.5  # share of the blocks of which attention along lists is taken to pay


class MInference(PromptPass):
    """columns, diagonals: tokens of keys, rounded up to blocks."""

    name: ClassVar[str] = "minference"
    by_head: ClassVar[tuple[str, ...]] = ("columns", "diagonals", "blocks")
    lists_blocks: ClassVar[bool] = True

    columns: int | tuple[int, ...] = Field(
        1024, description="keys, in tokens, that every later query sees: columns of blocks; a list gives one number per query head"
    )
    diagonals: int | tuple[int, ...] = Field(
        4096, description="keys, in tokens, at distances that every query sees: diagonals of blocks; a list gives one number per query head"
    )
    blocks: int | tuple[int, ...] = Field(
        0,
        description="keys, in tokens, that each block of queries chooses by itself, by the means of its queries and of blocks of keys; "
        "a list gives one number per query head",
    )
    mass: float | None = Field(
        None,
        gt=0,
        le=1,
        description="share of what the last queries look at: a head visits as few columns as hold it, and as few diagonals, up to the "
        "numbers given, and blocks likewise; none: as many as are given",
    )
    divergence: float | None = Field(
        None,
        gt=0,
        le=1,
        description="a head visits either `blocks`, or `columns` and `diagonals`: the former in prompts in which means estimate to less "
        "than this (square root of the Jensen-Shannon divergence) what the last queries look at, heads without `blocks` always the latter; "
        "none: all that the numbers say",
    )
    queries: int = Field(64, ge=1, le=1024, description="last queries whose attention chooses columns and diagonals")
    block: Literal[64, 128] = Field(128, description="tokens in a block of queries and of keys")

    @field_validator("columns", "diagonals", "blocks")
    @classmethod
    def _in_range(cls, value: int | tuple[int, ...]) -> int | tuple[int, ...]:
        values = value if isinstance(value, tuple) else (value,)
        if not values or not all(0 <= one <= MOST for one in values):
            raise ValueError(f"must lie between 0 and {MOST}")
        return value

    def _blocks(self, tokens: int | tuple[int, ...]) -> tuple[int, ...]:
        return tuple(cdiv(one, self.block) for one in (tokens if isinstance(tokens, tuple) else (tokens,)))

    @property
    def most(self) -> int:
        """Key blocks that a query block visits at most, of the head that visits most."""
        return most_together(*(self._blocks(getattr(self, name)) for name in self.by_head)) + ALWAYS

    @property
    def by_block(self) -> bool:
        """Whether query blocks of some head choose by themselves."""
        return bool(self.blocks if isinstance(self.blocks, int) else any(self.blocks))

    @property
    def _operand_room(self) -> int:
        """Columns, diagonals and blocks that lists have room for where the numbers are operands: a power of two, so that layers whose heads
        need about as much are of one kind. Of all of the model's heads, as layers are: those of one process may need less in one layer
        alone."""
        return operand_room(self.for_all_heads().most - ALWAYS)

    def _by_head(self) -> list[tuple[int, ...]]:
        """Columns, diagonals and blocks in tokens, of one head for all or of each."""
        every = [one if isinstance(one := getattr(self, name), tuple) else (one,) for name in self.by_head]
        count = max(map(len, every))
        return list(zip(*(numbers if len(numbers) == count else numbers * count for numbers in every), strict=True))

    def _visited(self, numbers: tuple[int, ...]) -> int:
        """Key blocks that a query block of a head with these numbers visits at most."""
        columns, diagonals, blocks = self._blocks(numbers)
        return ALWAYS + (max(columns + diagonals, blocks) if self.divergence else columns + diagonals + blocks)

    def share(self, key_len: Any) -> sympy.Expr:
        """Of a prompt's causal blocks, those that are visited, the mean over heads: no head visits more than all."""
        shares = Counter(map(self._visited, self._by_head()))
        every = [count * work.listed_share(most, self.block, key_len) for most, count in shares.items()]
        return sympy.Add(*every) / sum(shares.values())

    def _pays_from(self) -> int | None:
        """The shortest prompt, in tokens, of which at most half of the blocks are visited; None where it would be longer than `MOST`."""
        tokens = self.block
        while tokens <= MOST and self.share(tokens) > _FEW:
            tokens *= 2
        low, high = tokens // 2, tokens
        while high - low > self.block:
            middle = (low + high) // (2 * self.block) * self.block
            low, high = (low, middle) if self.share(middle) <= _FEW else (middle, high)
        return high if tokens <= MOST else None

    @model_validator(mode="after")
    def _something_to_choose_between(self) -> MInference:
        if self.divergence and not self.by_block:
            raise ValueError("divergence chooses between columns and diagonals, and blocks: give blocks")
        return self

    def propose(self, site: AttentionSite, context: Context) -> Proposal | Refusal:
        if (refusal := refuse_common(self, site)) is not None:
            return refusal
        if not site.mask.causal:
            return self.refuse("attention is not causal", "diagonals of keys need an order")
        if site.query_len == 1:
            return self.refuse("one query row: nothing to choose, decode stays dense")
        if site.softcap or site.sink_logits is not None or site.alibi_slopes is not None or site.bias:
            return self.refuse("what is chosen does not model softcap, sink logits, alibi or another bias")
        if site.mask.window is not None:
            return self.refuse(f"the layer has a sliding window of {site.mask.window} tokens already")
        if site.mask.documents is not None:
            return self.refuse("the last queries of packed documents see one of them")
        if (refusal := self.refuse_last_rows(site, context)) is not None:
            return refusal
        if self.by_block and context.sequence:
            return self.refuse("blocks that queries choose in a prompt that is divided among processes", "set blocks = 0")
        for name in self.by_head:
            numbers = getattr(self, name)
            if isinstance(numbers, tuple) and len(numbers) not in (1, site.query_heads):
                return self.refuse(f"{len(numbers)} {name} for {site.query_heads} query heads")
        if context.min_length is None and context.family == "reference":
            why = f" ({context.obstacle})" if context.obstacle else ""
            return self.refuse(
                f"no sparse kernel on this device{why}: the plain reference is never faster than dense", "min_length = 0 forces it"
            )
        start = self._pays_from() if context.min_length is None else context.min_length
        if start is None:
            return self.refuse("more than half of the blocks are visited at any length", "fewer columns and diagonals, or min_length = 0")
        heads = self._by_head()
        most = "all" if any(MOST in numbers for numbers in heads) else f"up to {max(map(self._visited, heads))}"
        note = f"{most} key blocks of {self.block} by columns and diagonals of the last {self.queries} queries"
        if self.by_block:
            note += f" {'or' if self.divergence else 'and'} by means of blocks"
        if self.mass is not None:
            note += f", as few as hold {self.mass:.0%} of what these look at"
        if len(heads) > 1:
            note += f"; columns + diagonals{' + blocks' * self.by_block}: {_shown(heads, self.by_block)}"
        note += self.last_rows_note
        note += context.travels("queries that choose, what they look at, and visited keys and values", site, links.key_value_bytes)
        works = functools.partial(self.works, kernel=context.family)
        return Proposal.from_work(self, site, context, works, min_key_len=start, note=note)

    def works(self, sizes: AttentionSizes, kernel: str) -> tuple[Work, ...]:
        """The scores of the rows that choose, then attention along the lists."""
        scores = work.pattern_choice(sizes, self.queries)
        attending = work.attention(sizes, kernel, share=self.share(sizes.key_len), listed=True)
        if not self.by_block:
            return *self.last_rows_works(sizes, kernel), scores, attending
        heads, dims = sizes.batch * sizes.query_heads, sizes.qk_head_dim * sizes.dtype.itemsize
        queries, keys = heads * sizes.query_len * dims, sizes.batch * sizes.kv_heads * sizes.key_len * dims
        blocks = (sizes.query_len / sympy.Integer(self.block)) * (sizes.key_len / sympy.Integer(self.block))
        table = 4 * work.SCORE_PASSES * heads * blocks
        return *self.last_rows_works(sizes, kernel), scores, work.elementwise(queries + keys + table), attending

    def rewrite(self, editor: Editor, site: AttentionSite) -> None:
        mask = editor.move_to(site).mask_operands(site)
        chosen = {"key_flags": mask.key_flags, "query_start": mask.query_start, "scale": site.scale, **self.selection()}
        operands = {f"head_{name}": editor.head_numbers(site, name) for name in self.head_numbers()}
        most = self.most
        if operands and None not in operands.values():
            chosen |= {**operands, "columns": (), "diagonals": (), "blocks": (), "most": self._operand_room}
            most = self._operand_room + ALWAYS  # of every layer that the graph serves
        if editor.sequence or lists_are_large(site, self.block, *(() if self.by_block else (most,))):
            attending = {"seq_major": site.output_stride_order != "bhqd", **empty_row_operands(editor, site)}
            both = PatternAttentionCall.bind(site.query, site.key, site.value, **chosen, **attending)
            self.replace(editor, site, editor.items(editor.emit(both), 1)[0])
            return
        counts, indices = editor.items(editor.emit(SelectPatternCall.bind(site.query, site.key, **chosen)), 2)
        self.replace(editor, site, attention_call(editor, site, blocks=(counts, indices), block_size=self.block))

    def selection(self) -> dict[str, Any]:
        """The fields of `SelectPatternCall` that the options decide."""
        numbers = {name: self._blocks(getattr(self, name)) for name in self.by_head if name != "blocks" or self.by_block}
        return {
            **numbers,
            "mass": self.mass or 0.0,
            "divergence": self.divergence or 0.0,
            "queries": self.queries,
            "block_size": self.block,
        }

    @classmethod
    def kind(cls, options: dict[str, Any]) -> dict[str, Any]:
        method = cls.model_validate(options)
        if not method.head_numbers():
            return options
        shared = {name: value for name, value in options.items() if name not in cls.by_head}
        return {**shared, "room": method._operand_room, "by_block": method.by_block}

    def head_numbers(self) -> dict[str, tuple[float, ...]]:
        model_wide = self.for_all_heads()  # a process may have one head of many
        if len(model_wide._by_head()) == 1:
            return {}
        numbers = {name: self._blocks(one) for name, one in zip(self.by_head, zip(*self._by_head(), strict=True), strict=True)}
        if not model_wide.by_block:
            del numbers["blocks"]
        return dict(numbers)

    def keep_all(self) -> MInference:
        return self.for_heads_alike(columns=MOST, diagonals=0, blocks=0, mass=None, divergence=None)


def _shown(patterns: Sequence[tuple[int, ...]], by_block: bool, most: int = 6) -> str:
    """How many heads have which, the most frequent ones."""
    text = lambda numbers: " + ".join(map(str, numbers if by_block else numbers[:2]))
    counts = Counter("every key" if MOST in numbers else text(numbers) for numbers in patterns).most_common()
    named = ", ".join(f"{text} in {count} heads" if count > 1 else f"{text} in a head" for text, count in counts[:most])
    return named + (f", others in {sum(count for _, count in counts[most:])}" if len(counts) > most else "")
