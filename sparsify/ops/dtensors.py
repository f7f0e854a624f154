"""DTensors as operands of our ops: divided by heads, by the batch, or whole in all processes, each process's part is served by itself.

What an operand's dimensions are, its record says (`sparsify.ops.call.Operand`), so that one rule serves every op whose outputs begin with
batch and query heads. Numbers per head are narrowed to the process's heads. Nothing is sent: what is divided otherwise is refused.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from sparsify.distributed import shards
from sparsify.distributed.shards import Shard
from sparsify.errors import UnsupportedError
from sparsify.ops.attention import AttentionCall
from sparsify.ops.call import OpCall, schema_arguments
from sparsify.ops.library import NAMESPACE, defined, library
from sparsify.ops.selection import SelectCall
from sparsify.ops.sparse_attention import SparseAttentionCall

# whose outputs are all [batch, query_heads, ...]
_DIVIDED: tuple[type[OpCall], ...] = (AttentionCall, SelectCall, SparseAttentionCall)
_AXES = {"batch": ("batch",), "query_heads": ("query_heads", "kv_heads")}


def register() -> None:
    """Lets the ops take DTensors where `torch.distributed.tensor` is loaded: elsewhere there are none."""
    if "torch.distributed.tensor" in sys.modules:
        _register()


@functools.cache
def _register() -> None:
    from torch.distributed.tensor import DTensor

    register_rule = cast(Any, torch.library).register_torch_dispatch
    served = {record.NAME: functools.partial(_divided, record) for record in _DIVIDED}
    for name in defined():
        rule = served.get(name, functools.partial(_refused, name))
        register_rule(f"{NAMESPACE}::{name}", DTensor, _as_dispatched(rule), lib=library)


def _as_dispatched(rule: Callable[..., Any]) -> Callable[..., Any]:
    def dispatched(cls: Any, op: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        return rule(*args, **(kwargs or {}))

    return dispatched


def _refused(name: str, *args: Any, **options: Any) -> Any:
    raise UnsupportedError("operands are DTensors", where=f"{NAMESPACE}::{name}", hint="give each process's part: tensor.to_local()")


def _divided(record: type[OpCall], *args: Any, **options: Any) -> Any:
    from torch.distributed.tensor import DTensor

    call = record.bind(*args, **options)
    tensors = call.tensors()
    mesh, placements = _division(call, tensors)
    local: Any = call.map_tensors(lambda tensor: tensor.to_local() if shards.is_dtensor(tensor) else tensor)
    for axis, placement in enumerate(placements):
        if _axis(call, placement) == "query_heads":
            share = Shard(mesh.get_local_rank(axis), mesh.size(axis), "")
            local = dataclasses.replace(local, **_numbers(local, call, share))
    outputs = [DTensor.from_local(output, mesh, placements, run_check=False) for output in local.run()]
    return tuple(outputs)


def _numbers(local: OpCall, call: OpCall, share: Shard) -> dict[str, Any]:
    """The fields with a number for each head, narrowed to the heads of a process along one dimension of the mesh."""
    heads = next(iter(call.tensors().values())).shape[1]
    found: dict[str, Any] = {}
    for argument in schema_arguments(type(call)):
        if argument.wire in ("int[]", "float[]") and len(getattr(call, argument.name)) == heads > 1:
            numbers: tuple[float, ...] = getattr(local, argument.name)
            found[argument.name] = share.own(numbers, len(numbers) // share.size)
    return found


def _division(call: OpCall, tensors: dict[str, Tensor]) -> tuple[Any, tuple[Any, ...]]:
    """The mesh and the placements of the first operand, after which all others have to be placed.

    Raises:
        UnsupportedError: what is placed otherwise.
    """
    divided = {name: tensor for name, tensor in tensors.items() if shards.is_dtensor(tensor)}
    first = next(iter(tensors))
    hint = "Shard or Replicate all alike, by batch or by heads"
    need: Callable[[bool, str], None] = lambda holds, otherwise: call.need(holds, otherwise, hint)
    need(first in divided, f"{first} is no DTensor, and {next(iter(divided))} is one")
    mesh, placements = divided[first].device_mesh, divided[first].placements
    for axis, placement in enumerate(placements):
        along = _axis(call, placement)
        need(along is not None, f"{first} is placed as {placement}")
        for name, tensor in tensors.items():
            at = _dimension(call, name, tensor, along or "")
            if name not in divided:
                need(at is None, f"{name} is no DTensor, and {first} is placed as {placement}")
                continue
            need(divided[name].device_mesh == mesh, f"{name} lies on another mesh than {first}")
            placed = divided[name].placements[axis]
            need(placed.is_replicate() if at is None else placed.is_shard(at), f"{name} is placed as {placed}, {first} as {placement}")
            need(at is None or tensor.shape[at] % mesh.size(axis) == 0, f"{name} does not divide evenly among {mesh.size(axis)} processes")
    return mesh, placements


def _axis(call: OpCall, placement: Any) -> str | None:
    """What a placement of the first operand divides: "batch", "query_heads", or nothing (""); None: anything else."""
    if placement.is_replicate():
        return ""
    operand = schema_arguments(type(call))[0].operand
    names = [] if operand is None else [name for name, _ in operand.sizes]
    at: int = placement.dim if placement.is_shard() else -1
    return names[at] if at >= 0 and names[at] in _AXES else None


def _dimension(call: OpCall, name: str, tensor: Tensor, along: str) -> int | None:
    """Which dimension of an operand lies along what is divided; None where none does, or it has one element for all."""
    operand = next(argument.operand for argument in schema_arguments(type(call)) if argument.name == name)
    for at, (size, may_be_one) in enumerate(() if operand is None else operand.sizes):
        if size in _AXES.get(along, ()) and not (may_be_one and tensor.shape[at] == 1):
            return at
    return None
