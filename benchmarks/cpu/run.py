"""Sparse attention on a CPU beside dense: the op alone beside `scaled_dot_product_attention`, or the prefill of a model beside eager.

python -m benchmarks run cpu                                        # the op, 8192 tokens, 10 % of the blocks
python -m benchmarks run cpu --model benchmarks/models/code --length 16384 --rounds 1    # the demo's model
python -m benchmarks run cpu --model FOLDER --length 16384          # a byte-level model; sparsify.toml beside it, or the defaults
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.cpu import Cpu
from benchmarks.lib import code_model, code_prompt, needles, records
from sparsify.ops import block_lists
from sparsify.ops.attention import AttentionCall
from sparsify.testing import record_blocks

BLOCK = 128


def by_turns(dense: Callable[[], Any], sparse: Callable[[], Any], rounds: int) -> dict[str, float]:
    """Medians of seconds, by the clock and of the process's threads."""
    found: dict[str, list[float]] = {name: [] for name in ("dense_s", "sparse_s", "dense_cpu_s", "sparse_cpu_s")}
    for _ in range(rounds):
        for name, call in (("dense", dense), ("sparse", sparse)):
            clock, processor = time.perf_counter(), time.process_time()
            call()
            found[f"{name}_s"].append(time.perf_counter() - clock)
            found[f"{name}_cpu_s"].append(time.process_time() - processor)
    medians = {name: statistics.median(times) for name, times in found.items()}
    return medians | {"ratio": medians["sparse_cpu_s"] / medians["dense_cpu_s"]}


def timed(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def attention(length: int, heads: int, kv_heads: int, head_dim: int, density: float, rounds: int) -> Cpu:
    """The op along random lists that hold each row's first and own block."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda count: torch.randn(1, count, length, head_dim, generator=generator)
    query, key, value = draw(heads), draw(kv_heads), draw(kv_heads)
    blocks = length // BLOCK
    forced = torch.eye(blocks, dtype=torch.bool)
    forced[:, 0] = True
    causal = torch.ones(blocks, blocks, dtype=torch.bool).tril()
    others = (density * float(causal.sum()) - float(forced.sum())) / float((causal & ~forced).sum())
    keep = (forced | (torch.rand(1, heads, blocks, blocks, generator=generator) < others)) & causal
    counts, indices = block_lists.from_dense(keep)
    call = AttentionCall(query, key, value, scale=head_dim**-0.5, causal=True, block_counts=counts, block_indices=indices, block_size=BLOCK)
    first = timed(call.run)
    dense = lambda: F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=heads != kv_heads)
    return Cpu(
        what="attention",
        length=length,
        heads=heads,
        head_dim=head_dim,
        threads=torch.get_num_threads(),
        requested_density=density,
        density=float(keep.sum() / (heads * causal.sum())),
        first_call_s=first,
        **by_turns(dense, call.run, rounds),
    )


def prefill(folder: Path, length: int, rounds: int) -> Cpu:
    """A prompt of a byte-level model, or of one of word pieces as benchmarks/models/code: eager beside compiled."""
    from transformers import LlamaForCausalLM

    import sparsify

    inputs: dict[str, Any] = {"use_cache": False}
    if (folder / "tokenizer.json").is_file():
        model = code_model.load(torch.float32, folder)
        item = code_prompt.prompt(code_model.maker(folder=folder), length, 1, 24, 20)
        inputs["logits_to_keep"] = item.kept
    else:
        model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        item = needles.prompt(length, needles.stdlib_text(4_000_000), 1, 24, 20)
    inputs["input_ids"] = item.ids
    settings = folder / "sparsify.toml"
    options: dict[str, Any] = {"config": str(settings)} if settings.is_file() else {"passes": ["xattention", "dense"]}
    compiled: Any = torch.compile(model.forward, backend="sparsify", options=options)
    assert sparsify.__file__  # registers the backend
    with record_blocks() as selections:
        first = timed(lambda: compiled(**inputs))
    return Cpu(
        what=folder.resolve().name,
        length=length,
        heads=model.config.num_attention_heads,
        head_dim=int(model.config.head_dim or 0),
        threads=torch.get_num_threads(),
        requested_density=None,
        density=statistics.mean(one.density for one in selections) if selections else 1.0,
        first_call_s=first,
        **by_turns(lambda: model.forward(**inputs), lambda: compiled(**inputs), rounds),
    )


@torch.no_grad()
def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="benchmarks/models/code, or a folder with a byte-level Llama; without it, the op alone")
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--kv-heads", type=int, default=2)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--densities", type=float, nargs="+", default=[0.1])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=records.RESULTS / "cpu.jsonl")
    given = parser.parse_args(arguments)
    if given.model:
        found = [prefill(given.model, given.length, given.rounds)]
    else:
        shape = (given.length, given.heads, given.kv_heads, given.head_dim)
        found = [attention(*shape, density, given.rounds) for density in given.densities]
    for record in found:
        print(json.dumps(records.append(given.out, record)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
