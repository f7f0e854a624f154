"""Do the answers survive eviction? One needle asked at the end of a prompt, and long text under StreamingLLM.

    python -m benchmarks run eviction needles --model DIR --text FILE --lengths 8192 32768 --shares 1 0.25 0.1 0.05
    python -m benchmarks run eviction blind --model DIR --text FILE --policies snapkv locret pages clusters --heads FILE
    python -m benchmarks run eviction stream --model DIR --text FILE --bytes 200000

needles: the prompt ends in one question, so that the last queries know what is asked; its answer is teacher-forced a byte at a time over
what was kept. SnapKV smooths its scores over 5 tokens, which keep a word's neighbours where tokens are words: of bytes it takes some 15 to
hold a fact together, and both are run. blind: the text is read before anything is asked, in calls of `--every` bytes where a policy
selects between them, and each question then goes to a fork of the cache; `pages` and `clusters` keep everything, and questions and answers
read a share of it. stream: NLL by stretch of text, under both position schemes and recomputed without a cache from as
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
from benchmarks.cache import EvictionBlind, EvictionNeedles, EvictionStream
from benchmarks.lib import needles, records
from sparsify import Clusters, Pages, SparseCache
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


@torch.no_grad()
def ask_blind(model: LlamaForCausalLM, text: bytes, length: int, seed: int, make: Any, every: int) -> tuple[int, int]:
    """Right answers and questions of one text, read in calls of `every` bytes (0: one call) before the first of them."""
    item = needles.prompt(length, text, seed, asks=ASKS)
    ids = item.ids.to(model.device)
    end, right = item.questions[0], 0
    cache = make(model.config, end)
    for first in range(0, end, every or end):
        model(ids[:, first : min(first + (every or end), end)], **with_cache(model, cache), logits_to_keep=1)
    if isinstance(cache.read, Clusters):
        cache.prepare()
    for start, size in item.answers:
        right += answer(model, ids[:, start - QUESTION : start], ids[0, start : start + size], cache.fork())
    return right, len(item.answers)


def blind_cache(policy: str, share: float, every: int, options: argparse.Namespace) -> Any:
    """Makes the cache of a text of so many bytes."""
    few = {"recent": 16} if policy in ("locret", "knorm", "keydiff") else {"window": 16, "kernel": 15} if policy == "snapkv" else {}

    def make(config: Any, length: int) -> SparseCache:
        if policy in ("pages", "clusters"):
            how = Pages(share=share) if policy == "pages" else Clusters(share=share)
            return SparseCache(config, "full", length + 64, read=how)
        if policy == "locret":
            few["heads"] = str(options.heads)
        return SparseCache(config, policy, max(int(length * share), 1), every=every or None, **few)

    return make


def run_blind(options: argparse.Namespace, model: LlamaForCausalLM, text: bytes, facts: dict[str, Any]) -> None:
    seeds = range(needles.FIRST_SEED, needles.FIRST_SEED + -(-options.questions // ASKS))
    for length in options.lengths:
        for policy in options.policies:
            every = 0 if policy in ("pages", "clusters", "streaming_llm", "full") else options.every
            for share in options.shares:
                started, make = time.monotonic(), blind_cache(policy, share, every, options)
                found = [ask_blind(model, text, length, seed, make, every) for seed in seeds]
                right, asked = sum(f[0] for f in found), sum(f[1] for f in found)
                values = {"right": right, "asked": asked, "interval": needles.wilson(right, asked)}
                print(policy, length, share, values, flush=True)
                where = {"every": every, "seconds": time.monotonic() - started, "seeds": [seeds.start, seeds.stop]}
                heads = records.sha256(options.heads) if policy == "locret" else None
                records.append(
                    options.out, EvictionBlind(policy=policy, length=length, share=share, heads_sha256=heads, **values, **where, **facts)
                )


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
    parser.add_argument("benchmark", choices=["needles", "blind", "stream"])
    parser.add_argument("--model", type=Path, required=True, help="folder of a byte-level LlamaForCausalLM")
    parser.add_argument("--text", type=Path, required=True, help="file to hide needles in, or to stream")
    parser.add_argument("--lengths", type=int, nargs="+", default=[8192, 32768])
    parser.add_argument("--shares", type=float, nargs="+", default=[1.0, 0.25, 0.1, 0.05])
    parser.add_argument("--policies", nargs="+", default=["snapkv", "streaming_llm"])
    parser.add_argument("--observe", type=int, default=QUESTION, help="queries that score under snapkv: those of the question")
    parser.add_argument("--kernels", type=int, nargs="+", default=[5, 15], help="keys that snapkv's smoothing spans")
    parser.add_argument("--heads", type=Path, help="blind: trained heads of locret, as `train_retaining_heads` writes them")
    parser.add_argument("--every", type=int, default=512, help="blind: bytes between selections")
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
    {"needles": run_needles, "blind": run_blind, "stream": run_stream}[options.benchmark](options, model, text, facts)
    return 0


if __name__ == "__main__":
    sys.exit(main())
