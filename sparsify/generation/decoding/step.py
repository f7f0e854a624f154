"""One token of a generation as a function without arguments over buffers that never move, so that a CUDA graph of it can be replayed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sparsify.generation.decoding.processors import Part


class Step:
    """The forward of the last token of every row, the choice of the next one, and all that is kept about the rows.

    Args:
        forward: takes `input_ids` [rows, 1] and `position_ids`, returns the last token's logits [rows, vocabulary]; stores the token in the
            cache.
        rows: sequences that are generated side by side.
        size: tokens that a row may have in all.
        positions: position ids of the prompt, [..., prompt_len]; those of a token have the same leading dimensions.
        parts: logits processors; None where they cannot be recorded: then `choose` is left to the caller.
        sample: draw from the distribution rather than take its maximum.
        eos: tokens that end their row.
        pad: the token that fills a row once it has ended, int64 []; None where rows go on with generated tokens.

    Buffers:
        token       int64 [rows, 1]     last token of each row, not yet in the cache
        position    int64 [..., 1]      its position
        length      int64 [1]           tokens of each row so far, the last one included
        sequences   int64 [rows, size]  all of them
        running     int64 [rows]        1 for rows that have not ended
        seen        bool [rows, vocabulary + 1] or None: see `processors.State`
        status      bool [2]            all rows have ended; some row's scores were no distribution (inf or nan)
        logits, scores  fp32 [rows, vocabulary]  of the last call, before and after the processors
    """

    def __init__(
        self,
        forward: Callable[..., Tensor],
        rows: int,
        size: int,
        positions: Tensor,
        *,
        parts: tuple[Part, ...] | None,
        sample: bool,
        eos: tuple[int, ...],
        pad: Tensor | None,
    ):
        integers: dict[str, Any] = {"dtype": torch.long, "device": positions.device}
        self.forward, self.parts, self.sample = forward, parts, sample
        self.eos = torch.tensor(eos, **integers) if eos else None
        self.pad = None if pad is None else pad.clone()
        self.token = torch.zeros(rows, 1, **integers)
        self.position = positions.new_zeros(*positions.shape[:-1], 1)  # with strides of its own, not of the prompt
        self.length = torch.zeros(1, **integers)
        self.sequences = torch.zeros(rows, size, **integers)
        self.running = torch.ones(rows, **integers)
        self.status = torch.zeros(2, dtype=torch.bool, device=positions.device)
        self.seen: Tensor | None = None
        self.logits = self.scores = torch.empty(0)
        self._masks: dict[tuple[int, ...], Tensor] = {}

    def begin(self, ids: Tensor, positions: Tensor, pad: Tensor | None, seen: Tensor | None) -> None:
        """Takes over a prompt, ids [rows, prompt_len]; `choose` of its next token follows."""
        self.sequences[:, : ids.shape[1]] = ids
        self.length.fill_(ids.shape[1])
        self.position.copy_(positions[..., -1:])
        self.running.fill_(1)
        self.status.zero_()
        if pad is not None and self.pad is not None:
            self.pad.copy_(pad)
        if seen is not None:
            self.seen = seen if self.seen is None else self.seen.copy_(seen)

    def __call__(self) -> None:
        """One token: what a CUDA graph holds."""
        self.logits = self.forward(input_ids=self.token, position_ids=self.position)
        if self.parts is None:
            return
        scores = self.logits
        for part in self.parts:
            scores = part(scores, self)
        self.scores = scores
        self.choose(scores)

    def choose(self, scores: Tensor) -> None:
        """The next token of every row, from fp32 [rows, vocabulary] after all processors."""
        self.take(self.draw(scores) if self.sample else torch.argmax(scores, dim=-1))

    def draw(self, scores: Tensor) -> Tensor:
        """What torch.multinomial draws, by the same arithmetic from the same random numbers, but for its check, which waits for the
        device: that is left in `status`."""
        return drawn(self.probabilities(scores))

    def probabilities(self, scores: Tensor) -> Tensor:
        """Of scores [..., vocabulary]; that they are no distribution is left in `status`."""
        found = torch.nn.functional.softmax(scores, dim=-1)
        self.status[1:].logical_or_(~((found.max() < torch.inf) & (found.min() >= 0)))
        return found

    def take(self, tokens: Tensor) -> None:
        """Appends one token to every row, int64 [rows]."""
        if self.pad is not None:
            tokens = tokens * self.running + self.pad * (1 - self.running)
        self.sequences.index_copy_(1, self.length, tokens[:, None])
        self.token.copy_(tokens[:, None])
        self.length.add_(1)
        self.position.add_(1)
        if self.seen is not None:
            self.seen.scatter_(1, tokens[:, None], True)
        if self.eos is not None:
            self.end((tokens[:, None] == self.eos).any(-1))

    def end(self, rows: Tensor) -> None:
        """Marks rows as ended, bool [rows]."""
        self.running.mul_(~rows)
        self.status[:1].copy_(self.running.max() == 0)

    def mask(self, tokens: tuple[int, ...], scores: Tensor) -> Tensor:
        """Which of the vocabulary `tokens` are, bool [vocabulary]. Made at the first call, which is not recorded."""
        if tokens not in self._masks:
            vocabulary = scores.shape[-1]
            mask = torch.zeros(vocabulary, dtype=torch.bool)
            mask[[token for token in tokens if 0 <= token < vocabulary]] = True
            self._masks[tokens] = mask.to(scores.device)
        return self._masks[tokens]


def drawn(probabilities: Tensor) -> Tensor:
    """Tokens drawn from probabilities, or from numbers in proportion to them, [..., vocabulary]."""
    return torch.argmax(probabilities / torch.empty_like(probabilities).exponential_(1), dim=-1)
