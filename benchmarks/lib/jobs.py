"""The cells of a benchmark, which several processes take from one queue until it is empty."""

from __future__ import annotations

import multiprocessing
import sys
from collections.abc import Callable, Iterable
from typing import Any


def run(work: Callable[..., int], cells: Iterable[Any], jobs: int, *given: Any) -> int:
    """Serves cells in `jobs` processes; one is this one.

    Args:
        work: called with the queue, which ends in None for each process, and `given`; returns how many cells failed. A module's own
            function, so that other processes find it.

    Returns:
        exit status: 1 where a cell failed or a process died, else 0.
    """
    spawn = multiprocessing.get_context("spawn")
    queue = spawn.Queue()
    for cell in [*cells, *[None] * jobs]:
        queue.put(cell)
    if jobs == 1:
        return 1 if work(queue, *given) else 0
    processes = [spawn.Process(target=_job, args=(work, queue, given)) for _ in range(jobs)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    return 1 if any(process.exitcode for process in processes) else 0


def _job(work: Callable[..., int], queue: Any, given: tuple[Any, ...]) -> None:
    sys.exit(1 if work(queue, *given) else 0)
