"""Do the answers survive eviction? One needle asked at the end of a prompt, and long text under StreamingLLM.

    python -m benchmarks run eviction needles --model DIR --text FILE --lengths 8192 32768 --shares 1 0.25 0.1 0.05
    python -m benchmarks run eviction stream --model DIR --text FILE --bytes 200000

needles: the prompt ends in one question, so that the last queries know what is asked; its answer is teacher-forced a byte at a time over
what was kept. SnapKV smooths its scores over 5 tokens, which keep a word's neighbours where tokens are words: of bytes it takes some 15 to
hold a fact together, and both are run. stream: NLL by stretch of text, under both position schemes and recomputed without a cache from as
many bytes as a full cache holds, since text is harder here and easier there. Appends to results/eviction.jsonl.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from transformers import LlamaForCausalLM

from benchmarks.answers.run import ASKS, load
from benchmarks.cache import EvictionNeedles, EvictionStream
from benchmarks.lib import needles, records
from sparsify import SparseCache
from sparsify.generation.compat import with_cache

QUESTION = len("\n?? abcdef: ")
STREAM_CALL = 512  # bytes a call; StreamingLLM's result does not depend on it


@torch.no_grad()
def answer(model: LlamaForCausalLM, prompt: torch.Tensor, wanted: torch.Tensor, cache: SparseCache) -> bool:
    """Whether each byte of `wanted` [n] is the argmax after prompt [1, length] and the bytes before it."""
    logits = model(prompt, **with_cache(model, cache), logits_to_keep=1).logits[0, -1]
    for byte in wanted:
        if int(logits.argmax()) != int(byte):
            return False
        logits = model(byte.view(1, 1), **with_cache(model, cache)).logits[0, -1]
    return True


def ask(model: LlamaForCausalLM, text: bytes, length: int, seed: int, make: Any) -> tuple[int, int, float]:
    """Right answers, questions and kept share of one prompt's questions, each at the end of its own copy of the prompt."""
    item = needles.prompt(length, text, seed, asks=ASKS)
    ids = item.ids.to(model.device)
    context = ids[:, : item.answers[0][0] - QUESTION]
    right, kept = 0, 0.0
    for start, size in item.answers:
        prompt = torch.cat((context, ids[:, start - QUESTION : start]), 1)
        cache = make(model.config, prompt.shape[1])
        right += answer(model, prompt, ids[0, start : start + size], cache)
        kept = cache.layers[0].keys.shape[2] / prompt.shape[1]
    return right, len(item.answers), kept


