"""Which heads of a model are this process's, where tensor parallelism has divided them (DTensor, transformers' `tp_plan`)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeGuard, TypeVar, cast

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

Numbers = TypeVar("Numbers", tuple[int, ...], tuple[float, ...])

# name of the mesh dimension that tensor parallelism divides, in torch's tutorials and in transformers
DIMENSION = "tp"


@dataclass(frozen=True)
class Shard:
    """A process's share of what is divided evenly, in order of ranks.

    rank: of this process in the group.
    size: processes of the group.
    group: the group's name, by which collectives in compiled code know it.
    """

    rank: int
    size: int
    group: str

    def own(self, numbers: Numbers, local: int) -> Numbers:
        """Of one number per head those of this process's heads; all of them where there are not as many as heads of all processes.

        Args:
            numbers: for example thresholds.
            local: heads of this process.
        """
        if self.size == 1 or len(numbers) != local * self.size:
            return numbers
        return numbers[self.rank * local : (self.rank + 1) * local]


def process_group(name: str) -> Any:
    """The process group of a name, as compiled code knows it. Raises RuntimeError where there is none."""
    from torch.distributed import distributed_c10d

    return cast(Any, distributed_c10d)._resolve_process_group(name)


def is_dtensor(tensor: Any) -> TypeGuard[DTensor]:
    """Whether a tensor is a DTensor; imports nothing where there can be none."""
    if type(tensor) in (Tensor, nn.Parameter) or not torch.distributed.is_available():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def find(tensors: Iterable[Any]) -> Shard | None:
    """This process's share, from the first tensor that is divided by tensor parallelism; None where none is."""
    for tensor in tensors:
        if is_dtensor(tensor) and (shard := _of_mesh(tensor.device_mesh)) is not None:
            return shard
    return None


def _of_mesh(mesh: Any) -> Shard | None:
    """The share along the mesh's dimension for tensor parallelism: the one of that name, or the only one where it has no name."""
    names = mesh.mesh_dim_names
    if names is None and mesh.ndim == 1:
        along = mesh
    elif names is not None and DIMENSION in names:
        along = mesh[DIMENSION]
    else:
        return None
    return Shard(along.get_local_rank(), along.size(), along.get_group().group_name)
