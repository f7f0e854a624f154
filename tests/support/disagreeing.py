"""What processes do that do not do the same, or are gone."""

from __future__ import annotations

import datetime
import os
import time
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

import sparsify
from sparsify.distributed import agreement
from sparsify.errors import SparsifyError
from tests.support.harness import strict
from tests.support.tensor_parallel import divided, whole


def _told(act: Any) -> str:
    begin = time.monotonic()
    try:
        act()
    except SparsifyError as error:
        assert time.monotonic() - begin < 60
        return f"{type(error).__name__}: {error}"
    return ""


def options(way: str) -> str:
    """What compiling says where each process has a window of its own."""
    settings = strict(passes=["sink_window"], sink_window={"window": 10 + dist.get_rank()})
    if way == "tp":
        return _told(lambda: sparsify.compile(divided("llama"), **settings))
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("cp",))
    return _told(lambda: sparsify.compile(whole("llama"), mesh=mesh, **settings))


def prompts(kind: str) -> str:
    """What generate() and a call say where each process has a prompt, a length or a random state of its own."""
    torch._dynamo.reset()
    rank = dist.get_rank()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("cp",))
    model: Any = sparsify.compile(whole("llama"), mesh=mesh, **strict(passes=["dense"]))
    ids = torch.full((1, 40), 5)
    torch.manual_seed(rank if kind == "random" else 0)
    if kind == "tokens":
        ids = ids + rank
    if kind == "length":
        ids = ids[:, : 40 - rank]
    if kind == "short":
        ids = ids[:, :5]
    with torch.no_grad():
        if kind == "length":
            return _told(lambda: model(ids))
        return _told(lambda: model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=2, do_sample=kind == "random"))


def after_a_death(patience: float) -> str:
    """What a process says when the last one ended before it agreed."""
    if dist.get_rank() == dist.get_world_size() - 1:
        os._exit(1)
    group = dist.group.WORLD
    wait = datetime.timedelta(seconds=patience)
    return _told(lambda: agreement.agree(group.group_name, {"the options": "same"}, where="test", patience=wait))