def run_needles(options: argparse.Namespace, model: LlamaForCausalLM, text: bytes, facts: dict[str, Any]) -> None:
    seeds = range(needles.FIRST_SEED, needles.FIRST_SEED + -(-options.questions // ASKS))
    for length in options.lengths:
        for policy, extra in _settings(options):
            for share in options.shares:

                def make(config: Any, prompt: int, policy: str = policy, share: float = share, extra: dict = extra) -> SparseCache:
                    return SparseCache(config, policy, int(prompt * share) + (8 if share == 1 else 0), **extra)

                started = time.monotonic()
                found = [ask(model, text, length, seed, make) for seed in seeds]
                right, asked = sum(f[0] for f in found), sum(f[1] for f in found)
                values = {"right": right, "asked": asked, "interval": needles.wilson(right, asked), "kept": found[0][2]}
                parameters = {"policy": policy, "length": length, "share": share, **extra}
                print(parameters, values, flush=True)
                seconds = time.monotonic() - started
                where = {"seconds": seconds, "seeds": [seeds.start, seeds.stop]}
                records.append(options.out, EvictionNeedles(**parameters, **values, **where, **facts))


def _settings(options: argparse.Namespace) -> list[tuple[str, dict[str, Any]]]:
    """Each policy with its options."""
    snapkv = [{"window": options.observe, "kernel": kernel} for kernel in options.kernels]
    return [(policy, extra) for policy in options.policies for extra in (snapkv if policy == "snapkv" else [{}])]


def by_stretch(nll: list[float], length: int) -> list[float]:
    """Means over stretches of `length` bytes; a shorter rest at the end is left out unless it is all there is."""
    whole = range(0, max(1, len(nll) // length) * length, length)
    return [sum(nll[i : i + length]) / len(nll[i : i + length]) for i in whole]


@torch.no_grad()
def recomputed(model: LlamaForCausalLM, ids: torch.Tensor, visible: int) -> list[float]:
    """NLL of each byte of ids [1, n] after the first, from the `visible` to `visible + STREAM_CALL` bytes before it and nothing else."""
    found: list[float] = []
    for first in range(0, ids.shape[1] - 1, STREAM_CALL):
        last = min(first + STREAM_CALL, ids.shape[1] - 1)
        logits = model(ids[:, max(0, first - visible) : last], use_cache=False, logits_to_keep=last - first).logits[0].float()
        found += F.cross_entropy(logits, ids[0, first + 1 : last + 1], reduction="none").tolist()
    return found


@torch.no_grad()
def run_stream(options: argparse.Namespace, model: LlamaForCausalLM, text: bytes, facts: dict[str, Any]) -> None:
    ids = torch.frombuffer(bytearray(text[: options.bytes + 1]), dtype=torch.uint8).long()[None].to(model.device)
    for positions in ("recomputed", "in_cache", "absolute"):
        started = time.monotonic()
        if positions == "recomputed":
            nll = recomputed(model, ids, options.sinks + options.window)
        else:
            cache = SparseCache(model.config, "streaming_llm", sinks=options.sinks, window=options.window, positions=positions)
            nll = []
            for first in range(0, ids.shape[1] - 1, STREAM_CALL):
                last = min(first + STREAM_CALL, ids.shape[1] - 1)
                logits = model(ids[:, first:last], **with_cache(model, cache)).logits[0].float()
                nll += F.cross_entropy(logits, ids[0, first + 1 : last + 1], reduction="none").tolist()
        values = by_stretch(nll, options.stretch)
        print(positions, [round(x, 3) for x in values], flush=True)
        parameters = {"positions": positions, "sinks": options.sinks, "window": options.window, "stretch": options.stretch}
        seconds = time.monotonic() - started
        records.append(options.out, EvictionStream(**parameters, bytes=len(nll), nll=values, seconds=seconds, **facts))


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("benchmark", choices=["needles", "stream"])
    parser.add_argument("--model", type=Path, required=True, help="folder of a byte-level LlamaForCausalLM")
    parser.add_argument("--text", type=Path, required=True, help="file to hide needles in, or to stream")
    parser.add_argument("--lengths", type=int, nargs="+", default=[8192, 32768])
    parser.add_argument("--shares", type=float, nargs="+", default=[1.0, 0.25, 0.1, 0.05])
    parser.add_argument("--policies", nargs="+", default=["snapkv", "streaming_llm"])
    parser.add_argument("--observe", type=int, default=QUESTION, help="queries that score under snapkv: those of the question")
    parser.add_argument("--kernels", type=int, nargs="+", default=[5, 15], help="keys that snapkv's smoothing spans")
    parser.add_argument("--questions", type=int, default=48)
    parser.add_argument("--bytes", type=int, default=200_000)
    parser.add_argument("--stretch", type=int, default=20_000, help="bytes that one NLL is taken over")
    parser.add_argument("--sinks", type=int, default=4)
    parser.add_argument("--window", type=int, default=2048)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=records.RESULTS / "eviction.jsonl")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    model, text = load(options.model, options.device), options.text.read_bytes()
    facts = {"model": options.model.name, "model_sha256": records.sha256(options.model), "text_sha256": records.sha256(options.text)}
    {"needles": run_needles, "stream": run_stream}[options.benchmark](options, model, text, facts)
    return 0


if __name__ == "__main__":
    sys.exit(main())
