"""Tiny models whose prompts the processes of the default group share."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

import sparsify
from tests.support import tensor_parallel
from tests.support.harness import holding
from tests.support.tensor_parallel import whole


def compiled(model: torch.nn.Module, options: dict[str, Any], divided: bool) -> contextlib.AbstractContextManager[list[Any]]:
    """The model compiled for one use, its prompts divided among all processes or not; its plans."""
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),), mesh_dim_names=("cp",)) if divided else None
    return tensor_parallel.compiled(model, options, mesh=mesh)


def prompts(family: str, cases: dict[str, Any], divided: bool, overrides: dict[str, Any]) -> dict[str, tuple[Tensor, list[Any]]]:
    """By case (tokens, padding mask, options, further arguments of the call) the logits, and each site's method."""
    found = {}
    for name, (ids, mask, options, more) in cases.items():
        model: Any = whole(family, **overrides)
        given = {} if mask is None else {"attention_mask": mask}
        with compiled(model, options, divided) as plans:
            logits = model(ids, **{"use_cache": False, **given, **more}).logits
        found[name] = logits, [decision.method for plan in plans for decision in plan.decisions]
    return found


def tokens(family: str, cases: dict[str, Any], divided: bool, overrides: dict[str, Any]) -> dict[str, tuple[Tensor, list[int]]]:
    """By case (tokens, padding mask, options, arguments of generate) what is generated, and how many keys each row's cache holds here."""
    found = {}
    for name, (ids, mask, options, more) in cases.items():
        model: Any = whole(family, **overrides)
        given = {} if mask is None else {"attention_mask": mask}
        cache = sparsify.SparseCache(model.config, "full")
        torch.manual_seed(3)
        with compiled(model, options, divided):
            alone = model.generate(ids, max_new_tokens=9, **{"do_sample": False, **given, **more})
            torch.manual_seed(3)
            with_cache = model.generate(ids, max_new_tokens=9, **{"do_sample": False, **given, **more}, **holding(cache))
        assert torch.equal(alone, with_cache)
        found[name] = alone, cache.layers[1].counts[:, 0].tolist()
    return found


def both(family: str, cases: dict[str, Any], size: tuple[int, int], overrides: dict[str, Any]) -> dict[str, tuple[Tensor, Any]]:
    """By case (tokens, padding mask, options, whether to generate) logits or tokens, and each site's method.

    size: processes of the mesh's dimensions cp and tp, which divide the prompts and the heads; 1 and 1: one process.
    """
    from transformers.distributed import DistributedConfig
    from transformers.distributed.tensor_parallel import apply_tensor_parallelism

    found = {}
    for name, (ids, mask, options, generated) in cases.items():
        model: Any = whole(family, **overrides)
        how: dict[str, Any] = {}
        if size != (1, 1):
            mesh = init_device_mesh("cpu", size, mesh_dim_names=("cp", "tp"))
            plan, *_ = model._resolve_parallel_plans(DistributedConfig(tp_size=size[1], tp_plan="auto"))
            model = apply_tensor_parallelism(model, mesh["tp"], plan)
            how["mesh"] = mesh
        given = {} if mask is None else {"attention_mask": mask}
        torch.manual_seed(3)
        with tensor_parallel.compiled(model, options, **how) as plans:
            result = (
                model.generate(ids, max_new_tokens=5, do_sample=False, **given)
                if generated
                else model(ids, use_cache=False, **given).logits
            )
        found[name] = result, [decision.method for plan in plans for decision in plan.decisions]
    return found
