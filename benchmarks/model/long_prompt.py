"""Seconds and memory of a very long prompt: an 8B-shaped Llama reads it into a SparseCache, block-sparse, with and without `ffn_parts`.

    python -m benchmarks run long_prompt
    python -m benchmarks run long_prompt --lengths 1048576 --variants parts --repeats 2
    python -m benchmarks run long_prompt --layers 2 --hidden 64 --lengths 512 --min-rows 128 --part-rows 100

`sparsify.compile` with `xattention` at a fixed density; the call that is timed is the model's, logits of the last token alone. "parts": the
default methods. "whole": feed-forward blocks as Inductor compiles them, which runs out of memory where the activations do not fit.

Peak: most memory that tensors took at once, weights included. Reserved: most that torch's allocator took from the device, which is more by
what lies in fragments; the process must run without settings of the allocator for this to say what a user gets. Of the first call both are
measured too: it compiles. Lengths run from short to long in one process, as a service would see them. Appends to
results/long_prompt.jsonl.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import traceback
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaForCausalLM

import sparsify
from benchmarks.lib import records
from benchmarks.lib.models import SHAPES, build, clean, peak_bytes, weight_bytes
from benchmarks.model import LongPrompt
from sparsify import SparseCache, api
from sparsify.commands.bench.clock import Clock, reason
from sparsify.generation.compat import with_cache

VARIANTS = ("parts", "whole")
_ALLOCATOR = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    model = build(options.shape, options.layers, options.device, **({"hidden_size": options.hidden} if options.hidden else {}))
    failed = 0
    for variant in options.variants:
        torch._dynamo.reset()
        model._compiled_call_impl = None
        sparsify.compile(model, progress=False, strict=True, **methods(variant, options))
        for length in sorted(options.lengths):
            facts = {
                "shape": options.shape,
                "layers": model.config.num_hidden_layers,
                "variant": variant,
                "length": length,
                "budget": options.budget,
                "density": options.density,
                "allocator": next((os.environ[name] for name in _ALLOCATOR if os.environ.get(name)), ""),
                "weight_bytes": weight_bytes(model),
            }
            try:
                values = measure(model, length, options)
            except Exception as error:
                traceback.print_exc()
                failed += 1
                values = {"error": reason(error)}
            # what a failed call left in frames is gone here
            clean(options.device)
            record = records.append(options.out, LongPrompt(**facts, **values))
            print(_told(record), flush=True)
    return 1 if failed else 0


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", "--length", type=int, nargs="+", default=[1 << 17, 1 << 19, 1 << 20])
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS[:1]), choices=VARIANTS)
    parser.add_argument("--density", type=float, default=0.03, help="share of the causal blocks that attention visits")
    parser.add_argument("--budget", type=int, default=8192, help="tokens that the cache keeps per KV head")
    parser.add_argument("--policy", default="snapkv", help="of the cache")
    parser.add_argument("--repeats", type=int, default=2, help="calls after the first")
    parser.add_argument("--part-rows", type=int, help="of ffn_parts, instead of its default")
    parser.add_argument("--min-rows", type=int, help="of ffn_parts: rows from which on it acts, on any device")
    parser.add_argument("--shape", choices=list(SHAPES), default="8b")
    parser.add_argument("--layers", type=int, help="fewer layers than the shape has")
    parser.add_argument("--hidden", type=int, help="another hidden size than the shape has")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=records.RESULTS / "long_prompt.jsonl")
    return parser.parse_args(arguments)


def methods(variant: str, options: argparse.Namespace) -> dict[str, Any]:
    """Options of `sparsify.compile`."""
    passes = ["xattention", "dense", "kv_evict"]
    found: dict[str, Any] = {"passes": passes, "xattention": {"density": options.density}, "min_length": 0}
    if variant == "parts":
        passes.append("ffn_parts")
        given = {"part_rows": options.part_rows, "min_rows": options.min_rows}
        found["ffn_parts"] = {name: value for name, value in given.items() if value is not None}
    return found


@torch.no_grad()
def measure(model: LlamaForCausalLM, length: int, options: argparse.Namespace) -> dict[str, Any]:
    """Seconds, bytes and sites of the first call and of those after it. Nothing is emptied in between: a service would not either."""
    clock, generator = Clock(options.device), torch.Generator().manual_seed(0)
    ids = torch.randint(3, model.config.vocab_size, (1, length), generator=generator).to(options.device)

    def prompt() -> torch.Tensor:
        cache = SparseCache(model.config, options.policy, budget=options.budget)
        return model(ids, logits_to_keep=1, **with_cache(model, cache)).logits

    clean(options.device)
    with api.collect_plans() as plans:
        first, _ = clock.once(prompt)
    found = {"first_call_s": first / 1e3, "first_peak_bytes": peak_bytes(options.device), "first_reserved_bytes": _reserved(options.device)}
    if options.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    times = [clock.once(prompt)[0] / 1e3 for _ in range(options.repeats)]
    return found | {
        "s": statistics.median(times),
        "times_s": times,
        "peak_bytes": peak_bytes(options.device),
        "reserved_bytes": _reserved(options.device),
        "graphs": len(plans),
        "blocks_in_parts": sum(decision.method == "ffn_parts" for plan in plans for decision in plan.decisions),
    }


def _reserved(device: str) -> int | None:
    return torch.cuda.max_memory_reserved() if device == "cuda" else None


def _told(record: dict[str, Any]) -> dict[str, Any]:
    told = {key: record.get(key) for key in ("variant", "length", "first_call_s", "s", "graphs", "blocks_in_parts", "error")}
    for key in ("peak_bytes", "reserved_bytes"):
        told[key.replace("bytes", "GiB")] = round(record[key] / 2**30, 1) if record.get(key) else None
    return told


if __name__ == "__main__":
    sys.exit(main())
