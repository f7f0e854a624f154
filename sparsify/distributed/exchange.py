"""What processes send each other of a text that they share: all of what is small, blocks that are asked for, or a ring's next part."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from sparsify.distributed.sequence import Division


def gathered(division: Division, own: Tensor, dim: int, what: str) -> Tensor:
    """All tokens' part of a tensor of which each process has its own tokens' along `dim`, in the order of the text."""
    counts = [division.count(rank) for rank in range(division.shard.size)]
    first = own.movedim(dim, 0).contiguous()
    padded = first.new_zeros(max(counts), *first.shape[1:])
    padded[: first.shape[0]] = first
    every = [torch.empty_like(padded) for _ in counts]
    division.note(what, first, division.shard.size - 1)
    dist.all_gather(every, padded, group=division.group)
    return in_order(division, every, 0).movedim(0, dim)


def in_order(division: Division, parts: Sequence[Tensor], dim: int) -> Tensor:
    """Parts of all processes, each in its process's order and perhaps longer than that, in the order of the text."""
    pieces: list[tuple[int, Tensor]] = []
    for rank, part in enumerate(parts):
        at = 0
        for first, last in division.spans(rank):
            pieces.append((first, part.narrow(dim, at, last - first)))
            at += last - first
    return torch.cat([piece for _, piece in sorted(pieces, key=lambda one: one[0])], dim)


def fetched(division: Division, own: Sequence[Tensor], needs: Tensor, block: int, what: str) -> list[Tensor]:
    """Tensors over the whole text in which the blocks are filled that this process needs; the others hold anything.

    Args:
        own: [batch, heads, own tokens, dim] each, of the same batch and heads.
        needs: bool [processes, batch, heads, blocks], on the device or on the host: which blocks of the text each process reads.
        block: tokens of a block; chunks begin at blocks.
        what: for the count of bytes.

    Returns:
        [batch, heads, tokens, dim] each.
    """
    batch, heads = own[0].shape[:2]
    size, me = division.shard.size, division.shard.rank
    device = own[0].device
    places = _places(division, block)
    whole = [part.new_empty(batch, heads, division.blocks(block) * block, part.shape[-1]) for part in own]
    blocked = [_blocked(division, part, block) for part in own]
    mine = places[me].to(device)
    for full, part in zip(whole, blocked, strict=True):
        _in_blocks(full, block)[:, :, mine] = part
    needs = needs.to(device)
    asked = [needs[rank][:, :, places[me].to(device)] if rank != me else None for rank in range(size)]
    wanted = [needs[me][:, :, places[rank].to(device)] if rank != me else None for rank in range(size)]
    # one wait for the device: how much goes where
    outgoing = [None if mask is None else mask.nonzero(as_tuple=True) for mask in asked]
    incoming = [None if mask is None else mask.nonzero(as_tuple=True) for mask in wanted]
    sends = [0 if index is None else len(index[0]) for index in outgoing]
    receives = [0 if index is None else len(index[0]) for index in incoming]
    for full, part in zip(whole, blocked, strict=True):
        rows = [part[index] for index in outgoing if index is not None]
        sent = torch.cat(rows) if rows else part.new_empty(0, block, part.shape[-1])
        got = sent.new_empty(sum(receives), block, part.shape[-1])
        division.note(what, sent)
        dist.all_to_all_single(got, sent.contiguous(), receives, sends, group=division.group)
        at = 0
        for rank, index in enumerate(incoming):
            if index is not None:
                rows_of, heads_of, blocks_of = index
                there = places[rank].to(device)[blocks_of]
                _in_blocks(full, block)[rows_of, heads_of, there] = got[at : at + receives[rank]]
                at += receives[rank]
    return [full[:, :, : division.tokens] for full in whole]


def _places(division: Division, block: int) -> list[Tensor]:
    """By process the numbers of its blocks in the text, int64, in its order."""
    return [
        torch.cat([torch.arange(first // block, -(-last // block)) for first, last in division.spans(rank)])
        for rank in range(division.shard.size)
    ]


def _blocked(division: Division, own: Tensor, block: int) -> Tensor:
    """[batch, heads, own tokens, dim] as [batch, heads, own blocks, block, dim]; the text's last block is filled up with zeros."""
    pieces, at = [], 0
    for first, last in division.spans():
        piece = own[:, :, at : at + last - first]
        pieces.append(torch.nn.functional.pad(piece, (0, 0, 0, -piece.shape[2] % block)).unflatten(2, (-1, block)))
        at += last - first
    return torch.cat(pieces, 2)


def _in_blocks(whole: Tensor, block: int) -> Tensor:
    return whole.view(*whole.shape[:2], -1, block, whole.shape[-1])


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
