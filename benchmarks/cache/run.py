"""How fast decode is over kept keys: the kernel alone beside SDPA, and a whole model a token at a time; and what evicting costs a prompt.

    python -m benchmarks run decode kernel --lengths 32768 131072 524288          # GB/s of K and V read, full and by share
    python -m benchmarks run decode kernel --sweep                               # the same for every tiling
    python -m benchmarks run decode append --lengths 4096 131072 --counts 5 512  # several tokens: later turns, verified drafts
    python -m benchmarks run decode store --lengths 131072                       # scoring and eviction of one layer after a prompt
    python -m benchmarks run decode prefill --lengths 32768 131072               # a whole prompt: time, scoring and eviction in it, memory
    python -m benchmarks run decode model --prompt 131072 --budget 4096 --batch 1 8
    python -m benchmarks run decode model --prompt 131072 --variants static+inductor   # every key kept, compiled: what it is compared with

Shapes are Llama-3.1-8B's, bf16. Appends to results/decode.jsonl.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.cache import DecodeAppend, DecodeKernel, DecodeStore
from benchmarks.cache import model as decode_model
from benchmarks.lib import peers, records
from benchmarks.lib.models import HEAD_DIM, HEADS, KV_HEADS
from sparsify import backends, policies
from sparsify.backends.cache import append as triton_append
from sparsify.backends.cache.decode import DecodeTiling, cache_decode
from sparsify.commands.bench.clock import Clock
from sparsify.ops.cache import CacheAttentionCall, CacheDecodeCall, CacheStoreCall

DIM = HEAD_DIM
_CLOCK = Clock("cuda")
SWEEP = [
    DecodeTiling(keys, warps, stages, programs)
    for keys, warps, stages, programs in itertools.product((32, 64, 128), (4, 8), (2, 3, 4), (1, 2, 3, 4))
    if keys * DIM * 4 * stages * programs <= 200 * 1024
]


def state(batch: int, capacity: int, tokens: int, device: str = "cuda", dtype: torch.dtype = torch.bfloat16) -> tuple[torch.Tensor, ...]:
    """A layer whose slots hold `tokens` tokens."""
    ints = {"dtype": torch.int32, "device": device}
    filled = min(tokens, capacity)
    positions = torch.full((batch, KV_HEADS, capacity), -1, **ints)
    positions[:, :, :filled] = torch.arange(filled, **ints)
    return (
        torch.randn(batch, KV_HEADS, capacity, DIM, dtype=dtype, device=device),
        torch.randn(batch, KV_HEADS, capacity, DIM, dtype=dtype, device=device),
        positions,
        torch.full((batch, KV_HEADS), tokens, **ints),
        torch.full((batch,), tokens, **ints),
        torch.tensor(tokens, dtype=torch.int64, device=device),
    )


def step(batch: int, device: str = "cuda", dtype: torch.dtype = torch.bfloat16) -> tuple[torch.Tensor, ...]:
    make = lambda heads: torch.randn(batch, 1, heads, DIM, dtype=dtype, device=device).transpose(1, 2)
    return make(HEADS), make(KV_HEADS), make(KV_HEADS)


OPTIONS = {"pinned": 0, "scale": DIM**-0.5, "softcap": 0.0, "window": 0, "sinks": 0}


def check(batch: int, capacity: int, tokens: int, tiling: DecodeTiling | None) -> float:
    """Largest error against SDPA in fp32 over the filled slots."""
    layer, call = state(batch, capacity, tokens), step(batch)
    out = cache_decode(CacheDecodeCall(*call, *layer, **OPTIONS), tiling=tiling)
    filled = min(tokens + 1, capacity)
    keys, values = (t[:, :, :filled].float() for t in layer[:2])
    want = F.scaled_dot_product_attention(call[0].float(), keys, values, enable_gqa=True)
    return (out.float() - want).abs().max().item()


def copy_bandwidth() -> float:
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / _CLOCK.replays(lambda: target.copy_(source)) / 1e6


def kernel(options: argparse.Namespace) -> None:
    ceiling = copy_bandwidth()
    print(f"copy: {ceiling:.0f} GB/s")
    for batch, length in itertools.product(options.batch, options.lengths):
        layer, call = state(batch, length, length), step(batch)
        full_bytes = 2 * layer[0].numel() * layer[0].element_size()
        for name, peer in (("cudnn", "cudnn"), ("flash", "fa2")):
            try:
                ms = _CLOCK.replays(peers.sdpa(peer, call[0], *layer[:2], causal=False))
                write(options, name, ms, full_bytes, ceiling, batch=batch, length=length, share=1.0)
            except RuntimeError as error:
                print(f"{name}: {str(error).splitlines()[0]}")
        for share, tiling in itertools.product(options.shares, SWEEP if options.sweep else [None]):
            tokens = int(length * share) if share < 1 else length
            filled = (*layer[:3], *(torch.full_like(t, tokens) for t in layer[3:]))
            # tokens that count as padding are not stored, so that repeated calls do not fill the cache
            is_token = None if share == 1 else torch.zeros(batch, 1, dtype=torch.bool, device="cuda")
            tickets = torch.zeros(batch * KV_HEADS + 1, dtype=torch.int32, device="cuda")

            decode = CacheDecodeCall(*call, *filled, tickets=tickets, is_token=is_token, **OPTIONS)
            error = check(batch, length, tokens, tiling)
            ms = _CLOCK.replays(lambda decode=decode, tiling=tiling: cache_decode(decode, tiling=tiling))
            facts = {"batch": batch, "length": length, "share": share, "error": error, "tiling": tiling and vars(tiling)}
            write(options, "sparsify", ms, int(full_bytes * share), ceiling, **facts)


def write(options: argparse.Namespace, variant: str, ms: float, size: int, ceiling: float, **facts: Any) -> None:
    speed = size / ms / 1e6
    print(f"{variant:9} {facts}: {ms:.4f} ms, {speed:.0f} GB/s, {speed / ceiling:.2f} of copy", flush=True)
    values = {"ms": ms, "gb_per_s": speed, "share_of_copy": speed / ceiling}
    records.append(options.out, DecodeKernel(variant=variant, **facts, **values))


def append(options: argparse.Namespace) -> None:
    """Milliseconds of one layer's attention of several tokens over a full cache, beside SDPA over keys that were put together before."""
    for batch, count, length in itertools.product(options.batch, options.counts, options.lengths):
        keys, values, positions, _, seen, _ = state(batch, length, length)
        make = lambda heads, batch=batch, count=count: torch.randn(batch, count, heads, DIM, dtype=torch.bfloat16, device="cuda").transpose(
            1, 2
        )
        query, key, value = make(HEADS), make(KV_HEADS), make(KV_HEADS)
        call = CacheAttentionCall(
            query, keys, values, positions, seen, new_key=key, new_value=value, scale=DIM**-0.5, softcap=0.0, window=0, sinks=0
        )
        whole = [torch.cat(pair, 2) for pair in ((keys, key), (values, value))]

        def ours(call: CacheAttentionCall = call) -> torch.Tensor:
            return triton_append.cache_attention(call)

        def peer(query=query, whole=whole) -> torch.Tensor:
            return F.scaled_dot_product_attention(query, *whole, enable_gqa=True)

        rows = query[:, :, -1:].float()  # the last token sees everything
        want = F.scaled_dot_product_attention(rows, *(t.float() for t in whole), enable_gqa=True)
        error = (ours()[:, :, -1:].float() - want).abs().max().item()
        for name, function in (("sparsify", ours), ("sdpa", peer)):
            ms = _CLOCK.replays(function)
            tflops = 4 * batch * HEADS * DIM * count * (length + count / 2) / ms / 1e9
            print(f"{name:9} {count} tokens over {length}, batch {batch}: {ms:.4f} ms, {tflops:.0f} TFLOP/s, error {error:.1e}", flush=True)
            facts = {"variant": name, "batch": batch, "count": count, "length": length}
            records.append(options.out, DecodeAppend(**facts, ms=ms, tflops=tflops, error=error if name == "sparsify" else None))


