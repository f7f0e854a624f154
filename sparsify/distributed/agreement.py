"""Whether all processes of a group do the same, asked before they meet in collectives that would wait for each other or mix results."""

from __future__ import annotations

import datetime
import functools
import hashlib
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sparsify.distributed.shards import process_group
from sparsify.errors import DistributedError

# how long a process waits for the others to come to the same point: loading and compiling differ by minutes
PATIENCE = datetime.timedelta(minutes=10)


def digest(value: Any) -> str:
    """What tells two values apart, short: of tensors their content, of anything else its text."""
    if isinstance(value, Tensor):
        content = value.detach().cpu().contiguous()
        text = f"{tuple(content.shape)} {content.dtype} ".encode() + content.view(torch.uint8).numpy().tobytes()
    else:
        text = repr(value).encode()
    return hashlib.sha256(text).hexdigest()[:12]


def agree(group: str, facts: Mapping[str, str], *, where: str, patience: datetime.timedelta = PATIENCE) -> None:
    """Compares facts with the other processes of a group; every one of them must call this.

    Args:
        group: the group's name.
        facts: by what they are about; short texts, as `digest` gives them.
        where: what the processes are about to do, for messages.
        patience: how long to wait for the others.

    Raises:
        DistributedError: on every process: a fact differs, with the ranks and what each has; or a process did not come.
    """
    found = told(group, dict(facts), where=where, patience=patience)
    members = dist.get_process_group_ranks(process_group(group))
    for name in dict.fromkeys(name for one in found for name in one):
        said = [one.get(name, "nothing") for one in found]
        if len(set(said)) > 1:
            shown = ", ".join(f"rank {rank}: {text}" for rank, text in zip(members, said, strict=True))
            raise DistributedError(f"processes differ in {name} ({shown})", where=where, hint="give every process the same")


def told(group: str, value: Any, *, where: str, patience: datetime.timedelta = PATIENCE) -> list[Any]:
    """What every process of a group says, in order of ranks; every one of them must call this.

    Args:
        group: the group's name.
        value: what this one says; can be pickled.
        where, patience: as in `agree`.

    Raises:
        DistributedError: a process did not come.
    """
    found: list[Any] = [value] * len(dist.get_process_group_ranks(process_group(group)))
    if len(found) == 1:
        return found
    try:
        talk = _talk(group, patience)
        dist.monitored_barrier(talk, timeout=patience, wait_all_ranks=True)
        dist.all_gather_object(found, value, group=talk)
    except RuntimeError as error:
        raise stopped(error, where) from error
    return found


@functools.cache
def _talk(group: str, patience: datetime.timedelta) -> Any:
    """A group of the same processes that talks through the hosts, so that waiting occupies no device and ends after `patience`, for a
    process that is gone before the group is made too."""
    members = dist.get_process_group_ranks(process_group(group))
    return dist.new_group(members, timeout=patience, backend="gloo", use_local_synchronization=True)


# what gloo and NCCL say where a peer is gone or does not answer
_SIGNS = ("connection closed", "connection reset", "timed out", "timeout", "rank(s)", "broken pipe", "nccl", "gloo", "unhealthy")


def is_loss(error: BaseException) -> bool:
    """Whether an error tells that another process is gone or does not answer."""
    return isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in _SIGNS)


def stopped(error: BaseException, where: str) -> DistributedError:
    """The error to raise for one that `is_loss` recognises."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    what = f"another process stopped or does not answer: {lines[0][:200] if lines else type(error).__name__}"
    return DistributedError(what, where=where, hint="its own output tells why; start all processes again")
