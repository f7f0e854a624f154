"""Do the answers survive eviction? Facts in a text asked for over what a policy has kept of it; and long text through a cache that evicts.

    python -m benchmarks run eviction answers stream --model DIR --text FILE --heads FILE --jobs 8
    python -m benchmarks run eviction answers --model DIR --text FILE --lengths 8192 --shares 0.1 --policies snapkv pages

answers: as `benchmarks.cache.asking` asks. SnapKV smooths its scores over 5 tokens, which keep a word's neighbours where tokens are words:
of bytes it takes some 15 to hold a fact together, and both are asked. `pages` and `clusters` keep everything, and single bytes (under
`clusters` questions too) read a share of it. stream: NLL by stretch of text read in calls of 512 bytes, under each policy and both position
schemes of StreamingLLM, and recomputed without a cache from as many bytes, since text is harder here and easier there. `locret` needs
`--heads`, which `train_retaining_heads` trains. Appends to results/eviction.jsonl.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from transformers import LlamaForCausalLM

from benchmarks.answers.run import ASKS, load
from benchmarks.cache import EvictionAnswers, EvictionStream
from benchmarks.cache.asking import ASKED, READ, Setting, ask, right, settings, streaming_heads
from benchmarks.lib import jobs, needles, records
from sparsify import SparseCache
from sparsify.generation.compat import with_cache

STREAM_CALL = 512  # bytes a call; StreamingLLM's result does not depend on it
# a prompt that none of the seeds asks
_PLAN_SEED, _PLAN_LENGTH = 8_000_000, 2048


def run_answers(options: argparse.Namespace, cell: dict[str, Any], model: LlamaForCausalLM, text: bytes, facts: dict[str, Any]) -> None:
    """One policy at one share of texts of one length."""
    setting: Setting = cell["setting"]
    seeds = range(needles.FIRST_SEED, needles.FIRST_SEED + -(-options.questions // ASKS))
    started = time.monotonic()
    good: dict[str, list[bool]] = {asked: [] for asked in ASKED}
    kept: dict[str, float] = dict.fromkeys(ASKED, 0.0)
    for seed in seeds:
        item = needles.prompt(cell["length"], text, seed, asks=ASKS)
        found = ask(model, item, setting, cell["share"])
        for asked, answers in right(found, item).items():
            good[asked] += answers
            kept[asked] += found.kept[asked] / len(seeds)
    seconds = time.monotonic() - started
    for asked in ASKED:
        count, of = sum(good[asked]), len(good[asked])
        values = {"right": count, "questions": of, "interval": needles.wilson(count, of), "kept": kept[asked]}
        parameters = {"policy": cell["name"], "asked": asked, "length": cell["length"], "share": cell["share"]}
        print(parameters, values, f"{seconds:.1f} s", flush=True)
        where = {"options": setting.options, "seconds": seconds, "seeds": [seeds.start, seeds.stop]}
        heads = records.sha256(options.heads) if setting.policy == "locret" else None
        records.append(options.out, EvictionAnswers(heads_sha256=heads, **parameters, **values, **where, **facts))


def by_stretch(nll: list[float], length: int) -> list[float]:
    """Means over stretches of `length` bytes; a shorter rest at the end is left out unless it is all there is."""
    whole = range(0, max(1, len(nll) // length) * length, length)
    return [sum(nll[i : i + length]) / len(nll[i : i + length]) for i in whole]


def _losses(logits: torch.Tensor, ids: torch.Tensor, first: int) -> torch.Tensor:
    """NLL of the byte behind each of those from `first` on whose logits [1, n, 256] are given."""
    return F.cross_entropy(logits[0].float(), ids[0, first + 1 : first + 1 + logits.shape[1]], reduction="none")


@torch.no_grad()
def recomputed(model: LlamaForCausalLM, ids: torch.Tensor, visible: int) -> list[float]:
    """NLL of each byte of ids [1, n] after the first, from the `visible` to `visible + STREAM_CALL` bytes before it and nothing else."""
    found = []
    for first in range(0, ids.shape[1] - 1, STREAM_CALL):
        last = min(first + STREAM_CALL, ids.shape[1] - 1)
        logits = model(ids[:, max(0, first - visible) : last], use_cache=False, logits_to_keep=last - first).logits
        found.append(_losses(logits, ids, first))
    return torch.cat(found).tolist()


@torch.no_grad()
def streamed(model: LlamaForCausalLM, ids: torch.Tensor, cache: SparseCache) -> list[float]:
    """NLL of each byte of ids [1, n] after the first, through a cache."""
    found = []
    for first in range(0, ids.shape[1] - 1, STREAM_CALL):
        part = ids[:, first : min(first + STREAM_CALL, ids.shape[1] - 1)]
        logits = model(part, **with_cache(model, cache)).logits
        cache.observe(logits, part)
        found.append(_losses(logits, ids, first))
    return torch.cat(found).tolist()


def run_stream(options: argparse.Namespace, cell: dict[str, Any], model: LlamaForCausalLM, text: bytes, facts: dict[str, Any]) -> None:
    """A text under one policy, or without a cache."""
    ids = torch.frombuffer(bytearray(text[: options.bytes + 1]), dtype=torch.uint8).long()[None].to(model.device)
    started, positions, budget = time.monotonic(), cell["positions"], options.sinks + options.window
    if positions == "recomputed":
        nll = recomputed(model, ids, budget)
    elif cell["name"] == "streaming_llm":
        own = {"sinks": options.sinks, "window": options.window, "positions": positions}
        nll = streamed(model, ids, SparseCache(model.config, "streaming_llm", **own))
    else:
        nll = streamed(model, ids, cell["setting"].cache(model.config, ids.shape[1], budget, STREAM_CALL, 1.0))
    values = by_stretch(nll, options.stretch)
    print(cell["name"], positions, [round(x, 3) for x in values], f"{time.monotonic() - started:.1f} s", flush=True)
    parameters = {"policy": cell["name"], "positions": positions, "sinks": options.sinks, "window": options.window}
    seconds = time.monotonic() - started
    records.append(options.out, EvictionStream(**parameters, stretch=options.stretch, bytes=len(nll), nll=values, seconds=seconds, **facts))


def cells(options: argparse.Namespace, known: dict[str, Setting]) -> list[dict[str, Any]]:
    """What there is to do, what takes longest first."""
    known = {name: setting for name, setting in known.items() if options.policies is None or name in options.policies}
    found: list[dict[str, Any]] = []
    if "stream" in options.benchmark:
        streams = [(name, "absolute") for name, setting in known.items() if setting.policy not in READ]
        streams += [("streaming_llm", how) for how in ("recomputed", "in_cache") if "streaming_llm" in known]
        found += [{"run": run_stream, "name": name, "positions": how, "setting": known[name]} for name, how in streams]
    if "answers" in options.benchmark:
        for length, (name, setting) in itertools.product(sorted(options.lengths, reverse=True), known.items()):
            shares = [1.0] if setting.policy == "full" else options.shares
            found += [{"run": run_answers, "name": name, "setting": setting, "length": length, "share": share} for share in shares]
    return found


def work(todo: Any, options: argparse.Namespace, facts: dict[str, Any]) -> int:
    """Takes cells from the queue until it is empty; returns how many failed."""
    if options.device == "cpu":
        torch.set_num_threads(options.threads)
    model, text, failed = load(options.model, options.device), options.text.read_bytes(), 0
    while (cell := todo.get()) is not None:
        try:
            cell["run"](options, cell, model, text, facts)
        except Exception:
            traceback.print_exc()
            print(f"failed: {cell}", flush=True)
            failed += 1
        if options.device == "cuda":
            torch.cuda.empty_cache()  # others share the GPU
    return failed


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("benchmark", nargs="+", choices=["answers", "stream"])
    parser.add_argument("--model", type=Path, required=True, help="folder of a byte-level LlamaForCausalLM")
    parser.add_argument("--text", type=Path, required=True, help="file to hide needles in, or to stream")
    parser.add_argument("--lengths", type=int, nargs="+", default=[16384, 32768], help="answers: bytes of a text")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.5, 0.25, 0.1, 0.05, 0.02], help="answers: of the text that are kept")
    parser.add_argument("--policies", nargs="+", help="names that `benchmarks.cache.asking.settings` has; without it all")
    parser.add_argument("--heads", type=Path, help="trained heads of locret, as `train_retaining_heads` writes them")
    parser.add_argument("--questions", type=int, default=96, help="answers: at least so many a cell")
    parser.add_argument("--bytes", type=int, default=200_000, help="stream: of the text")
    parser.add_argument("--stretch", type=int, default=20_000, help="stream: bytes that one NLL is taken over")
    parser.add_argument("--sinks", type=int, default=4, help="stream: first bytes that StreamingLLM keeps")
    parser.add_argument("--window", type=int, default=2048, help="stream: last ones; both together are every policy's budget")
    parser.add_argument("--jobs", type=int, default=1, help="processes side by side (answers do not mind sharing a GPU)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads a process, on a CPU")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=records.RESULTS / "eviction.jsonl")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    text = options.text.read_bytes()
    eager = lambda: LlamaForCausalLM.from_pretrained(options.model, attn_implementation="eager").to(options.device).eval()
    plan = streaming_heads(eager, needles.prompt(_PLAN_LENGTH, text, _PLAN_SEED, asks=ASKS))
    facts = {"model": options.model.name, "model_sha256": records.sha256(options.model), "text_sha256": records.sha256(options.text)}
    return jobs.run(work, cells(options, settings(options.heads, plan)), options.jobs, options, facts)


if __name__ == "__main__":
    sys.exit(main())
