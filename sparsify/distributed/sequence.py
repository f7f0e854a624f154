"""How a text is divided among processes for context parallelism: zig-zag, so that under a causal mask each has as much to do.

A text of n tokens is cut into 2 · size chunks of equal length, the last ones shorter or empty; process r has chunks r and
2 · size - 1 - r, in this order. Where there are enough tokens, chunks are whole blocks of 128, so that what is chosen by block is what one
process chooses.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
from collections.abc import Generator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sparsify.distributed.shards import Shard, process_group
from sparsify.errors import DistributedError

# chunks are multiples of this where a text is long enough for it
BLOCK = 128

# tokens of a prompt for each process, at least
_LEAST = 4

# name of the mesh dimension that context parallelism divides the text along
DIMENSION = "cp"


@dataclass(frozen=True)
class Division:
    """A text and how it is divided.

    tokens: of the text, padding included.
    shard: this process and its group.
    chunk: tokens of a whole chunk.
    padded: whether some token of the text, this process's or another's, is padding.
    sent: bytes that this process has sent so far, by what they were.
    """

    tokens: int
    shard: Shard
    chunk: int
    padded: bool = False
    sent: dict[str, int] = field(default_factory=dict, compare=False)

    @classmethod
    def of(cls, tokens: int, shard: Shard, padded: bool = False) -> Division:
        """Raises DistributedError where a process would not have two tokens: on every process, since all know the length."""
        if tokens < _LEAST * shard.size:
            what = f"a prompt of {tokens} tokens is shorter than {_LEAST} for each of the {shard.size} processes that share it"
            raise DistributedError(what, where="context parallelism", hint="compile without mesh= for such prompts")
        parts = 2 * shard.size
        # one token would be taken for a step of decoding; the last process has the middle chunks, of which the second may be empty
        aligned = -(-tokens // (parts * BLOCK)) * BLOCK
        return cls(tokens, shard, aligned if (shard.size - 1) * aligned + 1 < tokens else -(-tokens // parts), padded)

    @property
    def regime(self) -> int:
        """The length by which methods are chosen, the same for all processes and for texts up to twice as long."""
        return 1 << (self.tokens.bit_length() - 1)

    @property
    def group(self) -> Any:
        return process_group(self.shard.group)

    @property
    def aligned(self) -> bool:
        """Whether chunks begin at blocks."""
        return self.chunk % BLOCK == 0

    def blocks(self, size: int) -> int:
        """Blocks of `size` tokens in the text, the last one perhaps shorter."""
        return -(-self.tokens // size)

    def span(self, chunk: int) -> tuple[int, int]:
        """First token of a chunk and the one after its last."""
        return min(chunk * self.chunk, self.tokens), min((chunk + 1) * self.chunk, self.tokens)

    def spans(self, rank: int | None = None) -> list[tuple[int, int]]:
        """The tokens of a process (None: of this one), as ranges that are not empty, in the order in which it has them."""
        rank = self.shard.rank if rank is None else rank
        found = [self.span(chunk) for chunk in (rank, 2 * self.shard.size - 1 - rank)]
        return [(first, last) for first, last in found if first < last]

    def count(self, rank: int | None = None) -> int:
        """Tokens of a process."""
        return sum(last - first for first, last in self.spans(rank))

    def scaled(self, rows: int, tokens: int) -> Division:
        """The same division of a text that has `rows` for every `tokens` of this one; chunks are multiples of these."""
        return dataclasses.replace(self, tokens=-(-self.tokens // tokens) * rows, chunk=self.chunk // tokens * rows)

    def own(self, whole: Tensor, dim: int) -> Tensor:
        """This process's part of a tensor over all tokens."""
        return torch.cat([whole.narrow(dim, first, last - first) for first, last in self.spans()], dim)

    def positions(self, device: torch.device | str) -> Tensor:
        """Of this process's tokens in the text, int64 [tokens]."""
        return torch.cat([torch.arange(first, last, device=device) for first, last in self.spans()])

    def note(self, what: str, tensor: Tensor, times: int = 1) -> None:
        """That a tensor is sent `times` times."""
        self.sent[what] = self.sent.get(what, 0) + times * tensor.numel() * tensor.element_size()


# how the text is divided whose call is under way
_current: contextvars.ContextVar[Division | None] = contextvars.ContextVar("sparsify_division", default=None)


@contextlib.contextmanager
def dividing(division: Division) -> Generator[Division]:
    """Calls in this block are over a text that is divided so."""
    token = _current.set(division)
    try:
        yield division
    finally:
        _current.reset(token)


def under_way() -> Division | None:
    """The division of the text whose call is under way in this thread; None where none is divided."""
    return _current.get()


def current(group: str, tokens: int) -> Division:
    """The division of the call under way.

    Args:
        group: among whose processes the text is divided.
        tokens: that this process has.

    Raises:
        DistributedError: the call is not over such a text.
    """
    division = _current.get()
    if division is None or division.shard.group != group or division.count() != tokens:
        what = (
            f"{tokens} tokens are no part of a text that is being read" if division is None else f"{tokens} tokens, not {division.count()}"
        )
        raise DistributedError(what, where="context parallelism", hint="call the model that sparsify.compile(mesh=...) returned")
    return division
