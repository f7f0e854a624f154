"""Tiny models that tensor parallelism divides among the processes of the default group."""

from __future__ import annotations

import contextlib
from collections.abc import Generator
from typing import Any

import torch
from transformers.distributed import DistributedConfig

import sparsify
from sparsify import SparseCache, api
from sparsify.distributed import peers, shards
from sparsify.distributed.collectives import all_reduce
from tests.support.harness import holding, strict
from tests.support.tiny_models import build, spread_weights


def whole(family: str, **overrides: Any) -> torch.nn.Module:
    """The model of one process."""
    model = build(family, **overrides)
    spread_weights(model)
    return model


def divided(family: str, device: str = "cpu", **overrides: Any) -> torch.nn.Module:
    """The same model, of which each process has its part by transformers' own plan, as `from_pretrained` makes it."""
    model: Any = whole(family, **overrides).to(device)
    size = torch.distributed.get_world_size()
    config, _, mesh = type(model).prepare_distribute_model(DistributedConfig(tp_size=size, tp_plan="auto"))
    return type(model).maybe_distribute_model(model, config, mesh)


def outcome(model: torch.nn.Module, ids: torch.Tensor, mask: torch.Tensor | None, options: dict[str, Any], whole: bool = False) -> Any:
    """Logits of a prompt by a compiled model, and its plans' capture and method of each site."""
    given = {} if mask is None else {"attention_mask": mask}
    with compiled(model, options, whole=whole) as plans:
        logits = model(ids, use_cache=False, **given).logits
    return logits, [(plan.capture, [decision.method for decision in plan.decisions]) for plan in plans]


def tokens(
    model: torch.nn.Module, ids: torch.Tensor, mask: torch.Tensor | None, options: dict[str, Any], cache: dict[str, Any] | None, **more: Any
) -> Any:
    """Generated tokens by a compiled model. cache: arguments of a SparseCache; None: generate() makes its own."""
    found, plans = tokens_and_plans(model, ids, mask, options, cache, **more)
    return found, sorted({decision.method or "" for plan in plans for decision in plan.decisions})


def tokens_and_plans(model: Any, ids: Any, mask: Any, options: dict[str, Any], cache: dict[str, Any] | None, **more: Any) -> Any:
    """The same tokens, and the plans of all graphs."""
    given = {} if mask is None else {"attention_mask": mask}
    given |= {} if cache is None else holding(SparseCache(model.config, **cache))
    torch.manual_seed(3)
    with compiled(model, options) as plans:
        found = model.generate(ids, max_new_tokens=12, **{"do_sample": False, **given, **more})
    return found, plans


@contextlib.contextmanager
def compiled(model: torch.nn.Module, options: dict[str, Any], **how: Any) -> Generator[list[Any]]:
    """The model compiled by `sparsify.compile`, without gradients, for one use; its plans. how: arguments beside the options."""
    torch._dynamo.reset()
    sparsify.compile(model, **how, **strict(**options))
    try:
        with api.collect_plans() as plans, torch.no_grad():
            yield plans
    finally:
        torch._dynamo.reset()


def all_of(function: str, family: str, cases: dict[str, tuple[Any, ...]], split: bool, overrides: dict[str, Any]) -> dict[str, Any]:
    """What `outcome` or `tokens` gives in each of the cases, by one process or, split, by each of several."""
    results = {}
    for name, (ids, mask, options, *more) in cases.items():
        model = (divided if split else whole)(family, **overrides)
        results[name] = globals()[function](model, ids, mask, options, *more)
    return results


def collectives(family: str, overrides: dict[str, Any]) -> dict[str, float]:
    """By name the collectives that one more generated token takes in a compiled model, of every layer and of what follows them."""
    model: Any = divided(family, **overrides)
    ids = torch.arange(3, 60)[None]
    counts = []
    with compiled(model, {"passes": ["dense"]}):
        for tokens in (4, 4, 9):
            given = {"do_sample": False, "min_new_tokens": tokens, "pad_token_id": 0}
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiled:
                model.generate(ids, max_new_tokens=tokens, **given)
            counts.append({event.key: event.count for event in profiled.key_averages()})
    names = [name for name in counts[2] if "c10d" in name and "wait" not in name]
    return {name: (counts[2][name] - counts[1].get(name, 0)) / 5 for name in names}


def sums_of_peers(family: str, cases: dict[str, tuple[Any, ...]], most: int, overrides: dict[str, Any]) -> dict[str, Any]:
    """`all_of` of tokens by each of several processes whose sums of up to `most` bytes are read from peers, as if they were GPUs.

    Returns:
        by case what `tokens` gives, how many sums were read from peers, and how plans say that sums are made.
    """
    results, count = {}, 0

    def read(buffer: Any, part: torch.Tensor, group: str) -> torch.Tensor:
        nonlocal count
        assert part.is_contiguous() and part.numel() * part.element_size() <= buffer.numel() == most
        count += 1
        return all_reduce(part, group)

    true = peers.read
    peers.read = read
    try:
        for name, (ids, mask, options, *more) in cases.items():
            model: Any = divided(family, **overrides)
            group = shards.find(model.parameters()).group
            found = peers.Peers(most, torch.empty(most, dtype=torch.uint8))
            peers._found[(group, ids.device)] = shards.process_group(group), found
            count = 0
            result, plans = tokens_and_plans(model, ids, mask, options, *more)
            results[name] = result, count, sorted({plan.capture for plan in plans})
    finally:
        peers.read = true
        peers._found.clear()
    return results
