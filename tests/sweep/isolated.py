"""Functions in processes of their own, so that one that hangs, dies or fills the memory costs nothing but itself."""

from __future__ import annotations

import math
import multiprocessing
import os
import pickle
import resource
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from typing import Any

# forked: what the parent has imported and compiled need not be again
_PROCESSES = multiprocessing.get_context("fork")


@dataclass
class Task:
    """name: of the caller's. work(send): sends values, of which those sent before it hangs or dies count."""

    name: Any
    work: Callable[[Callable[[Any], None]], None]
    sent: list[Any] = field(default_factory=list)
    end: str = ""  # "done", "late", "died", or "stopped" with all others
    seconds: float = 0.0


@dataclass(frozen=True)
class Limits:
    """Of one process: cpu_s, so that a busy machine makes nothing late; wall_s for one that waits; memory_gib. stop: of all together, a
    time of `time.monotonic`, after which none begins and those that run are killed."""

    cpu_s: int = 120
    wall_s: float = 1800.0
    memory_gib: float = 8.0
    stop: float = math.inf


def run(tasks: Iterable[Task], jobs: int, limits: Limits) -> Iterator[Task]:
    """The tasks as they end, `jobs` at a time."""
    waiting, running = iter(tasks), {}
    while True:
        while len(running) < jobs and time.monotonic() < limits.stop and (task := next(waiting, None)) is not None:
            receiver, sender = _PROCESSES.Pipe(duplex=False)
            process = _PROCESSES.Process(target=_work, args=(task, sender, limits), daemon=True)
            process.start()
            sender.close()
            running[receiver] = (task, process, time.monotonic())
        if not running:
            return
        ready = wait(list(running), timeout=1.0)
        for receiver in list(running):
            task, process, begin = running[receiver]
            if receiver in ready and _receive(receiver, task):
                continue
            stopped = receiver not in ready and time.monotonic() > limits.stop
            late = receiver not in ready and time.monotonic() - begin > limits.wall_s
            if receiver not in ready and not late and not stopped:
                continue
            if late or stopped:
                process.kill()
            process.join()
            late = late or process.exitcode == -signal.SIGXCPU
            task.end = "late" if late else "stopped" if stopped else "done" if process.exitcode == 0 else "died"
            task.seconds = time.monotonic() - begin
            receiver.close()
            del running[receiver]
            yield task


def _receive(receiver: Connection, task: Task) -> bool:
    """Takes one value; False when there will be no more."""
    try:
        task.sent.append(receiver.recv())
    except (EOFError, OSError, pickle.UnpicklingError):  # the last for one that died while it sent
        return False
    return True


def _work(task: Task, sender: Connection, limits: Limits) -> None:
    silent = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(silent, stream)
    most = int(limits.memory_gib * 2**30)
    resource.setrlimit(resource.RLIMIT_DATA, (most, most))
    used = int(time.process_time())  # a fork begins with none, but that is not promised
    # at the hard limit a process is killed like one that dies
    resource.setrlimit(resource.RLIMIT_CPU, (used + limits.cpu_s, used + limits.cpu_s + 5))
    task.work(sender.send)
    sender.close()
    os._exit(0)  # without torch's and Python's farewells, of which there are many after a fork
