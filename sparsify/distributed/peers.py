"""Memory that the processes of a group read in each other's devices, for sums of a few kilobytes: those of a generated token.

A sum through NCCL takes about as long for eight kilobytes as for a hundred. Here each process puts its part where the others can read it
(torch's symmetric memory), waits until all have, and adds up all parts itself: one kernel, `symm_mem::one_shot_all_reduce_copy`, on the
stream of the computation. NVLink's multicast is not used.

Whether a group can do so is found once, by all of its processes together, and tried: where one of them cannot, none does.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparsify.distributed import agreement, collectives
from sparsify.distributed.shards import process_group
from sparsify.errors import DistributedError

log = logging.getLogger(__name__)

WHERE = "sums read from peers"
# among others torch's kernel adds in an order that is each process's own, so that their results would differ in the last bit
PROCESSES = (2, 4, 8)
DTYPES = (torch.bfloat16, torch.float32)
# a part's bytes are a multiple of this, and it begins at one
ALIGNED = 16
_SECONDS = 30.0  # after which a sum that is tried hangs
_NO_MULTICAST = "TORCH_SYMM_MEM_DISABLE_MULTICAST"


@dataclass(frozen=True)
class Peers:
    """What is known of a group and one of its devices.

    most: bytes of a part that is summed so, at most; 0: none is.
    buffer: uint8 [most], which all processes of the group read; None where none is summed so.
    obstacle: why none is; empty where that is nothing to speak of, as on CPUs.
    """

    most: int = 0
    buffer: Tensor | None = None
    obstacle: str = ""

    def takes(self, part: Tensor) -> bool:
        """Whether a part is summed so; it may be a symbolic one, whose size is then asked for."""
        if self.most == 0 or part.dtype not in DTYPES:
            return False
        size = part.numel() * part.element_size()
        return bool(size <= self.most and size % ALIGNED == 0)


NOBODY = Peers()

# by name of the group and device: the group that had the name, and what was found
_found: dict[tuple[str, torch.device], tuple[Any, Peers]] = {}


def of(group: str, device: torch.device) -> Peers:
    """What `prepare` found; nobody where it was not asked."""
    return _found.get((group, _numbered(device)), (None, NOBODY))[1]


def _numbered(device: torch.device) -> torch.device:
    """The same device with its number: "cuda" is the current one."""
    return torch.device("cuda", torch.cuda.current_device()) if device == torch.device("cuda") else device


def prepare(group: str, device: torch.device, most: int) -> Peers:
    """Finds out whether a group's sums can be read from peers. All of its processes call this, in the same order; once for each device.

    Args:
        group: its name.
        device: this process's.
        most: bytes of a part that is to be summed so, at most; where processes differ, the least of them.

    Raises:
        DistributedError: a process did not come, or a sum that was tried does not end.
    """
    device = _numbered(device)
    key, members = (group, device), process_group(group)
    if key not in _found or _found[key][0] is not members:  # a group that was destroyed leaves its name to others
        _found[key] = members, NOBODY if device.type != "cuda" else _tried(group, device, most)
    return _found[key][1]


def _tried(group: str, device: torch.device, most: int) -> Peers:
    """Each step is taken by all processes or by none: what one of them cannot do would leave the others waiting."""
    most = min(agreement.told(group, most, where=WHERE)) // ALIGNED * ALIGNED
    hosts = agreement.told(group, socket.gethostname(), where=WHERE)
    if most <= 0:
        return Peers(obstacle="not expected to be faster")
    obstacle = _obstacle(len(hosts), device) if len({*hosts}) == 1 else "the processes are on several hosts"
    buffer: Tensor | None = None
    with _without_multicast():
        steps = (lambda _: _reserve(most, device), lambda made: _meet(made, group), lambda made: _try(made, group, len(hosts)))
        for step in steps:
            if not obstacle:
                buffer, obstacle = _attempted(step, buffer)
            said = agreement.told(group, obstacle, where=WHERE)
            if any(said):
                obstacle = next(f"rank {rank}: {one}" for rank, one in enumerate(said) if one)
                log.warning("small sums go through NCCL: %s", obstacle)
                return Peers(obstacle=obstacle)
    return Peers(most, buffer)


def _obstacle(processes: int, device: torch.device) -> str:
    if processes not in PROCESSES:
        return f"{processes} processes, not one of {', '.join(map(str, PROCESSES))}"
    if torch.version.hip is not None:
        return "not tried on AMD GPUs"
    if not hasattr(torch.ops.symm_mem, "one_shot_all_reduce_copy"):
        return f"torch {torch.__version__} has no symm_mem::one_shot_all_reduce_copy"
    away = [other for other in range(torch.cuda.device_count()) if other != device.index]
    if not all(torch.cuda.can_device_access_peer(device, other) for other in away):
        return "the GPUs cannot read each other's memory"
    return ""


def _attempted(step: Callable[[Any], Tensor], buffer: Tensor | None) -> tuple[Tensor | None, str]:
    """The buffer that a step makes or takes, or why it failed. A sum that hangs is no reason to go on."""
    try:
        return step(buffer), ""
    except DistributedError:
        raise
    except Exception as error:
        log.debug("small sums cannot be read from peers", exc_info=error)
        lines = str(error).splitlines()
        return None, f"{type(error).__name__}: {lines[0][:200] if lines else ''}"


@contextlib.contextmanager
def _without_multicast() -> Generator[None]:
    """torch makes a multicast object of all memory that processes share, where the devices can: it would be unused."""
    before = os.environ.get(_NO_MULTICAST)
    os.environ[_NO_MULTICAST] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_NO_MULTICAST]
        else:
            os.environ[_NO_MULTICAST] = before


def _symmetric_memory() -> Any:
    from torch.distributed import _symmetric_memory

    return _symmetric_memory


def _reserve(most: int, device: torch.device) -> Tensor:
    return _symmetric_memory().empty(most, dtype=torch.uint8, device=device)


def _meet(buffer: Tensor, group: str) -> Tensor:
    _symmetric_memory().rendezvous(buffer, group)
    return buffer


def _try(buffer: Tensor, group: str, processes: int) -> Tensor:
    """Compares sums with those of the group's own collectives: of either type, of few and of the most bytes, one right after the other."""
    most, rank = buffer.numel(), torch.distributed.get_rank(process_group(group))
    wrong: list[str] = []  # told at the end: the others go on with the next sum
    for dtype in DTYPES:
        for size in dict.fromkeys((min(most, 8192), most, ALIGNED)):
            numbers = torch.arange(size // dtype.itemsize, device=buffer.device)
            # small integers, whose sums have no rounding
            parts = [((numbers * (7 + turn) + 3 * rank) % 16).to(dtype) for turn in range(2)]
            sums = [read(buffer, part, group) for part in parts]
            _await(buffer.device)
            wanted = [collectives.all_reduce(part, group) for part in parts]
            if not all(torch.equal(*pair) for pair in zip(sums, wanted, strict=True)):
                wrong.append(f"{size} bytes of {dtype}")
    if wrong:
        raise ValueError(f"sums of {processes} parts were wrong: {', '.join(wrong)}")
    return buffer


def _await(device: torch.device) -> None:
    """Waits for the device, which a kernel that waits for another process may never leave."""
    done = torch.cuda.Event()
    done.record(torch.cuda.current_stream(device))
    began = time.monotonic()
    while not done.query():
        if time.monotonic() - began > _SECONDS:
            raise DistributedError(f"a sum has not ended after {_SECONDS:.0f} s", where=WHERE, hint="compile with peer_sums = false")
        time.sleep(1e-3)


def read(buffer: Tensor, part: Tensor, group: str) -> Tensor:
    """The sum over the processes of a group, in a new tensor of the same shape and dtype, the same in all of them.

    Args:
        buffer: of `Peers`.
        part: contiguous, no larger than the buffer; `Peers.takes` it.
    """
    if part.storage_offset() * part.element_size() % ALIGNED:
        part = part.clone()
    place = buffer.view(part.dtype)[: part.numel()].view(part.shape)
    return torch.ops.symm_mem.one_shot_all_reduce_copy(place, part, "sum", group)