def store(options: argparse.Namespace) -> None:
    """Milliseconds that a policy's scoring and eviction take after a prompt, one layer."""
    for batch, length, name in itertools.product(options.batch, options.lengths, options.policies):
        policy = policies.make(name)
        layout = policy.layout(options.budget)
        make = lambda heads, batch=batch, length=length: torch.randn(batch, heads, length, DIM, dtype=torch.bfloat16, device="cuda")
        query, key, value = make(HEADS), make(KV_HEADS), make(KV_HEADS)
        layer = state(batch, layout.capacity, 0)
        call = {"pinned": layout.pinned, "recent": layout.recent, "policy": policy.describe(), "scale": DIM**-0.5, "softcap": 0.0}
        prompt = CacheStoreCall(query, key, value, *layer, empty=True, **call)
        with backends.strict():  # a reference in a kernel's place would be timed as one
            ms = statistics.median(_CLOCK.samples(prompt.run, 20))
        print(f"{name}, batch {batch}, {length} tokens, {layout.capacity} kept: {ms:.2f} ms a layer", flush=True)
        facts = {"policy": name, "batch": batch, "length": length, "budget": options.budget}
        records.append(options.out, DecodeStore(**facts, ms=ms))


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("benchmark", choices=["kernel", "append", "store", "prefill", "model"])
    parser.add_argument("--lengths", type=int, nargs="+", default=[32768, 131072, 524288])
    parser.add_argument("--shares", type=float, nargs="+", default=[1.0, 0.25, 0.05])
    parser.add_argument("--batch", type=int, nargs="+", default=[1])
    parser.add_argument("--counts", type=int, nargs="+", default=[5, 512], help="tokens of an append")
    parser.add_argument("--sweep", action="store_true", help="every tiling instead of the table's choice")
    parser.add_argument("--policies", nargs="+", default=["snapkv", "streaming_llm"])
    parser.add_argument("--policy", default="snapkv")
    parser.add_argument("--budget", type=int, default=4096)
    parser.add_argument("--prompt", type=int, default=131072)
    parser.add_argument("--variants", nargs="+", default=["sparsify"], choices=list(decode_model.VARIANTS))
    parser.add_argument("--mode", default="reduce-overhead")
    parser.add_argument("--tune", action="store_true", help="Inductor's coordinate descent, which compiles for minutes")
    parser.add_argument("--profile", action="store_true", help="print the kernels of a token")
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--warmup", type=int, default=8)
    parser.add_argument("--shape", default="8b", choices=["8b", "tiny"])
    parser.add_argument("--layers", type=int)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=records.RESULTS / "decode.jsonl")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    parts = {"kernel": kernel, "append": append, "store": store, "prefill": decode_model.prefill, "model": decode_model.model}
    parts[options.benchmark](options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
