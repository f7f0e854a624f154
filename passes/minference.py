"""minference: key columns and diagonals that the last queries look at, head by head; attention visits only those blocks.

Jiang et al., "MInference 1.0", arXiv 2407.02490: the vertical-slash pattern, and with no columns and few diagonals its A-shape. There
columns and diagonals are of tokens; here of blocks, so that the attention kernels of any block list serve them.

What a row sees depends on the last rows of its call: values stay causal, but which of them is not.
"""

from __future__ import annotations

import functools
from typing import ClassVar, Literal

import sympy
from pydantic import Field, field_validator

from sparsify.ops.limits import cdiv
from sparsify.ops.pattern_attention import PatternAttentionCall
from sparsify.ops.patterns import ALWAYS, SelectPatternCall
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
    refuse_common,
    work,
)

_MOST = 1 << 22
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
    queries: int = Field(64, ge=1, le=1024, description="last queries whose attention chooses columns and diagonals")
    block: Literal[64, 128] = Field(128, description="tokens in a block of queries and of keys")

    @field_validator("columns", "diagonals")
    @classmethod
    def _in_range(cls, value: int | tuple[int, ...]) -> int | tuple[int, ...]:
        values = value if isinstance(value, tuple) else (value,)
        if not values or not all(0 <= one <= _MOST for one in values):
            raise ValueError(f"must lie between 0 and {_MOST}")
        return value

    def _blocks(self, tokens: int | tuple[int, ...]) -> tuple[int, ...]:
        return tuple(cdiv(one, self.block) for one in (tokens if isinstance(tokens, tuple) else (tokens,)))

    @property
    def most(self) -> int:
        """Key blocks that a query block visits at most."""
        return max(self._blocks(self.columns)) + max(self._blocks(self.diagonals)) + ALWAYS

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
        # from where at most half of the blocks are visited
        start = 4 * self.most * self.block if context.min_length is None else context.min_length
        note = f"up to {self.most} key blocks of {self.block} by columns and diagonals of the last {self.queries} queries"
        note += self.last_rows_note
        note += context.travels("queries that choose, what they look at, and visited keys and values", site, links.key_value_bytes)
        works = functools.partial(self.works, kernel=context.family)
        return Proposal.from_work(self, site, context, works, min_key_len=start, note=note)

    def works(self, sizes: AttentionSizes, kernel: str) -> tuple[Work, ...]:
        """The scores of the rows that choose, then attention along the lists."""
        heads = sizes.batch * sizes.query_heads
        keys = sizes.batch * sizes.kv_heads * sizes.key_len * sizes.qk_head_dim * sizes.dtype.itemsize
        scores = work.elementwise(keys + 4 * _PASSES * heads * self.queries * sizes.key_len)
        share = work.smallest(1, 2 * self.most * self.block / sympy.sympify(sizes.key_len))
        return *self.last_rows_works(sizes, kernel), scores, work.attention(sizes, kernel, share=share, listed=True)

    def rewrite(self, editor: Editor, site: AttentionSite) -> None:
        mask = editor.move_to(site).mask_operands(site)
        chosen = {
            "key_flags": mask.key_flags,
            "query_start": mask.query_start,
            "scale": site.scale,
            "columns": self._blocks(self.columns),
            "diagonals": self._blocks(self.diagonals),
            "queries": self.queries,
            "block_size": self.block,
        }
        if editor.sequence:
            attending = {"seq_major": site.output_stride_order != "bhqd", **empty_row_operands(editor, site)}
            both = PatternAttentionCall.bind(site.query, site.key, site.value, **chosen, **attending)
            self.replace(editor, site, editor.items(editor.emit(both), 1)[0])
            return
        counts, indices = editor.items(editor.emit(SelectPatternCall.bind(site.query, site.key, **chosen)), 2)
        self.replace(editor, site, attention_call(editor, site, blocks=(counts, indices), block_size=self.block))

    def keep_all(self) -> MInference:
        return self.model_copy(update={"columns": _MOST, "diagonals": 0})
