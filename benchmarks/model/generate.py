"""Milliseconds a token through `generate()`, everything counted, after long prompts: eager over a DynamicCache, Inductor over a StaticCache
(which transformers compiles by itself), and `sparsify.compile` over the cache that evicts nothing.

    python -m benchmarks run generate --lengths 32768 131072
    python -m benchmarks run generate --lengths 16384 --batch 8 --padded
    python -m benchmarks run generate --lengths 131072 --tokens 256 --whole --repeats 1 --variants sparsify "sparsify sparse" inductor eager
    python -m benchmarks run generate --lengths 16384 --batch 8 --padded --variants sparsify --profile
    python -m benchmarks run generate --shape tiny --lengths 64 --tokens 8 --hidden 64

The model is a Llama of the 8B shape with random weights. Caches are filled at random, which costs a token what a prompt's keys cost, so
that no time goes into prompts: each call of `generate()` is a last token of the prompt and `--tokens` new ones. The first call compiles
and records; then the median of `--repeats` calls is divided by the tokens. `--whole` also times calls that read the prompt themselves;
"sparsify sparse" visits `--density` of the prompt's causal blocks in such a call, and is the exact variant in all else. `--profile` runs
one call more under torch's profiler and tells how much of a token the GPU spends on what.

`limit_ms` is the time that the bytes of all weights and of the keys and values of all tokens take at 4.8 TB/s. Appends to
results/generate.jsonl.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache, LlamaForCausalLM, StaticCache

import sparsify
from benchmarks.lib import full_caches, records
from benchmarks.lib.models import SHAPES, build, clean, peak_bytes, weight_bytes
from benchmarks.model import Generate
from sparsify import SparseCache
from sparsify.commands.bench.clock import reason
from sparsify.generation.compat import with_cache

BANDWIDTH = 4.8e12  # bytes a second of an H200's memory
VARIANTS = ("sparsify", "sparsify tuned", "sparsify sparse", "inductor", "eager")
# Inductor writes products of one row as reductions of its own and searches for their tile sizes: faster tokens for longer compiling
TUNED = {"inductor": {"coordinate_descent_tuning": True}, "linear_kernels": "never"}


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    model = build(options.shape, options.layers, options.device, **({"hidden_size": options.hidden} if options.hidden else {}))
    failed = 0
    for variant in options.variants:
        torch._dynamo.reset()
        model.__dict__.pop("generate", None)
        model._compiled_call_impl = None
        if variant.startswith("sparsify"):
            sparsify.compile(model, progress=False, **settings(variant, options.density))
        for length in options.lengths:
            clean(options.device)
            facts = {
                "shape": options.shape,
                "layers": model.config.num_hidden_layers,
                "variant": variant,
                "length": length,
                "batch": options.batch,
                "padded": options.padded,
                "tokens": options.tokens,
                "sampled": options.sample,
                "density": options.density if variant == "sparsify sparse" else None,
                "limit_ms": limit_ms(model, length, options),
            }
            try:
                values = measure(model, variant, length, options)
            except Exception as error:
                traceback.print_exc()
                failed += 1
                values = {"error": reason(error)}
            records.append(options.out, Generate(**{"peak_bytes": None} | values, **facts))
            print({key: facts[key] for key in ("variant", "length", "batch", "limit_ms")} | values, flush=True)
    return 1 if failed else 0


def settings(variant: str, density: float) -> dict[str, Any]:
    """Options of `sparsify.compile` for one of its variants."""
    if variant == "sparsify sparse":
        return {"passes": ["xattention", "dense"], "xattention": {"density": density}, "min_length": 0}
    return TUNED if variant == "sparsify tuned" else {}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[32768, 131072])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--padded", action="store_true", help="rows of a batch begin with padding, up to half of them")
    parser.add_argument("--tokens", type=int, default=128, help="new tokens of each call")
    parser.add_argument("--sample", action="store_true", help="draw tokens rather than take the likeliest")
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--whole", action="store_true", help="also time a call that reads its prompt")
    parser.add_argument("--profile", action="store_true", help="also tell what the GPU's time goes into, on a GPU")
    parser.add_argument("--density", type=float, default=0.1, help='share of the causal blocks that "sparsify sparse" visits')
    parser.add_argument("--shape", choices=list(SHAPES), default="8b")
    parser.add_argument("--layers", type=int, help="fewer layers than the shape has")
    parser.add_argument("--hidden", type=int, help="another hidden size than the shape has")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=records.RESULTS / "generate.jsonl")
    return parser.parse_args(arguments)


def token_counts(length: int, options: argparse.Namespace) -> list[int]:
    """Tokens of each row that are not padding."""
    return [length - (length * row // (2 * options.batch) if options.padded else 0) for row in range(options.batch)]


def limit_ms(model: LlamaForCausalLM, length: int, options: argparse.Namespace) -> float:
    """Milliseconds that the bytes of a token take, halfway through a call. Of the embedding only a row is read."""
    config = model.config
    weights = weight_bytes(model) - weight_bytes(model.get_input_embeddings())
    each = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * model.dtype.itemsize
    stored = sum(token_counts(length, options)) + options.batch * options.tokens // 2
    return 1e3 * (weights + each * stored) / BANDWIDTH


@torch.no_grad()
def measure(model: LlamaForCausalLM, variant: str, length: int, options: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds a token, seconds of the first call, bytes; with `whole` those of a call that reads its prompt."""
    ids = torch.randint(3, model.config.vocab_size, (options.batch, length + 1), generator=torch.Generator().manual_seed(0))
    ids = ids.to(options.device)
    mask = torch.ones_like(ids)
    for row, count in enumerate(token_counts(length, options)):
        mask[row, : length - count] = 0
    given = {
        "input_ids": ids,
        "attention_mask": mask,
        "max_new_tokens": options.tokens,
        "min_new_tokens": None,
        "do_sample": options.sample,
    }
    given |= {"pad_token_id": 0, "eos_token_id": None}
    make, fill = {"sparsify": (_full, _fill_full), "inductor": (_static, _fill_static), "eager": (_dynamic, _fill_dynamic)}[
        variant.split()[0]
    ]
    base = make(model, length, options)

    def call() -> float:
        cache = fill(base, length, options)
        return _seconds(lambda: model.generate(**given, **with_cache(model, cache)), options)

    first = call()
    times = [call() for _ in range(options.repeats)]
    values = {"ms": 1e3 * statistics.median(times) / options.tokens, "times_s": times, "first_call_s": first}
    if options.profile:
        values["gpu_ms"] = gpu_ms(call, options.tokens)
    base = None
    if options.whole:
        clean(options.device)
        whole = given | ({"cache_implementation": "static"} if variant == "inductor" else {})
        found = [_seconds(lambda: model.generate(**whole), options) for _ in range(2)]
        values |= {"whole_first_s": found[0], "whole_s": found[1]}
    return values | {"peak_bytes": peak_bytes(options.device)}


