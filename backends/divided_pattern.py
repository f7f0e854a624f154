"""Columns and diagonals of a text that is divided among processes: the rows that choose go to all of them, and each scores its own keys.

The last rows of a text are one process's, or two's where they reach into the chunk before, and in a padded batch anybody's. Of the
scores, each row's LSE travels, then what blocks get by column and by distance: a few numbers a block.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from sparsify.backends import dispatch
from sparsify.backends.select import patterns
from sparsify.distributed import collectives
from sparsify.distributed.sequence import Division
from sparsify.ops.pattern_attention import PatternAttentionCall
from sparsify.ops.patterns import SelectPatternCall

_choosing, _listing = dispatch.serve("choose_pattern"), dispatch.serve("list_pattern")
_QUERIES, _SUMS = "queries that choose", "what they look at"


class Patterned:
    """The lists of some heads of a call."""

    def __init__(self, division: Division, call: PatternAttentionCall, flags: Tensor | None):
        """flags: of all keys."""
        self.division, self.call = division, call
        # of the text's queries and keys nothing but their number is read
        unread = lambda tensor: tensor.new_empty(1).expand(*tensor.shape[:2], division.tokens, tensor.shape[3])
        self.whole = dataclasses.replace(call.selection(), query=unread(call.query), key=unread(call.key), key_flags=flags)
        self._queries: Tensor | None = None
        self._sums: Tensor | None = None

    def gather(self) -> None:
        """The queries of the rows that choose go to all processes: each is one's, and the others have 0 there."""
        call, division = self.call, self.division
        self.rows, self.known = patterns.last_rows(self.whole)
        places = torch.full((division.tokens,), -1, device=call.device)
        self.positions = division.positions(call.device)
        places[self.positions] = torch.arange(len(self.positions), device=call.device)
        own = places[self.rows]
        picked = patterns.rows_at(call.query, own.clamp(min=0)).masked_fill((own < 0)[:, None, :, None], 0)
        division.note(_QUERIES, picked, division.shard.size - 1)
        self._queries = collectives.all_reduce(picked, division.shard.group)

    def lists(self, rows: slice, end: int) -> tuple[SelectPatternCall, Tensor, Tensor]:
        """The call of some of this process's rows, which see the keys before `end`, and its block lists."""
        if self._sums is None:
            self._sums = self._looked_at()
        flags = self.whole.key_flags
        key, flags = self.whole.key[:, :, :end], None if flags is None else flags[:, :end]
        chosen = dataclasses.replace(self.whole, query=self.call.query[:, :, rows], key=key, key_flags=flags)
        return chosen, *_listing(chosen, *_choosing(chosen, self._sums, patterns.first_block(self.whole)))

    def drop(self) -> None:
        """No more lists are asked for."""
        self._queries = self._sums = None

    def _looked_at(self) -> Tensor:
        """`patterns.summed` over the keys of all processes."""
        assert self._queries is not None
        call, whole = self.call, self.whole
        # as many keys as a process has at most, so that all take as many steps
        each = 4 * call.batch * call.group * self.rows.shape[1] * 2 * self.division.chunk
        step = max(1, min(call.kv_heads, patterns.SCORE_BYTES // each))
        own = patterns.own_blocks(whole, self.rows)
        parts = []
        for begin in range(0, call.kv_heads, step):
            heads = slice(begin * call.group, min(call.kv_heads, begin + step) * call.group)
            mass = self._mass(self._queries[:, heads], call.key[:, begin : begin + step])
            # chunks begin at blocks, of which this process's last one alone may be shorter
            at = torch.div(self.positions[:: call.block_size], call.block_size, rounding_mode="floor")
            parts.append(patterns.summed(mass, own, at, whole.key_blocks))
        sums = torch.cat(parts, 2)
        self.division.note(_SUMS, sums, self.division.shard.size - 1)
        return collectives.all_reduce(sums, self.division.shard.group)

    def _mass(self, queries: Tensor, key: Tensor) -> Tensor:
        """What the choosing rows give each of this process's blocks, fp32 [batch, heads, rows, own blocks]."""
        call, division = self.call, self.division
        scores = patterns.scores(queries, key, self.rows, self.positions, call.key_flags, call.scale)
        own = scores.logsumexp(-1)
        division.note(_SUMS, own, division.shard.size - 1)
        total = collectives.gathering(own, division.shard.size, division.shard.group)().logsumexp(0)
        weights = scores.sub_(total[..., None]).exp_().nan_to_num_(0.0)  # a row that sees no key gives nothing
        return patterns.in_blocks(weights.mul_(self.known[:, None, :, None]), call.block_size)
