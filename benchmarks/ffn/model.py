"""A token of a whole model after a 4K prompt, by the share of feed-forward blocks that are skipped: ONE captured graph for all shares."""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import LlamaForCausalLM, StaticCache

from benchmarks.ffn import FfnModel
from benchmarks.ffn.timing import Shape, note
from benchmarks.lib import peers
from benchmarks.lib.models import build, clean
from sparsify.api import collect_plans
from sparsify.commands.bench.clock import Clock
from sparsify.generation.compat import with_cache

SHARES = (0.0, 0.1, 0.25, 0.5)
_ROOM = 1024  # cache places after the prompt: each replay fills one
_FFN = {"cold_first": 0, "cold_last": 0, "warmup": 0, "threshold": 2.0}
VARIANTS: dict[str, dict[str, Any]] = {
    "inductor": peers.MODELS["inductor"],
    "sparsify": {"backend": "sparsify", "options": {"passes": ["ffn_skip"], "ffn_skip": _FFN, "min_length": 0, "strict": True}},
}


@contextmanager
def forced_counters(rows: int, device: str) -> Iterator[torch.Tensor]:
    """int32 [rows]: what every forward starts with, read anew by each replay. A counter of n skips the first n blocks."""
    from sparsify.backends import dispatch
    from sparsify.backends.ffn import reference

    serving = reference
    if dispatch.available(device)[0] == "triton":
        from sparsify.backends.ffn import few_rows as serving
    forced = torch.zeros(rows, dtype=torch.int32, device=device)
    start, serving.ffn_start = serving.ffn_start, lambda like, *arguments, **call: forced.clone()
    try:
        yield forced
    finally:
        serving.ffn_start = start


def filled_cache(model: LlamaForCausalLM, prompt: int, rows: int, device: str) -> StaticCache:
    """A cache of `rows` sequences that all have the same random prompt."""
    cache = StaticCache(config=model.config, max_cache_len=prompt + _ROOM)
    ids = torch.randint(0, model.config.vocab_size, (1, prompt), device=device)
    model._compiled_call_impl = None  # what `model.compile` sets; None is the model as it was
    model(ids, **with_cache(model, cache), logits_to_keep=1)
    for layer in cache.layers:
        layer.batch_size = rows
        layer.keys, layer.values = (t.expand(rows, -1, -1, -1).contiguous() for t in (layer.keys, layer.values))
        torch._dynamo.mark_static_address(layer.keys)
        torch._dynamo.mark_static_address(layer.values)
    return cache


def captured(model: LlamaForCausalLM, name: str, cache: StaticCache, prompt: int, rows: int, device: str) -> Any:
    """The graph of one decode step, compiled as the variant says. Raises RuntimeError where a block was not rewritten."""
    torch._dynamo.reset()
    model.compile(**VARIANTS[name], dynamic=False)
    token, position = (torch.full((rows, 1), value, device=device) for value in (5, prompt))
    kept = with_cache(model, cache)
    step: Callable[[], Any] = lambda: model(token, **kept, position_ids=position).logits
    began = time.monotonic()
    with collect_plans() as plans:
        graph = Clock(device).graph(step)
    layers = model.config.num_hidden_layers
    if name == "sparsify" and any(sum(d.kind == "ffn" for d in plan.rewritten) != layers for plan in plans):
        raise RuntimeError(f"not all of {layers} blocks were rewritten:\n" + "\n".join(map(str, plans)))
    print(f"  {name}, {rows} rows: compiled and recorded in {time.monotonic() - began:.0f} s", flush=True)
    return graph


@torch.no_grad()
def run(options: argparse.Namespace, shape: Shape, rate: dict[str, float], prepare: Callable[[int], None]) -> None:
    """One record a variant, batch size and share. prepare: called with each batch size before it is compiled."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = build(options.shape, options.layers or shape.layers, device)
    layers = model.config.num_hidden_layers
    facts = {"shape": shape, "rate": rate, "layers": layers, "prompt": options.prompt}
    clock = Clock(device)
    for rows in options.rows:
        prepare(rows)
        cache = filled_cache(model, options.prompt, rows, device)
        for name in VARIANTS:
            with forced_counters(rows, device) as forced:
                graph = captured(model, name, cache, options.prompt, rows, device)
                for share in SHARES if name == "sparsify" else (0.0,):
                    forced.fill_(round(share * layers))
                    values = {"variant": name, "rows": rows, "share": round(share * layers) / layers, "pattern": "all rows"}
                    note(options, FfnModel, times=clock.samples(graph, 20), **values, **facts)
                if name == "sparsify" and rows > 1:
                    # each row by itself: the first blocks for the first rows only, so that no block is skipped by all
                    forced.fill_(round(0.25 * layers))
                    forced[-1] = 0
                    values = {"variant": name, "rows": rows, "share": 0.25, "pattern": "all rows but one"}
                    note(options, FfnModel, times=clock.samples(graph, 20), **values, **facts)
                del graph
            gc.collect()
        del cache
        clean(device)
