"""Sums that are read from peers, in processes that have a GPU each."""

from __future__ import annotations

from typing import Any

import torch

from sparsify.distributed import collectives, peers
from sparsify.generation.decoding.runner import CudaGraphs
from tests.support import tensor_parallel

MOST = 1 << 18


def prepared() -> tuple[int, str]:
    """What the default group finds: bytes that it reads from peers at most, and the obstacle."""
    found = peers.prepare(torch.distributed.group.WORLD.group_name, _device(), MOST)
    return found.most, found.obstacle


def differences(shapes: list[tuple[int, ...]], turns: int) -> list[tuple[str, float, float]]:
    """For each dtype and shape the largest differences of sums read from peers from NCCL's, called and replayed from a CUDA graph in which
    each sum needs the one before it."""
    group, device, found = torch.distributed.group.WORLD.group_name, _device(), []
    buffer = peers.of(group, device).buffer
    assert buffer is not None
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    for dtype in peers.DTYPES:
        for shape in shapes:
            generator = torch.Generator(device).manual_seed(rank)
            part = torch.empty(shape, dtype=dtype, device=device)

            def chain(sum_of: Any, first: torch.Tensor = part) -> torch.Tensor:
                total = first
                for _ in range(4):
                    total = sum_of(total) / size + first
                return total

            ours, theirs = (lambda x: peers.read(buffer, x, group)), (lambda x: collectives.all_reduce(x, group))
            part.normal_(generator=generator)
            called = (ours(part) - theirs(part)).abs().max().item()
            runner, kept = CudaGraphs(device), []
            runner.warm(lambda: chain(ours))  # noqa: B023  (called at once)
            replay = runner.record(lambda: kept.append(chain(ours)))  # noqa: B023
            replayed = 0.0
            for _ in range(turns):
                part.normal_(generator=generator)
                replay()
                replayed = max(replayed, (kept[0] - chain(theirs)).abs().max().item())
            found.append((f"{dtype} {shape}", called, replayed))
    return found


def tokens(family: str, given: dict[str, tuple[Any, ...]], overrides: dict[str, Any]) -> dict[str, Any]:
    """For each case generated tokens of a model that tensor parallelism divides, and how plans say that sums are made."""
    results = {}
    for name, (ids, mask, options, *more) in given.items():
        model: Any = tensor_parallel.divided(family, "cuda", **overrides)
        mask = mask if mask is None else mask.cuda()
        result, plans = tensor_parallel.tokens_and_plans(model, ids.cuda(), mask, options, *more)
        results[name] = result.cpu(), sorted({plan.capture for plan in plans})
    return results


def _device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())
