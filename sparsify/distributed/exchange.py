"""What processes send each other of a text that they share: all of what is small, blocks that are asked for, rows, or a ring's next part.

An exchange that is begun goes on beside the caller's computations, on a stream of its own where the device has streams, until it is waited
for. Processes begin the same exchanges in the same order.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sparsify.distributed import collectives
from sparsify.distributed.sequence import Division


@functools.cache
def _stream(device: torch.device) -> Any:
    """One for all exchanges of a device: the allocator keeps memory by stream."""
    return torch.cuda.Stream(device) if device.type == "cuda" else None


@contextlib.contextmanager
def beside(device: torch.device, *, after: bool = True) -> Generator[None]:
    """What is launched in this block runs beside what the caller launches after it. Tensors that it reads are to be kept until `join`.

    after: it begins after what the caller has launched before it; False: it reads nothing but what an earlier block like this could.
    """
    if (stream := _stream(device)) is None:
        yield
        return
    if after:
        stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        yield


def join(device: torch.device, *made: Tensor) -> None:
    """What is launched from here on runs after what was launched `beside`. made: tensors from there that are read from here on."""
    if (stream := _stream(device)) is None:
        return
    current = torch.cuda.current_stream(device)
    current.wait_stream(stream)
    for tensor in made:
        tensor.record_stream(current)


class OnHost:
    """A small tensor of integers on its way to the host."""

    def __init__(self, numbers: Tensor):
        self._arrived: Any = None
        self._numbers = numbers
        if numbers.device.type == "cuda":
            self._numbers = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
            self._numbers.copy_(numbers, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record(torch.cuda.current_stream(numbers.device))

    def read(self) -> Any:
        """As nested lists, when they are there: other work of the device goes on."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._numbers.tolist()


def gathered(division: Division, own: Tensor, dim: int, what: str) -> Tensor:
    """All tokens' part of a tensor of which each process has its own tokens' along `dim`, in the order of the text, contiguous."""
    return gathering(division, own, dim, what)()


def gathering(division: Division, own: Tensor, dim: int, what: str) -> Callable[[], Tensor]:
    """Begins `gathered`; what it returns waits for it and gives the tensor."""
    counts, device = [division.count(rank) for rank in range(division.shard.size)], own.device
    with beside(device):
        padded = own.contiguous()
        if (missing := max(counts) - own.shape[dim]) > 0:
            padded = torch.cat((padded, padded.new_zeros([missing if i == dim else n for i, n in enumerate(own.shape)])), dim)
        division.note(what, own, division.shard.size - 1)
        every = collectives.gathering(padded, len(counts), division.shard.group)

    def wait(kept: Tensor = own) -> Tensor:
        with beside(device, after=False):
            found = in_order(division, every().unbind(0), dim)
        join(device, found)
        return found

    return wait


def in_order(division: Division, parts: Sequence[Tensor], dim: int) -> Tensor:
    """Parts of all processes, each in its process's order and perhaps longer than that, in the order of the text."""
    pieces: list[tuple[int, Tensor]] = []
    for rank, part in enumerate(parts):
        at = 0
        for first, last in division.spans(rank):
            pieces.append((first, part.narrow(dim, at, last - first)))
            at += last - first
    return torch.cat([piece for _, piece in sorted(pieces, key=lambda one: one[0])], dim)


class Blocks:
    """Tensors over a whole text, of which this process has its own tokens at first and then the blocks that it asks for.

    whole: [batch, heads, tokens, dim] each; blocks that are neither its own nor were asked for hold anything.
    room: the same up to a whole number of blocks.
    """

    def __init__(self, division: Division, own: Sequence[Tensor], block: int, what: str):
        """
        Args:
            own: [batch, heads, own tokens, dim] each, of the same batch and heads.
            block: tokens of a block; chunks begin at blocks.
            what: for the count of bytes.
        """
        self.division, self.block, self.what = division, block, what
        self.shape = own[0].shape[:2]
        room = division.blocks(block) * block
        # a CPU's kernel looks at all values whether they are finite, and a GPU's at what it visits
        empty = torch.empty if own[0].is_cuda else torch.zeros
        self.room = [empty(*self.shape, room, part.shape[-1], dtype=part.dtype, device=part.device) for part in own]
        self.whole = [full[:, :, : division.tokens] for full in self.room]
        at = 0
        for first, last in division.spans():
            for full, part in zip(self.whole, own, strict=True):
                full[:, :, first:last] = part[:, :, at : at + last - first]
            at += last - first
        if room > division.tokens and division.spans()[-1][1] == division.tokens:
            for full in self.room:  # the last block is sent whole
                full[:, :, division.tokens :].zero_()

    def ask(self, needs: Tensor) -> Asked:
        """Begins to fetch blocks.

        Args:
            needs: bool [processes, batch, heads, blocks], the same for all processes, on the device or on the host: which blocks of the
                text each process reads. Its own do not travel.
        """
        return Asked(self, needs)


