"""Tokens of a small model on a CPU: eager, by Inductor over either cache of transformers, by sparsify whole and by layers.

python -m benchmarks run cpu_decode                     # 4 layers, 128 wide
python -m benchmarks run cpu_decode --layers 8 --hidden 512

Two ways to a token: the caller's own forward calls over a cache, and `generate()` without its prompt. Each variant has
a process of its own; they run by turns.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import sys
import time
import warnings
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache

import sparsify
from benchmarks.cpu import CpuDecode
from benchmarks.lib import records
from sparsify.generation.compat import with_cache

EAGER, DYNAMIC, STATIC, WHOLE, SPARSIFY = "eager", "Inductor, DynamicCache", "Inductor, StaticCache", "sparsify, whole", "sparsify.compile"
VARIANTS = (EAGER, DYNAMIC, STATIC, WHOLE, SPARSIFY)
FORWARD, GENERATE = "forward", "generate"


def make(layers: int, hidden: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": hidden, "intermediate_size": 2 * hidden, "num_hidden_layers": layers, "vocab_size": 256}
    heads: dict[str, Any] = {"num_attention_heads": hidden // 32, "num_key_value_heads": max(1, hidden // 64), "head_dim": 32}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, max_position_embeddings=4096)).eval()


def prepared(variant: str, model: Any) -> Any:
    """The model, compiled as the variant says."""
    if variant == DYNAMIC:
        model.compile(dynamic=True)
    elif variant == STATIC:
        model.compile()
    elif variant in (WHOLE, SPARSIFY):
        sparsify.compile(model, whole=variant == WHOLE, progress=False)
    return model


def own_calls(variant: str, model: Any, prompt: torch.Tensor, room: int) -> Callable[[], Any]:
    """The next token over a cache that holds the prompt."""
    cache = StaticCache(config=model.config, max_cache_len=room) if variant == STATIC else DynamicCache(config=model.config)
    given = with_cache(type(model), cache)
    token = model(input_ids=prompt, **given).logits[:, -1:].argmax(-1)

    def step() -> None:
        token.copy_(model(input_ids=token, **given).logits[:, -1:].argmax(-1))

    return step


def generated(model: Any, prompt: torch.Tensor, tokens: int) -> float:
    """Processor seconds of a call of generate()."""
    how: dict[str, Any] = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False, "pad_token_id": 0}
    start = time.thread_time()
    model.generate(prompt, **how)
    return time.thread_time() - start


def serve(variant: str, sizes: tuple[int, int, int], room: int, pipe: Any) -> None:
    """One variant in a process of its own, where it shares no guards with others; answers (way, tokens) with the seconds of each token."""
    warnings.simplefilter("ignore")
    layers, hidden, prompt_len = sizes
    torch.set_num_threads(1)
    with torch.no_grad():
        model = prepared(variant, make(layers, hidden))
        prompt = torch.randint(0, 256, (1, prompt_len), generator=torch.Generator().manual_seed(0))
        start = time.perf_counter()
        step = own_calls(variant, model, prompt, room)
        step()
        pipe.send(time.perf_counter() - start)
        while (asked := pipe.recv()) is not None:
            way, tokens = asked
            if way == FORWARD:
                pipe.send([timed(step) for _ in range(tokens)])
            else:
                short, long = (generated(model, prompt, count) for count in (4, 4 + tokens))
                pipe.send([(long - short) / tokens])


def timed(call: Callable[[], Any]) -> float:
    start = time.thread_time()
    call()
    return time.thread_time() - start


def measure(layers: int, hidden: int, prompt_len: int, rounds: int, tokens: int) -> list[CpuDecode]:
    context, room = multiprocessing.get_context("spawn"), prompt_len + 64 + (rounds + 2) * tokens
    pipes, first, found = {}, {}, defaultdict(list)
    for variant in VARIANTS:
        pipes[variant], other = context.Pipe()
        context.Process(target=serve, args=(variant, (layers, hidden, prompt_len), room, other), daemon=True).start()
        first[variant] = pipes[variant].recv()
    for way in (FORWARD, GENERATE):
        for turn in range(-2, rounds):  # two rounds to warm up
            for variant, pipe in pipes.items():
                if way == GENERATE and variant == STATIC:
                    continue  # over which transformers' generate() makes a cache, and graphs, for every call
                pipe.send((way, tokens))
                found[way, variant] += pipe.recv() if turn >= 0 else pipe.recv()[:0]
    for pipe in pipes.values():
        pipe.send(None)
    medians = {key: statistics.median(times) * 1e3 for key, times in found.items()}
    return [
        CpuDecode(
            layers=layers,
            hidden=hidden,
            prompt=prompt_len,
            threads=1,
            way=way,
            variant=variant,
            cpu_ms=ms,
            ratio=ms / min(other for (of, name), other in medians.items() if of == way and name in (DYNAMIC, STATIC)),
            first_s=first[variant] if way == FORWARD else None,
        )
        for (way, variant), ms in medians.items()
    ]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--tokens", type=int, default=48, help="of each round")
    parser.add_argument("--out", type=Path, default=records.RESULTS / "cpu.jsonl")
    given = parser.parse_args(arguments)
    for record in measure(given.layers, given.hidden, given.prompt, given.rounds, given.tokens):
        print(json.dumps(records.append(given.out, record)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
