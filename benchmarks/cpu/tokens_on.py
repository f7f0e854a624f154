"""Prompts of which few tokens go on behind a layer (`token_select`) on a CPU, beside all of them: processor time of the whole call.

python -m benchmarks run cpu_tokens_on           # 8 layers of random weights, 4096 tokens, chosen by layers 1 and 3
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch

import sparsify
from benchmarks.cpu import CpuTokensOn
from benchmarks.lib import models, records
from sparsify.generation.compat import with_cache

SHAPE = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 2}


def reading(ids: torch.Tensor, select: dict[str, Any] | None) -> Callable[[], Any]:
    """A prompt's call, which returns the cache that it filled; the weights are the same in all."""
    from transformers import DynamicCache

    model: Any = models.build("tiny", None, "cpu", **SHAPE, head_dim=32)
    passes: list[str] = ["dense"] if select is None else ["token_select", "dense"]
    options: dict[str, Any] = {} if select is None else {"token_select": select}
    sparsify.compile(model, passes=passes, progress=False, strict=True, **options)

    def call() -> DynamicCache:
        cache = DynamicCache(config=model.config)
        model(input_ids=ids, logits_to_keep=1, **with_cache(type(model), cache))
        return cache

    return call


@torch.no_grad()
def measure(tokens: int, layers: list[int], shares: list[float], rounds: int) -> list[CpuTokensOn]:
    ids = torch.randint(0, 256, (1, tokens), generator=torch.Generator().manual_seed(0))
    calls: dict[tuple[int, float] | None, Callable[[], Any]] = {None: reading(ids, None)}
    for layer in layers:
        for share in shares:
            calls[layer, share] = reading(ids, {"layer": layer, "heads": "all", "keep": share})
    seconds: dict[Any, list[float]] = {name: [] for name in calls}
    kept: dict[Any, float] = {}
    for turn in range(rounds + 1):  # the first of them compiles
        for name, call in calls.items():
            start = time.process_time()
            cache = call()
            if turn:
                seconds[name].append(time.process_time() - start)
            held = [layer.keys.shape[2] for layer in cache.layers if layer.keys is not None]
            kept[name] = sum(held) / (len(held) * tokens)
    dense = median(seconds[None])
    return [
        CpuTokensOn(
            length=tokens,
            layers=SHAPE["num_hidden_layers"],
            hidden=SHAPE["hidden_size"],
            threads=torch.get_num_threads(),
            layer=name[0],
            keep=name[1],
            cpu_s=median(found),
            dense_cpu_s=dense,
            ratio=median(found) / dense,
            cache_share=kept[name],
        )
        for name, found in seconds.items()
        if name is not None
    ]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--layers", type=int, nargs="+", default=[1, 3])
    parser.add_argument("--keep", type=float, nargs="+", default=[0.05, 0.1, 0.25, 0.5])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=records.RESULTS / "cpu.jsonl")
    given = parser.parse_args(arguments)
    for record in measure(given.length, given.layers, given.keep, given.rounds):
        print(json.dumps(records.append(given.out, record)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
