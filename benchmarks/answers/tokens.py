"""Do the answers survive where layers see few tokens? Facts asked for through `token_select`, in both modes, `sparsify.retrieve`,
`skip_layers` and `ffn_skip`, of a model of bytes or of word pieces.

    python -m benchmarks run token_answers --model DIR --text FILE --lengths 8192 --layers 1 2 3 4 --keeps 512 1024 --heads all found 0,2
    python -m benchmarks run token_answers --model benchmarks/models/code --methods eager skip_layers ffn_skip --shares .1 .25

Every method sees the same prompts. The first question chooses the tokens; others follow in later turns, over the same cache, where a choice
made for another question must lose. With `--listed` all questions stand behind the context before the first is asked, and all choose. Heads
`found` are those that `sparsify calibrate tokens` would take, from prompts of other seeds.

Under `skip_layers` the answer's tokens bypass the lowest layers behind `--first`, from the first one on; under `ffn_skip` they leave out
that share of all feed-forward blocks, the lowest ones (`schedule`) or by similarity, whose threshold comes from a prompt of another seed.
Appends to benchmarks/results/token_answers.jsonl.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import sys
import time
import traceback
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache

import sparsify
from benchmarks.answers import TokenAnswers
from benchmarks.lib import needles, records, subjects
from sparsify.commands.calibrate import feed_forward
from sparsify.commands.calibrate.tokens import heads
from sparsify.commands.eval.intervals import wilson
from sparsify.commands.eval.needles import rows_right_by_turn
from sparsify.errors import UnsupportedError
from sparsify.generation.compat import with_cache
from sparsify.generation.regions import regional
from sparsify.passes.token_select import TokenSelect

QUERIES = 8  # a question is 12 bytes long, and ends with eight word pieces or more that ask
KERNEL = {"bytes": 31, "pieces": 15}  # about a fact's length
OTHERS = 8  # prompts of other seeds, from which heads and thresholds are found
TEXT_BYTES = 2_000_000  # of the standard library, where no text is given
WHOLE = ("eager", "skip_layers", "ffn_skip")  # methods that leave no token of the prompt out


def cells(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """What to measure: {"method", "parameters"}."""
    if "eager" in options.methods:
        yield {"method": "eager", "parameters": {}}
    if "skip_layers" in options.methods:
        for first, bypassed in itertools.product(options.first, options.bypassed):
            yield {"method": "skip_layers", "parameters": {"first": first, "bypassed": bypassed}}
    if "ffn_skip" in options.methods:
        for policy, share in itertools.product(options.policies, options.shares):
            yield {"method": "ffn_skip", "parameters": {"policy": policy, "share": share}}
    for method in (name for name in options.methods if name not in WHOLE):
        for layer, keep, named in itertools.product(options.layers, options.keeps, options.heads):
            found = {
                "layer": layer,
                "keep": keep,
                "heads": named if named in ("all", "found") else [int(head) for head in named.split(",")],
            }
            yield {"method": method, "parameters": {**found, "chunk": options.chunk} if method == "retrieve" else found}


class Asker:
    """Asks one model at one length.

    Args:
        options: of the command line.
    """

    def __init__(self, subject: subjects.Subject, length: int, options: argparse.Namespace):
        self.subject, self.model, self.length, self.options = subject, subject.model, length, options
        self.layers: int = subject.model.config.num_hidden_layers

    def prompt(self, seed: int) -> needles.Prompt:
        if self.options.listed:
            return subjects.listed(self.subject.make, self.length, seed)
        return self.subject.make(self.length, seed)

    @cached_property
    def others(self) -> list[torch.Tensor]:
        """Prompts up to their first answer, of seeds that nobody is asked about: ids [1, tokens]."""
        items = [self.prompt(seed) for seed in range(self.options.seed - OTHERS, self.options.seed)]
        return [item.ids[:, : item.answers[0][0]].to(self.model.device) for item in items]

    @cached_property
    def queries(self) -> int:
        """Last tokens of a prompt that choose."""
        item = self.prompt(self.options.seed)
        return item.answers[0][0] - item.questions[0] if self.options.listed else QUERIES

    @cached_property
    def looks(self) -> list[torch.Tensor]:
        """What the other prompts' last tokens attend to, by layer and head."""
        self.compile("eager", {})
        return heads.looks(self.model, self.others, {"passes": ["dense"]}, self.queries, lambda: None)

    @cached_property
    def likeness(self) -> torch.Tensor:
        """Cosines of the residual stream before and after each block at the other prompts' last tokens, [blocks, tokens]."""
        self.compile("eager", {})
        return torch.cat([feed_forward.similarities(self.model, ids, chunk=ids.shape[1])[:, -64:] for ids in self.others], 1)

    def choosing(self, parameters: dict[str, Any]) -> TokenSelect:
        """The method of a cell, without its heads where they are to be found."""
        select: dict[str, Any] = {name: value for name, value in parameters.items() if name != "chunk"}
        kernel = KERNEL["pieces" if self.subject.pieces else "bytes"]
        named: dict[str, Any] = {"heads": None} if parameters["heads"] == "found" else {}
        return TokenSelect(**{**select, **named}, kernel=kernel, queries=self.queries)

    def settled(self, method: str, parameters: dict[str, Any]) -> dict[str, Any]:
        """The parameters with what they leave to be found. Raises UnsupportedError where nothing is."""
        if parameters.get("heads") == "found":
            found, held = heads.choose_heads(self.looks, parameters["layer"], self.choosing(parameters))
            if not found:
                raise UnsupportedError(f"no head of layer {parameters['layer']} chooses")
            return {**parameters, "heads": list(found), "held": round(held, 4)}
        if method != "ffn_skip":
            return parameters
        if parameters["policy"] == "schedule":
            cold = {"cold_first": 1, "cold_last": 1}
            return {**parameters, **cold, "most": parameters["share"] * self.layers / (self.layers - 2)}
        chosen = feed_forward.propose(self.likeness, parameters["share"], (1, 1) if self.layers < 10 else None)
        return {**parameters, **{name: getattr(chosen, name) for name in ("threshold", "skip", "cold_first", "cold_last")}}

    def compile(self, method: str, parameters: dict[str, Any]) -> None:
        """The model so that it chooses as a settled cell says; uncompiled for eager."""
        model = self.model
        torch._dynamo.reset()
        regional.remove(model)
        model._compiled_call_impl = None
        if method == "eager":
            return
        shared: dict[str, Any] = {"lower": "eager", "progress": False}
        if method == "skip_layers":
            between = self.layers - parameters["first"] - 1
            skip = {"first": parameters["first"], "most": parameters["bypassed"] / between, "warmup": 0, "length": 0}
            sparsify.compile(model, passes=["skip_layers", "dense"], skip_layers=skip, strict=True, **shared)
        elif method == "ffn_skip":
            skip = {name: value for name, value in parameters.items() if name != "share"} | {"warmup": 0, "length": 0}
            sparsify.compile(model, passes=["ffn_skip", "dense"], ffn_skip=skip, min_length=0, strict=True, **shared)
        else:
            select = {name: value for name, value in parameters.items() if name != "held"}
            options = self.choosing(select).options() | {"mode": "narrow" if method == "narrow" else "prompt"}
            sparsify.compile(model, passes=["token_select", "dense"], token_select=options, strict=True, **shared)

    def answered(self, method: str, parameters: dict[str, Any], items: list[needles.Prompt]) -> list[torch.Tensor]:
        """Which questions are answered, bool [prompts] a turn, the first one's first."""
        model, first = self.model, items[0]
        if method in ("eager", "narrow"):
            cached = with_cache(model, DynamicCache(config=model.config)) | {"use_cache": True}
            keep = lambda ids: 1 if ids.shape[1] == first.answers[0][0] else ids.shape[1]  # of a prompt the last row is read
            feed = lambda ids: model(ids.to(model.device), logits_to_keep=keep(ids), **cached).logits
            return list(rows_right_by_turn(feed, items))
        (start, size), question = first.answers[0], first.questions[0]
        ids = torch.cat([item.ids for item in items]).to(model.device)
        prompt = ids[:, :start]
        if method == "retrieve":
            prompt = sparsify.retrieve(model, ids[:, :question], ids[:, question:start], chunk=parameters["chunk"]).ids
        greedy: dict[str, Any] = {"max_new_tokens": size, "do_sample": False, "pad_token_id": 0}
        made = model.generate(prompt, attention_mask=torch.ones_like(prompt), **greedy)[:, prompt.shape[1] :]
        if made.shape[1] < size:  # every row ended early
            made = torch.nn.functional.pad(made, (0, size - made.shape[1]), value=-1)
        return [(made == ids[:, start : start + size]).all(-1)]

    @torch.no_grad()
    def measure(self, method: str, parameters: dict[str, Any]) -> dict[str, Any]:
        """One settled cell."""
        options = self.options
        self.compile(method, parameters)
        begin, first, later = time.monotonic(), [], []
        batch = 1 if method == "retrieve" else options.batch
        seeds = range(options.seed, options.seed + options.questions)
        for at in range(0, len(seeds), batch):
            turns = [right.tolist() for right in self.answered(method, parameters, [self.prompt(seed) for seed in seeds[at : at + batch]])]
            first += turns[0]
            later += itertools.chain.from_iterable(turns[1:])
        found: dict[str, Any] = {"right": sum(first), "asked": len(first), "interval": wilson(sum(first), len(first))}
        if later:
            found |= {"later_right": sum(later), "later_asked": len(later)}
        return {**found, "seconds": time.monotonic() - begin}


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=" ".join((__doc__ or "").split("\n\n")[0].split()))
    parser.add_argument("--model", type=Path, required=True, help="folder of a model of bytes, or of word pieces with its tokenizer.json")
    parser.add_argument("--text", type=Path, help="file to hide facts in; default: the standard library's source")
    parser.add_argument("--lengths", type=int, nargs="+", default=[8192, 32768], help="tokens of a prompt")
    parser.add_argument(
        "--methods",
        nargs="+",
        default=["eager", "narrow", "prompt"],
        choices=["eager", "narrow", "prompt", "retrieve", "skip_layers", "ffn_skip"],
    )
    parser.add_argument("--layers", type=int, nargs="+", default=[], help="that choose")
    parser.add_argument("--keeps", type=int, nargs="+", default=[512, 1024], help="tokens that go on")
    parser.add_argument("--heads", nargs="+", default=["all"], help="that choose: all, found, or numbers as 0,2")
    parser.add_argument("--listed", action="store_true", help="all questions stand behind the context before the first is asked")
    parser.add_argument("--first", type=int, nargs="+", default=[1], help="first layers that every token runs, for skip_layers")
    parser.add_argument("--bypassed", type=int, nargs="+", default=[1, 2], help="layers behind these that an answer's tokens bypass")
    parser.add_argument("--policies", nargs="+", default=["schedule", "similarity"], choices=["schedule", "similarity"], help="of ffn_skip")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.25], help="of all feed-forward blocks that ffn_skip leaves out")
    parser.add_argument("--chunk", type=int, default=8192, help="tokens of a call of sparsify.retrieve")
    parser.add_argument("--questions", type=int, default=48, help="prompts of a cell")
    parser.add_argument("--batch", type=int, default=1, help="prompts of a call")
    parser.add_argument("--needles", type=int, default=32, help="facts a prompt")
    parser.add_argument("--asks", type=int, default=3, help="questions a prompt, one a turn")
    parser.add_argument("--seed", type=int, default=needles.FIRST_SEED, help="first prompt's seed; the others follow")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=records.RESULTS / "token_answers.jsonl")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    text = options.text.read_bytes() if options.text else needles.stdlib_text(TEXT_BYTES)
    subject = subjects.load(options.model, text, options.device, options.needles, options.asks)
    facts: dict[str, Any] = {
        "model": options.model.name,
        "model_sha256": records.sha256(options.model),
        "text_sha256": hashlib.sha256(text).hexdigest(),
        "needles": options.needles,
        "seeds": [options.seed, options.seed + options.questions],
        "dtype": str(subject.model.dtype).removeprefix("torch."),
        "layers": subject.model.config.num_hidden_layers,
        "listed": options.asks if options.listed else None,
    }
    failed = 0
    for length in options.lengths:
        asker = Asker(subject, length, options)
        for cell in cells(options):
            try:
                cell["parameters"] = asker.settled(**cell)
                found: dict[str, Any] = asker.measure(**cell)
            except Exception as error:
                traceback.print_exc()
                failed += 1
                found = {"error": f"{type(error).__name__}: {str(error)[:500]}"}
            record = records.append(options.out, TokenAnswers(**cell, **facts, **found, length=length))
            print(
                {name: record.get(name) for name in ("method", "parameters", "length", "right", "asked", "later_right", "error")},
                flush=True,
            )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
