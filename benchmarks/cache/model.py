"""A whole model over a SparseCache, beside the same model over a cache of transformers: a token at a time, and a prompt. Run by
`python -m benchmarks run decode model` and `prefill`."""

from __future__ import annotations

import argparse
import contextlib
import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch._inductor import list_mode_options
from transformers import Cache, DynamicCache, LlamaForCausalLM, StaticCache

from benchmarks.cache import CachePrefill, DecodeModel
from benchmarks.lib import records
from benchmarks.lib.models import build, clean, peak_bytes, weight_bytes
from sparsify import SparseCache, backends
from sparsify.commands.bench.clock import Clock
from sparsify.generation.compat import with_cache
from sparsify.ops import cache as cache_ops

# what holds the keys, and what compiles the model
VARIANTS = {"sparsify": ("sparse", "sparsify"), "sparse+inductor": ("sparse", "inductor"), "static+inductor": ("static", "inductor")}

RUN = 64  # tokens decoded between two looks at the clock: the first of them waits for the host


@torch.no_grad()
def model(options: argparse.Namespace) -> None:
    """Milliseconds a token of a compiled model, in a loop that feeds itself and in one that reads each token back. The cache is filled at
    random, which costs what a prompt's keys cost."""
    network = build(options.shape, options.layers, options.device)
    for variant in options.variants:
        for batch in options.batch:
            _model(options, network, variant, batch)


