"""Do the answers survive where layers see few tokens? Needles through `token_select`, in both modes, `sparsify.retrieve` and `skip_layers`.

    python -m benchmarks run token_answers --model DIR --text FILE --lengths 8192 --layers 1 2 3 4 --keeps 512 1024 --heads all 0,2

Every method sees the same prompts. The first question chooses the tokens; others follow in later turns, over the same cache, where a choice
made for another question must lose. Under `skip_layers` the answer's tokens bypass the lowest layers
behind `--first`, from the first one on. Appends to benchmarks/results/token_answers.jsonl.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache

import sparsify
from benchmarks.answers import TokenAnswers
from benchmarks.answers.run import load
from benchmarks.lib import needles, records
from sparsify.commands.eval.intervals import wilson
from sparsify.commands.eval.needles import right_by_turn
from sparsify.generation.compat import with_cache
from sparsify.generation.regions import regional

KERNEL, QUERIES = 31, 8  # a fact is 17 bytes long; a question 12


def cells(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """What to measure: {"method", "parameters"}."""
    if "eager" in options.methods:
        yield {"method": "eager", "parameters": {}}
    if "skip_layers" in options.methods:
        for first, bypassed in itertools.product(options.first, options.bypassed):
            yield {"method": "skip_layers", "parameters": {"first": first, "bypassed": bypassed}}
    for method in (name for name in options.methods if name not in ("eager", "skip_layers")):
        for layer, keep, heads in itertools.product(options.layers, options.keeps, options.heads):
            found = {"layer": layer, "keep": keep, "heads": heads if heads == "all" else [int(head) for head in heads.split(",")]}
            yield {"method": method, "parameters": {**found, "chunk": options.chunk} if method == "retrieve" else found}


def compiled(model: Any, method: str, parameters: dict[str, Any]) -> None:
    """The model so that it chooses as a cell says; uncompiled for eager."""
    regional.remove(model)
    model._compiled_call_impl = None
    if method == "eager":
        return
    if method == "skip_layers":
        between = model.config.num_hidden_layers - parameters["first"] - 1
        skip = {"first": parameters["first"], "most": parameters["bypassed"] / between, "warmup": 0, "length": 0}
        sparsify.compile(model, passes=["skip_layers", "dense"], skip_layers=skip, lower="eager", strict=True, progress=False)
        return
    select = {name: value for name, value in parameters.items() if name != "chunk"}
    select |= {"kernel": KERNEL, "queries": QUERIES, "mode": "narrow" if method == "narrow" else "prompt"}
    sparsify.compile(model, passes=["token_select", "dense"], token_select=select, lower="eager", strict=True, progress=False)


def answered(model: Any, method: str, parameters: dict[str, Any], item: needles.Prompt) -> list[bool]:
    """Which of a prompt's questions are answered, the first one's first."""
    if method in ("eager", "narrow"):
        cached = with_cache(model, DynamicCache(config=model.config)) | {"use_cache": True}
        return list(right_by_turn(lambda ids: model(ids.to(model.device), **cached).logits.cpu(), item))
    (start, size), question = item.answers[0], item.questions[0]
    ids = item.ids.to(model.device)
    prompt = ids[:, :start]
    if method == "retrieve":
        prompt = sparsify.retrieve(model, ids[:, :question], ids[:, question:start], chunk=parameters["chunk"]).ids
    made = model.generate(prompt, max_new_tokens=size, do_sample=False, pad_token_id=0)[0, prompt.shape[1] :]
    return [torch.equal(made, ids[0, start : start + size])]


@torch.no_grad()
def measure(model: Any, cell: dict[str, Any], length: int, text: bytes, options: argparse.Namespace) -> dict[str, Any]:
    """One cell at one length."""
    compiled(model, **cell)
    begin, first, later = time.monotonic(), [], []
    for seed in range(options.seed, options.seed + options.questions):
        item = needles.prompt(length, text, seed, needles=options.needles, asks=options.asks)
        one = answered(model, item=item, **cell)
        first.append(one[0])
        later += one[1:]
    found: dict[str, Any] = {"right": sum(first), "asked": len(first), "interval": wilson(sum(first), len(first))}
    if later:
        found |= {"later_right": sum(later), "later_asked": len(later)}
    return {**found, "seconds": time.monotonic() - begin}


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="folder of a byte-level LlamaForCausalLM")
    parser.add_argument("--text", type=Path, required=True, help="file to hide needles in")
    parser.add_argument("--lengths", type=int, nargs="+", default=[8192, 32768], help="prompt lengths in bytes")
    parser.add_argument(
        "--methods", nargs="+", default=["eager", "narrow", "prompt"], choices=["eager", "narrow", "prompt", "retrieve", "skip_layers"]
    )
    parser.add_argument("--layers", type=int, nargs="+", default=[], help="that choose")
    parser.add_argument("--keeps", type=int, nargs="+", default=[512, 1024], help="tokens that go on")
    parser.add_argument("--heads", nargs="+", default=["all"], help="that choose: all, or numbers as 0,2")
    parser.add_argument("--first", type=int, nargs="+", default=[1], help="first layers that every token runs, for skip_layers")
    parser.add_argument("--bypassed", type=int, nargs="+", default=[1, 2], help="layers behind these that an answer's tokens bypass")
    parser.add_argument("--chunk", type=int, default=8192, help="tokens of a call of sparsify.retrieve")
    parser.add_argument("--questions", type=int, default=48, help="prompts of a cell")
    parser.add_argument("--needles", type=int, default=32, help="facts a prompt")
    parser.add_argument("--asks", type=int, default=3, help="questions a prompt, one a turn")
    parser.add_argument("--seed", type=int, default=needles.FIRST_SEED, help="first prompt's seed; the others follow")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=records.RESULTS / "token_answers.jsonl")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    text = options.text.read_bytes()
    facts = {"model": options.model.name, "model_sha256": records.sha256(options.model), "text_sha256": records.sha256(options.text)}
    model, failed = load(options.model, options.device), 0
    for length, cell in itertools.product(options.lengths, cells(options)):
        try:
            found = measure(model, cell, length, text, options)
        except Exception as error:
            traceback.print_exc()
            failed += 1
            found = {"error": f"{type(error).__name__}: {str(error)[:500]}"}
        made = TokenAnswers(
            **cell,
            **facts,
            **found,
            length=length,
            needles=options.needles,
            seeds=[options.seed, options.seed + options.questions],
            dtype=str(model.dtype).removeprefix("torch."),
        )
        record = records.append(options.out, made)
        print({name: record.get(name) for name in ("method", "parameters", "length", "right", "asked", "later_right", "error")}, flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