class Asked:
    """Blocks that were asked for: `send` once it is known how many, `arrive` when they are to be read."""

    def __init__(self, blocks: Blocks, needs: Tensor):
        self.blocks = blocks
        device, me = blocks.whole[0].device, blocks.division.shard.rank
        self._needs = needs  # kept while the stream beside reads it
        with beside(device):
            owned = owners(blocks.division, blocks.block, needs.device)
            out = (needs & owned[me]).flatten(1)
            out[me] = False
            wanted = (needs[me] & owned[:, None, None]).flatten(1)
            wanted[me] = False
            self._masks = out, wanted
            self._counts = OnHost(torch.stack((out.sum(1), wanted.sum(1))))
        self._arriving: list[tuple[Any, Tensor, Tensor]] = []
        self._kept: list[Tensor] = []

    def send(self) -> None:
        """Waits until the device knows what was asked for, and lets it travel."""
        blocks, division = self.blocks, self.blocks.division
        sends, receives = self._counts.read()
        device = blocks.whole[0].device
        with beside(device, after=False):  # what the caller computes meanwhile has nothing to do with it
            # rows of all processes' masks, one after the other: a block's number among batch, heads and blocks
            outgoing, incoming = (
                torch.nonzero_static(mask, size=sum(count))[:, 1].to(device)
                for mask, count in zip(self._masks, (sends, receives), strict=True)
            )
            for full in blocks.room:
                rows = full.view(-1, blocks.block * full.shape[-1])
                sent = rows.index_select(0, outgoing)
                got = rows.new_empty(sum(receives), rows.shape[1])
                division.note(blocks.what, sent)
                work = dist.all_to_all_single(got, sent, receives, sends, group=division.group, async_op=True)
                self._arriving.append((work, rows, got))
                self._kept.append(sent)
            self._at = incoming

    def arrive(self) -> None:
        """The blocks are in their places for whatever is launched from here on."""
        device = self.blocks.whole[0].device
        with beside(device, after=False):
            for work, rows, got in self._arriving:
                work.wait()
                rows.index_copy_(0, self._at, got)
        join(device)
        self._arriving.clear()
        self._kept.clear()


def fetched(division: Division, own: Sequence[Tensor], needs: Tensor, block: int, what: str) -> list[Tensor]:
    """Tensors over the whole text in which the blocks are filled that this process needs; the others hold anything.

    Args:
        own, block, what: as of `Blocks`.
        needs: as of `Blocks.ask`.

    Returns:
        [batch, heads, tokens, dim] each.
    """
    blocks = Blocks(division, own, block, what)
    asked = blocks.ask(needs)
    asked.send()
    asked.arrive()
    return blocks.whole


def needed(division: Division, read: Tensor) -> Tensor:
    """Which blocks each process reads, bool [processes, ...], from what this one does. For `Blocks.ask`: it is known `beside`."""
    with beside(read.device):
        mine = read.to(torch.uint8)
        division.note("which blocks", mine, division.shard.size - 1)
        return collectives.gathering(mine, division.shard.size, division.shard.group)() != 0


def owners(division: Division, block: int, device: torch.device) -> Tensor:
    """Who has a block: bool [processes, blocks]. Made on the device: a copy from the host would wait for it."""
    size = division.shard.size
    chunk = torch.arange(division.blocks(block), device=device) * block // division.chunk
    return torch.minimum(chunk, 2 * size - 1 - chunk) == torch.arange(size, device=device)[:, None]


def swapped(division: Division, parts: Sequence[Tensor], sizes: Sequence[int], what: str) -> Callable[[], list[Tensor]]:
    """Begins to send every process a tensor of its own, and to receive one from each.

    Args:
        parts: by process, contiguous, of one dtype; the one for this process is empty.
        sizes: by process, elements of what it sends here.
        what: for the count of bytes.

    Returns:
        waits, and gives what came, by process, of one dimension.
    """
    device = parts[0].device
    with beside(device):
        sent = torch.cat([part.flatten() for part in parts])
        got = sent.new_empty(sum(sizes))
        division.note(what, sent)
        work: Any = dist.all_to_all_single(got, sent, [*sizes], [part.numel() for part in parts], group=division.group, async_op=True)

    def wait(kept: Sequence[Tensor] = parts) -> list[Tensor]:
        with beside(device, after=False):
            work.wait()
        join(device, got, sent)
        return list(got.split([*sizes]))

    return wait


def ring(division: Division, own: Sequence[Tensor], dim: int, what: str) -> Iterator[tuple[int, list[Tensor]]]:
    """Every process's tensors after the other, this one's first, then those of the one before it, and so on around the ring.

    While a process's are used, the next ones are on their way.

    Yields:
        the process, and its tensors.
    """
    size, me = division.shard.size, division.shard.rank
    held, members = [part.contiguous() for part in own], dist.get_process_group_ranks(division.group)
    after, before = members[(me + 1) % size], members[(me - 1) % size]
    for turn in range(size):
        rank, works, coming = (me - turn) % size, [], []
        if turn + 1 < size:
            count = division.count((rank - 1) % size)
            for part in held:
                shape = [*part.shape]
                shape[dim] = count
                coming.append(part.new_empty(shape))
                division.note(what, part)
            pairs = zip(held, coming, strict=True)
            sending = [
                op
                for part, place in pairs
                for op in (
                    dist.P2POp(dist.isend, part, after, division.group),
                    dist.P2POp(dist.irecv, place, before, division.group),
                )
            ]
            works = dist.batch_isend_irecv(sending)
        yield rank, held
        for work in works:
            work.wait()
        held = coming