# what kernels compute, by their names: sparsify's own, and what those of libraries have in common. Inductor's begin with "triton_" and
# name whatever they are fused from.
OURS = {"linear": "products", "split": "attention", "combine": "attention", "append": "attention"}
OTHERS = {"nvjet": "products", "gemm": "products", "gemv": "products", "fmha": "attention", "flash": "attention"}


def gpu_ms(call: Callable[[], Any], tokens: int) -> dict[str, float]:
    """Milliseconds a token that the GPU spends in kernels and copies, by what they compute.

    Raises:
        RuntimeError: there is no GPU, or the profiler saw none of its work.
    """
    if not torch.cuda.is_available():
        raise RuntimeError("--profile needs a GPU")
    kinds = [torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]  # without the host's, events() is empty
    with torch.profiler.profile(activities=kinds) as profiler:
        call()
    found = {"products": 0.0, "attention": 0.0, "other": 0.0}
    for event in profiler.events() or ():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            part = OURS.get(event.name)
            if part is None and not event.name.startswith("triton_"):
                part = next((part for name, part in OTHERS.items() if name in event.name), None)
            found[part or "other"] += event.device_time / 1e3 / tokens
    if not any(found.values()):
        raise RuntimeError("the profiler saw nothing that the GPU did")
    return found


def _seconds(run: Callable[[], Any], options: argparse.Namespace) -> float:
    wait = torch.cuda.synchronize if options.device == "cuda" else lambda: None
    wait()
    begin = time.perf_counter()
    result = run()
    wait()
    assert result.shape[1] - 1 >= options.tokens
    return time.perf_counter() - begin


# Caches with `length` tokens of each row: made once, and put back to that before each call.


def _full(model: LlamaForCausalLM, length: int, options: argparse.Namespace) -> SparseCache:
    return full_caches.filled(model, length + 1 + options.tokens, options.batch, options.device)


def _fill_full(cache: SparseCache, length: int, options: argparse.Namespace) -> SparseCache:
    return full_caches.put_back(cache, length, token_counts(length, options), options.device)


def _static(model: LlamaForCausalLM, length: int, options: argparse.Namespace) -> StaticCache:
    config = model.config
    cache = StaticCache(config=config, max_cache_len=length + 1 + options.tokens)
    cache.early_initialization(options.batch, config.num_key_value_heads, config.head_dim, model.dtype, torch.device(options.device))
    for layer in cache.layers:
        layer.keys.normal_()
        layer.values.normal_()
    return cache


def _fill_static(cache: StaticCache, length: int, options: argparse.Namespace) -> StaticCache:
    for layer in cache.layers:
        layer.cumulative_length.fill_(length)
    return cache


def _dynamic(model: LlamaForCausalLM, length: int, options: argparse.Namespace) -> list[tuple[torch.Tensor, torch.Tensor]]:
    config = model.config
    shape = (options.batch, config.num_key_value_heads, length, config.head_dim)
    make = lambda: torch.randn(shape, dtype=model.dtype, device=options.device)
    return [(make(), make()) for _ in range(config.num_hidden_layers)]


def _fill_dynamic(base: list[tuple[torch.Tensor, torch.Tensor]], length: int, options: argparse.Namespace) -> DynamicCache:
    cache = DynamicCache()
    for layer, (keys, values) in enumerate(base):
        cache.update(keys, values, layer)
    return cache


if __name__ == "__main__":
    sys.exit(main())
