"""When a generation stops, and how the host learns of it: by waiting for every token, or one token late without waiting."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.generation import stopping_criteria as stock


@dataclass(frozen=True)
class Criteria:
    """transformers' stopping criteria by where they can be asked.

    max_length: tokens of a row, the prompt included; None without a limit.
    deadlines: seconds since the epoch.
    eos: tokens that end their row, tested as part of a token's step.
    pads: whether a row that has ended goes on with padding.
    texts: those that compute on the device without waiting for it, asked after every step.
    others: all criteria, as they were given, where one of them may do anything; then every token is waited for. Else None.
    """

    max_length: int | None
    deadlines: tuple[float, ...]
    eos: tuple[int, ...]
    pads: bool
    texts: tuple[Any, ...]
    others: Any

    @property
    def by_content(self) -> bool:
        """Whether what is generated can end it."""
        return bool(self.eos or self.texts or self.others is not None)

    def ended(self, length: int) -> bool:
        """Whether length or time end all rows at once. length: tokens of each row so far."""
        late = bool(self.deadlines) and time.time() > min(self.deadlines)
        return late or (self.max_length is not None and length >= self.max_length)


def sort_criteria(criteria: Sequence[Any]) -> Criteria:
    """The criteria by kind. Reads the tokens that end a row from the device."""
    lengths: list[int] = []
    deadlines: list[float] = []
    eos: list[int] = []
    texts, others = [], None
    for criterion in criteria:
        kind = type(criterion)  # a subclass may do anything
        if kind is stock.MaxLengthCriteria:
            lengths.append(criterion.max_length)
        elif kind is stock.MaxTimeCriteria:
            deadlines.append(criterion.initial_timestamp + criterion.max_time)
        elif kind is stock.EosTokenCriteria:
            eos += criterion.eos_token_id.flatten().tolist()
        elif kind is stock.StopStringCriteria:
            texts.append(criterion)
        else:
            others = criteria
    pads = any(hasattr(criterion, "eos_token_id") for criterion in criteria)
    return Criteria(min(lengths, default=None), tuple(deadlines), tuple(dict.fromkeys(eos)), pads, tuple(texts), others)


class Watch:
    """Tells after each token whether all rows have ended, waiting for the device; hands tokens to the streamer.

    status: bool [2] on the device, written by each step: see `Step`.
    """

    def __init__(self, status: Tensor, tokens: Tensor, streamer: Any = None):
        self.status, self.tokens, self.streamer = status, tokens, streamer

    def __call__(self) -> bool:
        """After a step was started: whether to stop."""
        if self.streamer is not None:
            self.streamer.put(self.tokens[:, 0].cpu())
        return self._judge(self.status)

    def finish(self) -> int:
        """After the last step: how many steps ran after the one that ended all rows."""
        return 0

    def _judge(self, status: Tensor) -> bool:
        ended, improper = status.tolist()
        if improper:
            raise RuntimeError("probability tensor contains either `inf`, `nan` or element < 0")
        return ended


class LateWatch(Watch):
    """Tells the same one token later: the host reads a step's status while the next one runs; the loop undoes one too many."""

    def __init__(self, status: Tensor, tokens: Tensor, streamer: Any = None):
        super().__init__(status, tokens, streamer)
        pinned = status.device.type == "cuda"
        self._slots = [
            (
                torch.empty(status.shape, dtype=status.dtype, pin_memory=pinned),
                torch.empty(tokens.shape[0], dtype=tokens.dtype, pin_memory=pinned),
                torch.cuda.Event(blocking=True) if pinned else None,
            )
            for _ in range(2)
        ]
        self._unread: list[int] = []
        self._steps = 0
        self._ended = False

    def __call__(self) -> bool:
        slot = self._steps % 2
        status, tokens, copied = self._slots[slot]
        status.copy_(self.status, non_blocking=True)
        if self.streamer is not None:
            tokens.copy_(self.tokens[:, 0], non_blocking=True)
        if copied is not None:
            copied.record()
        self._steps += 1
        self._unread.append(slot)
        return self._read() if len(self._unread) == 2 else False

    def finish(self) -> int:
        extra = len(self._unread) if self._ended else 0
        while self._unread and not self._ended:
            self._read()
        return extra

    def _read(self) -> bool:
        status, tokens, copied = self._slots[self._unread.pop(0)]
        if copied is not None:
            copied.synchronize()
        if self.streamer is not None:
            self.streamer.put(tokens.clone())
        self._ended = self._judge(status)
        return self._ended