def _model(options: argparse.Namespace, network: LlamaForCausalLM, variant: str, batch: int) -> None:
    clock = Clock(options.device)
    _clean(options.device)
    kind, backend = VARIANTS[variant]
    make = _sparse if kind == "sparse" else _static
    cache = make(options, network, batch)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    forward = torch.compile(network, backend=backend, fullgraph=True, options=_compile_options(options, backend))
    token, kept = torch.ones(batch, 1, dtype=torch.int64, device=options.device), with_cache(network, cache)

    def step(token: torch.Tensor) -> torch.Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        return forward(token, **kept).logits[:, -1:].argmax(-1)

    def advance() -> None:
        nonlocal token
        token = step(token)

    started = time.perf_counter()
    clock.loop(advance, options.warmup)
    compiled = time.perf_counter()
    loop = [clock.loop(advance, RUN) for _ in range(max(1, options.tokens // RUN))]  # the next token needs no read-back
    read = [clock.loop(advance, 1) for _ in range(options.tokens)]  # stopping at a token does
    if options.profile and options.device == "cuda":
        profile(step, token)
    values = {
        "ms_per_token": statistics.median(loop),
        "ms_per_token_read_back": statistics.median(read),
        "slowest_ms": max(read),
        "compile_s": compiled - started,
        "weight_bytes": weight_bytes(network),
        "cache_bytes": _cache_bytes(cache),
        "kept_over_budget": _over_budget(cache, options.budget, batch),
        "peak_bytes": peak_bytes(options.device),
        "graphs": torch._dynamo.utils.counters["stats"]["unique_graphs"],
        "cudagraph_skips": torch._dynamo.utils.counters["inductor"]["cudagraph_skips"],
    }
    facts = {
        "variant": variant,
        "tuned": options.tune,
        "batch": batch,
        "prompt": options.prompt,
        "budget": options.budget,
        "policy": options.policy,
    }
    if kind != "sparse":
        facts |= {"budget": None, "policy": None}
    print(facts, values, flush=True)
    facts |= {"shape": options.shape, "layers": network.config.num_hidden_layers, "mode": options.mode}
    records.append(options.out, DecodeModel(**facts, **values))


def _compile_options(options: argparse.Namespace, backend: str) -> dict[str, Any]:
    """With `tune`, Inductor turns the products of one row into reductions of its own, fused with what surrounds them, and tunes those."""
    tuned = {"coordinate_descent_tuning": True} if options.tune else {}
    if backend == "sparsify":
        return {"strict": True, **({"mode": options.mode} if options.mode else {}), "inductor": tuned}
    # torch takes a mode or options, but not both
    return {**(list_mode_options(options.mode) if options.mode else {}), **tuned}


def profile(step: Callable[[torch.Tensor], torch.Tensor], token: torch.Tensor) -> None:
    """Prints the kernels of one token by their time, and what the device waited between them."""
    runs, spans, found = 4, [], {}
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        for _ in range(runs):
            token = step(token)
        torch.cuda.synchronize()
    for event in profiler.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            spans.append((event.time_range.start, event.time_range.end))
            count, spent = found.get(event.name, (0, 0.0))
            found[event.name] = count + 1, spent + event.time_range.elapsed_us()
    spans.sort()
    busy, gaps = sum(end - start for start, end in spans), sum(max(0, b[0] - a[1]) for a, b in itertools.pairwise(spans))
    print(f"busy {busy / runs / 1e3:.2f} ms a token, {gaps / runs / 1e3:.2f} ms between {len(spans) / runs:.0f} kernels")
    for name, (count, spent) in sorted(found.items(), key=lambda entry: -entry[1][1])[:25]:
        print(f"{count / runs:6.1f} a token, {spent / count:8.2f} us each, {spent / runs / 1e3:6.3f} ms  {name[:100]}")


def _sparse(options: argparse.Namespace, network: LlamaForCausalLM, batch: int) -> SparseCache:
    cache = _empty(options, network, batch)
    for layer in cache.layers:
        layer.keys.normal_()
        layer.values.normal_()
        capacity = layer.layout.capacity
        layer.positions.copy_(torch.arange(capacity, device=layer.positions.device) + options.prompt - capacity)
        layer.counts.fill_(capacity)
        layer.seen.fill_(options.prompt)
        layer.length.fill_(options.prompt)
        layer.started = True
    return cache


def _empty(options: argparse.Namespace, network: LlamaForCausalLM, batch: int) -> SparseCache:
    return SparseCache(network.config, options.policy, options.budget, batch_size=batch, device=options.device, dtype=network.dtype)


def _static(options: argparse.Namespace, network: LlamaForCausalLM, batch: int) -> StaticCache:
    config = network.config
    cache = StaticCache(config=config, max_cache_len=options.prompt + options.warmup + 2 * max(RUN, options.tokens))
    cache.early_initialization(batch, config.num_key_value_heads, config.head_dim, network.dtype, torch.device(options.device))
    for layer in cache.layers:
        layer.keys.normal_()
        layer.values.normal_()
        layer.cumulative_length.fill_(options.prompt)
    return cache


@torch.no_grad()
def prefill(options: argparse.Namespace) -> None:
    """Milliseconds of a whole prompt and of all layers' scoring and eviction in it, and the largest memory, beside a DynamicCache."""
    network = build(options.shape, options.layers, options.device)
    generator = torch.Generator().manual_seed(0)
    for length in options.lengths:
        ids = torch.randint(0, network.config.vocab_size, (1, length), generator=generator).to(options.device)
        for policy in (*options.policies, None):
            _prefill(options, network, ids, policy)


def _prefill(options: argparse.Namespace, network: LlamaForCausalLM, ids: torch.Tensor, policy: str | None) -> None:
    facts = {"policy": policy, "budget": options.budget if policy else None, "length": ids.shape[1], "batch": 1}
    facts |= {"shape": options.shape, "layers": network.config.num_hidden_layers}
    for last in (False, True):  # the first call compiles kernels and grows the allocator
        cache = _empty(argparse.Namespace(**vars(options) | {"policy": policy}), network, 1) if policy else DynamicCache()
        kept = with_cache(network, cache)
        _clean(options.device)
        clock = Clock(options.device)
        with stores(clock) as spent, backends.strict():  # a reference in a kernel's place would be timed as one
            ms, logits = clock.once(lambda kept=kept: network(ids, **kept, logits_to_keep=1).logits)
        values = {
            "ms": ms,
            "store_ms": sum(spent()),
            "peak_bytes": peak_bytes(options.device),
            "weight_bytes": weight_bytes(network),
            "cache_bytes": _cache_bytes(cache),
            "kept_over_budget": _over_budget(cache, options.budget, 1),
            "finite": bool(logits.isfinite().all()),
        }
        del cache, logits
        if last:
            print(facts, values, flush=True)
            records.append(options.out, CachePrefill(**facts, **values))


@contextlib.contextmanager
def stores(clock: Clock) -> Iterator[Callable[[], list[float]]]:
    """Times every `cache_ops.store` of uncompiled code; calling what is yielded gives the milliseconds of each."""
    original, marks = cache_ops.store, []

    def store(*args: Any, **options: Any) -> None:
        before = clock.mark()
        original(*args, **options)
        marks.append((before, clock.mark()))

    cache_ops.store = store
    try:
        yield lambda: [clock.between(*pair) for pair in marks]
    finally:
        cache_ops.store = original


def _cache_bytes(cache: Cache) -> int:
    if isinstance(cache, SparseCache):
        return cache.kept_bytes()
    return sum(t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values))


def _over_budget(cache: Cache, budget: int, batch: int) -> float | None:
    """All buffers' bytes over those of the keys and values of `budget` tokens."""
    if not isinstance(cache, SparseCache):
        return None
    tokens = sum(layer.keys[0, :, 0].numel() + layer.values[0, :, 0].numel() for layer in cache.layers)
    return cache.kept_bytes() / (batch * budget * tokens * cache.layers[0].keys.element_size())


def _clean(device: str) -> None:
    torch._dynamo.reset()  # compiled code and recorded graphs hold memory
    clean(device)
