"""Tokens over a cache whose keys and values lie in the host's memory, beside one on the device and transformers' own offloaded cache.

    python -m benchmarks run offload --lengths 32768 131072
    python -m benchmarks run offload --shape tiny --lengths 64 --tokens 4 --device cpu

The model is compiled layer by layer, but for transformers' cache, over which it runs as it is; weights and stored tokens are random.
`limit_ms` is the time that all keys and values take over the bus, by a copy of pinned memory that is timed in the same run. Appends to
results/decode.jsonl.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache

import sparsify
from benchmarks.cache import DecodeOffloaded
from benchmarks.lib import records
from benchmarks.lib.models import SHAPES, build, clean, peak_bytes
from sparsify import SparseCache
from sparsify.commands.bench.clock import reason
from sparsify.generation.compat import with_cache

VARIANTS = ("device", "offloaded", "transformers")
_BUS_BYTES = 1 << 28


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    model: Any = build(options.shape, options.layers, options.device)
    bus, failed = bus_bandwidth(options), 0
    for variant in options.variants:
        torch._dynamo.reset()
        model._compiled_call_impl = None
        model.__dict__.pop("generate", None)
        if variant != "transformers":
            sparsify.compile(model, progress=False)
        for length in options.lengths:
            clean(options.device)
            config = model.config
            stored = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * length * model.dtype.itemsize
            facts: dict[str, Any] = {"variant": variant, "shape": options.shape, "layers": config.num_hidden_layers, "length": length}
            facts["limit_ms"] = None if bus is None else 1e3 * stored / bus
            try:
                values: dict[str, Any] = measure(model, variant, length, options)
            except Exception as error:
                failed += 1
                values = {"error": reason(error)}
            records.append(options.out, DecodeOffloaded(**facts, **values))
            print(facts | values, flush=True)
    return 1 if failed else 0


def bus_bandwidth(options: argparse.Namespace) -> float | None:
    """Bytes a second from pinned memory to the device; None on a CPU."""
    if options.device != "cuda":
        return None
    host = torch.empty(_BUS_BYTES, dtype=torch.uint8, pin_memory=True)
    device = torch.empty_like(host, device="cuda")
    times = []
    for _ in range(5):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        device.copy_(host, non_blocking=True)
        torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
    return _BUS_BYTES / min(times)


@torch.no_grad()
def measure(model: Any, variant: str, length: int, options: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds a token of `generate()`'s second call and bytes, after tokens that are stored chunk by chunk without a model."""
    cache = _filled(model, variant, length, options)
    ids = torch.zeros(1, length + 1, dtype=torch.long, device=options.device)
    given: dict[str, Any] = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    seconds = 0.0
    for tokens in (options.warmup, options.tokens):
        if options.device == "cuda":
            torch.cuda.synchronize()
        begin = time.perf_counter()
        ids = model.generate(ids, max_new_tokens=tokens, **given, **with_cache(model, cache))
        ids.tolist()
        seconds = time.perf_counter() - begin
    own = {"cache_bytes": cache.kept_bytes(), "host_bytes": cache.host_bytes()} if isinstance(cache, SparseCache) else {}
    return {"ms": 1e3 * seconds / options.tokens, "peak_bytes": peak_bytes(options.device), **own}


def _filled(model: Any, variant: str, length: int, options: argparse.Namespace) -> Any:
    config = model.config
    make = lambda: torch.randn(1, config.num_key_value_heads, length, config.head_dim, dtype=model.dtype, device=options.device)
    if variant == "transformers":
        cache = DynamicCache(config=config, offloading=options.device == "cuda")
        for layer in range(config.num_hidden_layers):
            cache.update(make(), make(), layer)
        return cache
    how: dict[str, Any] = {"batch_size": 1, "device": options.device, "dtype": model.dtype, "offloading": variant == "offloaded"}
    cache = SparseCache(config, "full", length + options.tokens + options.warmup, **how)
    for layer in cache.layers:
        for name in ("keys", "values"):
            layer.at_rest(name)[:, :, :length].copy_(make())
        layer.positions[:, :, :length] = torch.arange(length, dtype=torch.int32, device=options.device)
        layer.counts.fill_(length)
        layer.seen.fill_(length)
        layer.length.fill_(length)
        layer.started = True
        if layer.offloader is not None:
            layer.offloader.refilled(layer)
    cache.recount()
    return cache


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[32768, 131072])
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--warmup", type=int, default=8, help="tokens of the first call, which compiles")
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS)
    parser.add_argument("--shape", choices=list(SHAPES), default="8b")
    parser.add_argument("--layers", type=int, help="fewer layers than the shape has")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=records.RESULTS / "decode.jsonl")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
