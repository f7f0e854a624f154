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
from pydantic import Field, field_validator

from sparsify.ops.limits import cdiv
from sparsify.ops.pattern_attention import PatternAttentionCall
from sparsify.ops.patterns import ALWAYS, SelectPatternCall, most_of_both
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
# passes over the scores of the rows that choose: product, mask, softmax, sums, in fp32
_PASSES = 7


class MInference(PromptPass):
    """columns, diagonals: tokens of keys, rounded up to blocks."""

    name: ClassVar[str] = "minference"
    by_head: ClassVar[tuple[str, ...]] = ("columns", "diagonals")
    lists_blocks: ClassVar[bool] = True

    columns: int | tuple[int, ...] = Field(
        1024, description="keys, in tokens, that every later query sees: columns of blocks; a list gives one number per query head"
    )
    diagonals: int | tuple[int, ...] = Field(
        4096, description="keys, in tokens, at distances that every query sees: diagonals of blocks; a list gives one number per query head"
    )
    mass: float | None = Field(
        None,
        gt=0,
        le=1,
        description="share of what the last queries look at: a head visits as few columns as hold it, and as few diagonals, up to the "
        "numbers given; none: as many as are given",
    )
    queries: int = Field(64, ge=1, le=1024, description="last queries whose attention chooses columns and diagonals")
    block: Literal[64, 128] = Field(128, description="tokens in a block of queries and of keys")

    @field_validator("columns", "diagonals")
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
        return most_of_both(self._blocks(self.columns), self._blocks(self.diagonals)) + ALWAYS

    @property
    def _operand_room(self) -> int:
        """Columns and diagonals that lists have room for where the numbers are operands: a power of two, so that layers whose heads need
        about as much are of one kind. Of all of the model's heads, as layers are: those of one process may need less in one layer alone."""
        most = self.for_all_heads().most - ALWAYS
        return 1 << (most - 1).bit_length() if most else 0

    def _by_head(self) -> list[tuple[int, int]]:
        """Columns and diagonals in tokens, of one head for all or of each."""
        both = [one if isinstance(one, tuple) else (one,) for one in (self.columns, self.diagonals)]
        count = max(map(len, both))
        return list(zip(*(numbers if len(numbers) == count else numbers * count for numbers in both), strict=True))

    def share(self, key_len: Any) -> sympy.Expr:
        """Of a prompt's causal blocks, those that are visited, the mean over heads: no head visits more than all."""
        shares = Counter(sum(self._blocks(both)) + ALWAYS for both in self._by_head())
        every = [count * work.smallest(1, 2 * most * self.block / sympy.sympify(key_len)) for most, count in shares.items()]
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
        most = "all" if any(MOST in both for both in heads) else f"up to {self.most}"
        note = f"{most} key blocks of {self.block} by columns and diagonals of the last {self.queries} queries"
        if self.mass is not None:
            note += f", as few as hold {self.mass:.0%} of what these look at"
        if len(heads) > 1:
            note += f"; columns + diagonals: {_shown(heads)}"
        note += self.last_rows_note
        note += context.travels("queries that choose, what they look at, and visited keys and values", site, links.key_value_bytes)
        works = functools.partial(self.works, kernel=context.family)
        return Proposal.from_work(self, site, context, works, min_key_len=start, note=note)

    def works(self, sizes: AttentionSizes, kernel: str) -> tuple[Work, ...]:
        """The scores of the rows that choose, then attention along the lists."""
        heads = sizes.batch * sizes.query_heads
        keys = sizes.batch * sizes.kv_heads * sizes.key_len * sizes.qk_head_dim * sizes.dtype.itemsize
        scores = work.elementwise(keys + 4 * _PASSES * heads * self.queries * sizes.key_len)
        attending = work.attention(sizes, kernel, share=self.share(sizes.key_len), listed=True)
        return *self.last_rows_works(sizes, kernel), scores, attending

    def rewrite(self, editor: Editor, site: AttentionSite) -> None:
        mask = editor.move_to(site).mask_operands(site)
        chosen = {"key_flags": mask.key_flags, "query_start": mask.query_start, "scale": site.scale, **self.selection()}
        operands = {f"head_{name}": editor.head_numbers(site, name) for name in self.head_numbers()}
        if operands and None not in operands.values():
            chosen |= {**operands, "columns": (), "diagonals": (), "most": self._operand_room}
        if editor.sequence or lists_are_large(site, self.block, self.most):
            attending = {"seq_major": site.output_stride_order != "bhqd", **empty_row_operands(editor, site)}
            both = PatternAttentionCall.bind(site.query, site.key, site.value, **chosen, **attending)
            self.replace(editor, site, editor.items(editor.emit(both), 1)[0])
            return
        counts, indices = editor.items(editor.emit(SelectPatternCall.bind(site.query, site.key, **chosen)), 2)
        self.replace(editor, site, attention_call(editor, site, blocks=(counts, indices), block_size=self.block))

    def selection(self) -> dict[str, Any]:
        """The fields of `SelectPatternCall` that the options decide."""
        columns, diagonals = self._blocks(self.columns), self._blocks(self.diagonals)
        numbers = {"columns": columns, "diagonals": diagonals, "mass": self.mass or 0.0}
        return {**numbers, "queries": self.queries, "block_size": self.block}

    @classmethod
    def kind(cls, options: dict[str, Any]) -> dict[str, Any]:
        method = cls.model_validate(options)
        if not method.head_numbers():
            return options
        return {**{name: value for name, value in options.items() if name not in cls.by_head}, "room": method._operand_room}

    def head_numbers(self) -> dict[str, tuple[float, ...]]:
        model_wide = self.for_all_heads()  # a process may have one head of many
        if len(model_wide._by_head()) == 1:
            return {}
        columns, diagonals = zip(*self._by_head(), strict=True)
        return {"columns": self._blocks(columns), "diagonals": self._blocks(diagonals)}

    def keep_all(self) -> MInference:
        return self.model_copy(update={"columns": MOST, "diagonals": 0, "mass": None})


def _shown(patterns: Sequence[tuple[int, int]], most: int = 6) -> str:
    """How many heads have which, the most frequent ones."""
    counts = Counter("every key" if MOST in both else f"{both[0]} + {both[1]}" for both in patterns).most_common()
    named = ", ".join(f"{text} in {count} heads" if count > 1 else f"{text} in a head" for text, count in counts[:most])
    return named + (f", others in {sum(count for _, count in counts[most:])}" if len(counts) > most else "")
