"""Several processes that run a function together, over gloo on the CPU or with a GPU each; they live as long as tests ask for them.

    results = processes.run(2, work, "llama", rows=2)      # [work("llama", rows=2) in each process, in order of ranks]

`work` is a function of a module, and its arguments and result can be pickled.
"""

from __future__ import annotations

import atexit
import datetime
import importlib
import os
import socket
import sys
import traceback
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.multiprocessing as mp

SECONDS = 120  # a process that says nothing for so long hangs
_STARTING = 600  # until it has imported what it needs: a minute where cores are few and busy

_pools: dict[int, Pool] = {}


class Pool:
    """Processes that form one group.

    Args:
        count: how many.
        patience: seconds after which a collective gives up.
        gpus: each has a GPU, and collectives are NCCL's.
    """

    def __init__(self, count: int, patience: int = 60, gpus: bool = False):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        context = mp.get_context("spawn")
        self.pipes: list[Connection] = []
        self.members: list[Any] = []
        for rank in range(count):
            mine, theirs = context.Pipe()
            member = context.Process(target=_serve, args=(theirs, rank, count, port, patience, gpus, sys.path[:]), daemon=True)
            member.start()
            self.pipes.append(mine)
            self.members.append(member)
        for step in ("imports", "joins the group"):  # all at once: whoever joins waits `patience` for the others
            for rank, pipe in enumerate(self.pipes):
                if not pipe.poll(_STARTING):
                    self.end()
                    raise TimeoutError(f"rank {rank} hangs while it {step}")
                pipe.recv()
            for pipe in self.pipes:
                pipe.send("go on")

    def run(self, function: Any, *args: Any, **kwargs: Any) -> list[Any]:
        """What the function gives in each process. Raises AssertionError with what a process raised, TimeoutError where one hangs."""
        found = self.outcomes(function, *args, **kwargs)
        failed = [f"rank {rank}:\n{error}" for rank, (error, _) in enumerate(found) if error]
        assert not failed, "\n".join(failed)
        return [result for _, result in found]

    def outcomes(self, function: Any, *args: Any, **kwargs: Any) -> list[tuple[str, Any]]:
        """The traceback, empty without one, and the result of each process."""
        for pipe in self.pipes:
            pipe.send((function.__module__, function.__qualname__, args, kwargs))
        found = []
        for rank, pipe in enumerate(self.pipes):
            if not pipe.poll(SECONDS):
                self.end()
                raise TimeoutError(f"rank {rank} hangs")
            try:
                found.append(pipe.recv())
            except EOFError:
                found.append(("it ended", None))
        return found

    def end(self) -> None:
        for member in self.members:
            member.kill()


def run(count: int, function: Any, *args: Any, **kwargs: Any) -> list[Any]:
    """`Pool.run` in processes that are kept for the next call."""
    if count not in _pools or not all(member.is_alive() for member in _pools[count].members):
        _pools[count] = Pool(count)
        atexit.register(_pools[count].end)
    return _pools[count].run(function, *args, **kwargs)


def _serve(pipe: Connection, rank: int, count: int, port: int, patience: int, gpus: bool, path: list[str]) -> None:
    sys.path[:] = path
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    torch.set_num_threads(1)
    importlib.import_module("sparsify.generation.generate")  # and with it transformers
    pipe.send("imported")
    pipe.recv()
    how: dict[str, Any] = {"backend": "gloo"}
    if gpus:
        torch.cuda.set_device(rank)
        how = {"backend": "nccl", "device_id": torch.device("cuda", rank)}
    torch.distributed.init_process_group(**how, timeout=datetime.timedelta(seconds=patience))
    pipe.send("joined")
    pipe.recv()
    while True:
        module, name, args, kwargs = pipe.recv()
        error, result = "", None
        try:
            result = getattr(importlib.import_module(module), name)(*args, **kwargs)
        except Exception:
            error = traceback.format_exc()
        pipe.send((error, result))
