"""Do the answers of the bundled model of word pieces survive? RULER's needles, facts in other wordings and chains of variables, by method.

    python -m benchmarks run code_answers --jobs 6 --lower eager
    python -m benchmarks run code_answers --device cpu --lengths 768 --prompts 1 --tasks "facts, value" --lower eager

For each length and task and each of eager, dense, sink_window and the block selections: questions right with their interval, realised
density; and the NLL of text. Every method sees the same prompts. Appends to benchmarks/results/code_answers.jsonl.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import random
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.answers import CodeAnswers
from benchmarks.answers.run import ABLATION, block_selection, cells, sink_window_density
from benchmarks.lib import code_model, jobs, recall, records
from benchmarks.lib.needles import FIRST_SEED, stdlib_text, wilson
from sparsify.api import record_density

TEXT = "text"  # the task without questions: its NLL
TEXT_BYTES = 2_000_000  # of the standard library
NLL_TOKENS = 1024  # of the end of a text
TASKS = (TEXT, "facts, value", "facts, assign", "magic, digits in needles", "magic, uuid in needles", "chains, code", "chains, ruler")


@torch.no_grad()
def measure(model: Any, cell: dict[str, Any], maker: recall.Maker, task: str, length: int, seeds: range) -> dict[str, Any]:
    """One cell: questions right and asked, NLL of text in nats a token, density as mean over layers and prompts."""
    right = asked = 0
    losses: list[float] = []
    started = time.monotonic()
    with record_density() as found:
        for seed in seeds:
            rng = random.Random(f"{task} {length} {seed}")
            ids, codes = maker.make(rng, TEXT, length) if task == TEXT else recall.asked(maker, length)[task](rng)
            tokens = torch.from_numpy(ids.astype("int64"))[None].to(model.device)
            logits = model(tokens, use_cache=False).logits[0]
            if task == TEXT:
                last = min(NLL_TOKENS, length - 1)
                losses.append(F.cross_entropy(logits[-last - 1 : -1].float(), tokens[0, -last:]).item())
                continue
            guesses = logits.argmax(-1)
            for start, count in recall.answers(codes):
                right += bool((guesses[start - 1 : start - 1 + count] == tokens[0, start : start + count]).all())
                asked += 1
    density = 1.0
    if cell["method"] == "sink_window":
        density = sink_window_density(length, **cell["parameters"])
    elif cell["method"] == "xattention":
        if len(found) != model.config.num_hidden_layers * len(seeds):
            raise RuntimeError(f"{len(found)} block selections in {len(seeds)} prompts: not every layer was sparse")
        density = sum(found) / len(found)
    elif found:
        raise RuntimeError(f"{cell['method']} chose blocks")
    share: dict[str, Any] = {"right": right, "asked": asked, "interval": [*wilson(right, asked)]} if asked else {}
    nll = {"nll": sum(losses) / len(losses)} if losses else {}
    return {**share, **nll, "density": density, "seconds": time.monotonic() - started}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[8192, 16384], help="prompt lengths in tokens")
    parser.add_argument("--tasks", nargs="+", default=[*TASKS], help="`text`, and the names of benchmarks.lib.recall.asked")
    parser.add_argument("--prompts", type=int, default=24, help="of each task and length")
    parser.add_argument("--seed", type=int, default=FIRST_SEED, help="first prompt's seed; the others follow")
    parser.add_argument("--text", type=Path, help="file to ask about; default: the standard library's source")
    parser.add_argument("--methods", nargs="+", default=["eager", "dense", "xattention", "sink_window"])
    parser.add_argument("--pools", nargs="*", help="block selections as in `run answers`; default: its ablation")
    parser.add_argument("--thresholds", type=float, nargs="*", default=[0.9, 0.95])
    parser.add_argument("--strides", type=int, nargs="*", default=[8])
    parser.add_argument("--sinks", type=int, default=128)
    parser.add_argument("--windows", type=int, nargs="*", default=[2048])
    parser.add_argument("--lower", help="what compiles the rewritten graph; eager: nothing, which starts sooner and answers alike")
    parser.add_argument("--jobs", type=int, default=1, help="processes side by side (accuracy does not mind sharing a GPU)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=records.RESULTS / "code_answers.jsonl")
    return parser.parse_args(arguments)


def work(todo: Any, options: argparse.Namespace, text: str, facts: dict[str, Any]) -> int:
    """Takes cells from the queue until it is empty; returns how many measurements failed."""
    maker = code_model.maker(text)
    seeds = range(options.seed, options.seed + options.prompts)
    failed = 0
    while (cell := todo.get()) is not None:
        torch._dynamo.reset()
        model: Any = code_model.load(getattr(torch, facts["dtype"])).to(options.device)
        if cell["options"] is not None:
            lowered = {"lower": options.lower} if options.lower else {}
            model.compile(backend="sparsify", options={**cell["options"], **lowered}, dynamic=True)
        for length, task in itertools.product(options.lengths, options.tasks):
            try:
                found = measure(model, cell, maker, task, length, seeds)
            except Exception as error:
                traceback.print_exc()
                failed += 1
                found = {"error": f"{type(error).__name__}: {str(error)[:500]}"}
            cell_of = {name: cell[name] for name in ("method", "parameters")}
            record = CodeAnswers(**facts, **cell_of, task=task, length=length, seeds=[seeds.start, seeds.stop], **found)
            records.append(options.out, record)
            print({**cell_of, "task": task, "length": length} | found, flush=True)
    return failed


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    todo = cells(options.thresholds, options.strides, options.pools or [], options.sinks, options.windows)
    if options.pools is None:
        todo += [block_selection(pool, stride, threshold) for pool, stride, thresholds in ABLATION for threshold in thresholds]
    text = options.text.read_text() if options.text else stdlib_text(TEXT_BYTES).decode(errors="ignore")
    facts = {
        "model": code_model.MODEL.name,
        "model_sha256": records.sha256(code_model.MODEL),
        "text_sha256": hashlib.sha256(text.encode()).hexdigest(),
        "dtype": "bfloat16" if options.device.startswith("cuda") else "float32",
    }
    return jobs.run(work, [cell for cell in todo if cell["method"] in options.methods], options.jobs, options, text, facts)


if __name__ == "__main__":
    sys.exit(main())
