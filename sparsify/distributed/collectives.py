"""torch's collectives in the form that compiled code holds: functions of tensors, which Inductor schedules and CUDA graphs record."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# the operators that torch.distributed's functional collectives are traced to; a group is known by its name
_functional: Any = torch.ops._c10d_functional


def merged(output: Tensor, lse: Tensor, size: int, group: str) -> Tensor:
    """Attention to the keys of all processes of a group from what each has found over its own.

    Args:
        output: [batch, heads, rows, dim].
        lse: fp32 [batch, heads, rows], -inf where a process has no key.
        size: processes of the group.

    Returns:
        [batch, heads, rows, dim] in the output's dtype, the same in all of them; 0 where none has a key.
    """
    packed = torch.cat((output.float(), lse[..., None]), -1)
    every = gathering(packed, size, group)()
    outputs, sums = every.split([output.shape[-1], 1], -1)
    top = sums.amax(0)
    shares = (sums - top.masked_fill(top == -torch.inf, 0)).exp()
    return ((outputs * shares).sum(0) / shares.sum(0).clamp(min=1e-30)).to(output.dtype)


def all_reduce(tensor: Tensor, group: str) -> Tensor:
    """The sum over the processes of a group, in a new tensor of the same shape and dtype, the same in all of them."""
    return _functional.wait_tensor(_functional.all_reduce(tensor, "sum", group))


def gathering(tensor: Tensor, size: int, group: str) -> Callable[[], Tensor]:
    """Begins to gather a tensor of the same shape from all processes of a group.

    Args:
        size: processes of the group.

    Returns:
        waits, and gives them in order of ranks, [size, *shape].
    """
    every = _functional.all_gather_into_tensor(tensor.contiguous(), size, group)
    return lambda: _functional.wait_tensor(every).unflatten(0, (size, -1))
