"""Measures what processes send each other, where several are started: rates of an exchange and of a sum, and what the smallest takes."""

from __future__ import annotations

import contextlib
import datetime
import os
import statistics
import time
from collections.abc import Callable, Generator
from typing import Any

import torch
import torch.distributed as dist

from sparsify.costs.profile import Links
from sparsify.errors import ProfileError

# bytes that a process sends in a timed exchange and sums, and as few as a token's sum has
_BYTES, _SMALL, _FEW = 1 << 28, 1 << 20, 8192
_TIMES, _IN_A_ROW = 7, 20


@contextlib.contextmanager
def started(device: str) -> Generator[int]:
    """In this block the processes that torchrun started are one group, if there are several: gives how many."""
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1 or dist.is_initialized():
        yield dist.get_world_size() if dist.is_initialized() else 1
        return
    if device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group("nccl" if device == "cuda" else "gloo", timeout=datetime.timedelta(minutes=2))
    try:
        yield count
    finally:
        dist.destroy_process_group()


def is_first() -> bool:
    """Whether this is the first process of the default group."""
    return dist.get_rank() == 0


def measure(device: str, *, small: bool = False) -> Links:
    """The links among the processes of the default group, the same in all of them. All of them call it.

    Args:
        device: "cuda" or "cpu".
        small: a megabyte, for tests.

    Raises:
        ProfileError: there is one process alone.
    """
    processes = dist.get_world_size()
    if processes == 1:
        raise ProfileError("one process sends nothing", where="links", hint="torchrun --nproc-per-node N")
    size = _SMALL if small else _BYTES
    values = torch.zeros(size // 2 // processes * processes, dtype=torch.bfloat16, device=device)
    came = torch.empty_like(values)
    few = torch.zeros(_FEW // 2, dtype=torch.bfloat16, device=device)
    # of an exchange a process keeps its own part
    sent = values.numel() * 2 * (processes - 1) // processes
    exchange = _seconds(lambda: dist.all_to_all_single(came, values), device)
    summed = _seconds(lambda: dist.all_reduce(values), device)
    latency = _seconds(lambda: [dist.all_reduce(few) for _ in range(_IN_A_ROW)], device) / _IN_A_ROW
    return Links(
        exchange=sent / exchange,
        reduce=2 * sent / summed,
        latency=latency,
        processes=processes,
        source=f"sparsify calibrate device, {datetime.date.today()}",
    )


def _seconds(run: Callable[[], Any], device: str) -> float:
    """Median seconds of a call, of the slowest process."""
    times = []
    for _ in range(_TIMES + 1):
        dist.barrier()
        _settle(device)
        began = time.perf_counter()
        run()
        _settle(device)
        times.append(time.perf_counter() - began)
    slowest = torch.tensor(statistics.median(times[1:]), device=device)
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    return slowest.item()


def _settle(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
