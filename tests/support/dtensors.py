"""Ops over DTensors among the processes of the default group."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import sparsify.backends  # noqa: F401  (registers kernels)
from sparsify.errors import SparsifyError
from sparsify.ops import dtensors
from sparsify.ops.attention import AttentionCall
from sparsify.ops.linear import LinearCall
from sparsify.ops.selection import SelectCall
from sparsify.ops.sparse_attention import SparseAttentionCall

HEADS, KV_HEADS, TOKENS, DIM = 4, 2, 200, 16
OPTIONS: dict[str, dict[str, Any]] = {
    "attention": {"windows": (0, 30, 50, 0), "sinks": 2},
    "select_blocks": {"threshold": (0.2, 0.4, 0.6, 0.9), "block_size": 64},
    "sparse_attention": {"threshold": (0.2, 0.4, 0.6, 0.9), "block_size": 64},
}
RECORDS = {one.NAME: one for one in (AttentionCall, SelectCall, SparseAttentionCall)}


def call_of(name: str, batch: int = 2) -> Any:
    """A call with numbers per head, padding that all batch rows share, and for attention sink logits."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (2 * torch.randn(batch, n, TOKENS, DIM, generator=generator) for n in (HEADS, KV_HEADS, KV_HEADS))
    flags = torch.ones(1, TOKENS, dtype=torch.uint8)
    flags[0, :9] = 0
    more: dict[str, Any] = {} if name == "select_blocks" else {"value": value}
    if name == "attention":
        more["sink_logits"] = torch.randn(HEADS, generator=generator)
    return RECORDS[name](query=query, key=key, **more, key_flags=flags, scale=DIM**-0.5, causal=True, **OPTIONS[name])


def placed(call: Any, by: str) -> Any:
    """The same call over DTensors. by: "batch", "heads", "" (whole), or "batch heads" over two dimensions of a mesh."""
    dtensors.register()
    size = torch.distributed.get_world_size()
    shape = (2, size // 2) if " " in by else (size,)
    mesh = init_device_mesh("cpu", shape)
    along = {"key_flags": {}, "sink_logits": {"heads": 0}}
    given: dict[str, Tensor] = {}
    for name, tensor in call.tensors().items():
        dims = along.get(name, {"batch": 0, "heads": 1})
        where = [Shard(dims[word]) if word in dims else Replicate() for word in (by.split() or [""])]
        given[name] = distribute_tensor(tensor, mesh, where)
    return call.map_tensors(lambda tensor: next(new for name, new in given.items() if call.tensors()[name] is tensor))


def outputs(name: str, by: str) -> list[tuple[Tensor, bool]]:
    """What a call over DTensors gives, whole, and whether it came as a DTensor."""
    found = placed(call_of(name), by).run()
    wide = [one.to(torch.int32) if one.dtype is torch.int16 else one for one in found]  # which gloo does not send
    return [(one.full_tensor(), isinstance(one, DTensor)) for one in wide]


def told(kind: str) -> str:
    """What a call says that is not served."""
    call = call_of("attention")
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    put = lambda tensor, *where: distribute_tensor(tensor, mesh, where)
    dtensors.register()
    try:
        if kind == "linear":
            LinearCall(put(torch.ones(1, 1, 8), Replicate()), put(torch.ones(4, 8), Replicate())).run()
        elif kind == "by tokens":
            call.map_tensors(lambda tensor: put(tensor, Shard(2) if tensor.dim() == 4 else Replicate())).run()
        elif kind == "mixed":
            dataclasses.replace(placed(call, "heads"), key=call.key).run()
        elif kind == "otherwise":
            dataclasses.replace(placed(call, "heads"), key=put(call.key, Replicate())).run()
        elif kind == "uneven":
            placed(call_of("attention", batch=3), "batch").run()
    except SparsifyError as error:
        return f"{type(error).__name__}: {error}"
    return ""
