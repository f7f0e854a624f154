"""Do the answers survive? Needles in a haystack through `model.compile(backend="sparsify")`, method by method.

    python -m benchmarks run answers --model DIR --text FILE --lengths 8192 16384 32768 --jobs 6

For each length and each of eager, dense, sink_window, minference, xattention (thresholds x strides x pools) and plans that
`sparsify calibrate` wrote (`--plans FILE`): share of answers right with its interval, realised density, mean NLL. Every method
sees the same prompts. Appends to benchmarks/results/answers.jsonl.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaForCausalLM

from benchmarks.answers import Answers
from benchmarks.lib import jobs, needles, records
from sparsify.api import record_density
from sparsify.ops.estimate import parse_label

ASKS = 16
COMMON = {"min_length": 0, "strict": True}
# rule and estimate, stride, thresholds: what was the default before, the exact estimate, then what makes it cheaper, finer and finer
ABLATION = (
    ("max+pair+int8", 8, (0.95,)),
    ("row", 4, (0.6,)),
    ("row+pair+int8", 8, (0.8, 0.9)),
    ("row+pair+int8", 4, (0.6, 0.8)),
    ("row+pair+int8+peak", 8, (0.8, 0.9)),
    ("row+pair+int8+peak", 4, (0.5, 0.6, 0.7, 0.8)),
    ("row+quad+int8+peak", 4, (0.7, 0.8)),
    ("row+pair+int8+peak/4@0.95", 8, (0.7,)),
)


def cells(
    thresholds: list[float],
    strides: list[int],
    pools: list[str],
    sinks: int,
    windows: list[int],
    patterns: Sequence[tuple[int, int]] = (),
    plans: Sequence[Path] = (),
) -> list[dict[str, Any]]:
    """What to measure: {"method", "parameters", "options"}; options None means uncompiled.

    pools: `sum`, `max` or `row`, then any variants of the estimate as suffixes: `max+half+int8`. patterns: columns and diagonals, tokens.
    """
    found: list[dict[str, Any]] = [
        {"method": "eager", "parameters": {}, "options": None},
        {"method": "dense", "parameters": {}, "options": {"passes": ["dense"], **COMMON}},
    ]
    found += [block_selection(pool, stride, threshold) for pool in pools for stride in strides for threshold in thresholds]
    for columns, diagonals in patterns:
        chosen = {"columns": columns, "diagonals": diagonals}
        options = {"passes": ["minference", "dense"], "minference": chosen, **COMMON}
        found.append({"method": "minference", "parameters": chosen, "options": options})
    for window in windows:
        chosen = {"sinks": sinks, "window": window}
        options = {"passes": ["sink_window", "dense"], "sink_window": chosen, **COMMON}
        found.append({"method": "sink_window", "parameters": chosen, "options": options})
    for plan in plans:
        chosen = {"plan": plan.stem, "sha256": records.sha256(plan)}
        found.append({"method": "plan", "parameters": chosen, "options": {"plan": str(plan), **COMMON}})
    return found


def block_selection(pool: str, stride: int, threshold: float) -> dict[str, Any]:
    """A cell of xattention; pool: as `cells` takes them."""
    chosen = {"stride": stride, "pool": pool, "threshold": threshold}
    found = parse_label(pool)
    method = {**chosen, **found, "estimate": list(found["estimate"].variants)}
    return {"method": "xattention", "parameters": chosen, "options": {"passes": ["xattention", "dense"], "xattention": method, **COMMON}}


def sink_window_density(length: int, sinks: int, window: int) -> float:
    """Share of the causal (query, key) pairs of a prefill that sinks and a window of last keys leave, by token."""
    visible = sum(min(row + 1, sinks + window) for row in range(length))
    return visible / (length * (length + 1) / 2)


def load(folder: Path, device: str) -> LlamaForCausalLM:
    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    return LlamaForCausalLM.from_pretrained(folder, dtype=dtype).to(device).eval()


def measure(
    model: LlamaForCausalLM, cell: dict[str, Any], length: int, text: bytes, seeds: range, needles_count: int, form: str = "hash"
) -> dict[str, Any]:
    """One cell at one length, with the model compiled already. Density: mean over layers and prompts, and by layer."""
    device = model.device

    def logits(ids: torch.Tensor) -> torch.Tensor:
        return model(ids, use_cache=False).logits

    started = time.monotonic()
    with record_density() as found:
        score = needles.score(logits, length, text, seeds, needles=needles_count, asks=ASKS, device=device, form=form)
    layers = model.config.num_hidden_layers
    by_layer = None
    density = 1.0
    if cell["method"] == "sink_window":
        density = sink_window_density(length, **cell["parameters"])
    elif cell["method"] in ("xattention", "minference", "plan"):
        if len(found) != layers * len(seeds):
            raise RuntimeError(f"{len(found)} block selections in {len(seeds)} prompts of {layers} layers: not every layer was sparse")
        by_layer = [sum(found[layer::layers]) / len(seeds) for layer in range(layers)]
        density = sum(by_layer) / layers
    elif found:
        raise RuntimeError(f"{cell['method']} chose blocks")
    return {
        "right": score.right,
        "asked": score.asked,
        "interval": score.interval,
        "nll": score.nll,
        "density": density,
        "density_by_layer": by_layer,
        "seconds": time.monotonic() - started,
    }


@torch.no_grad()
def work(todo: Any, options: argparse.Namespace, facts: dict[str, Any]) -> int:
    """Takes cells from the queue until it is empty; returns how many measurements failed."""
    if options.device == "cpu":
        torch.set_num_threads(options.threads)
    text = options.text.read_bytes()
    seeds = range(options.seed, options.seed + -(-options.questions // ASKS))
    failed = 0
    while (cell := todo.get()) is not None:
        torch._dynamo.reset()
        model = load(options.model, options.device)
        if cell["options"] is not None:
            lowered = {"lower": options.lower} if options.lower else {}
            model.compile(backend="sparsify", options={**cell["options"], **lowered}, dynamic=not options.static)
        for length, form in itertools.product(options.lengths, options.forms):
            try:
                found = measure(model, cell, length, text, seeds, options.needles, form)
            except Exception as error:
                traceback.print_exc()
                failed += 1
                found = {"error": f"{type(error).__name__}: {str(error)[:500]}"}
            record = records.append(
                options.out,
                Answers(
                    method=cell["method"],
                    parameters=cell["parameters"],
                    length=length,
                    needles=options.needles,
                    asks=ASKS,
                    form=None if form == "hash" else form,
                    seeds=[seeds.start, seeds.stop],
                    dtype=str(model.dtype).removeprefix("torch."),
                    **found,
                    **facts,
                ),
            )
            print(
                {
                    name: record.get(name)
                    for name in ("method", "parameters", "length", "form", "right", "asked", "density", "nll", "error")
                },
                flush=True,
            )
    return failed


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="folder of a byte-level LlamaForCausalLM")
    parser.add_argument("--text", type=Path, required=True, help="file to hide needles in")
    parser.add_argument("--lengths", type=int, nargs="+", default=[8192, 16384, 32768], help="prompt lengths in bytes")
    parser.add_argument("--questions", type=int, default=192, help="at least so many questions a cell")
    parser.add_argument("--needles", type=int, default=32, help="facts a prompt")
    parser.add_argument("--seed", type=int, default=needles.FIRST_SEED, help="first prompt's seed; the others follow")
    parser.add_argument("--forms", nargs="+", default=["hash"], choices=[*needles.FORMS], help="how facts are written and asked for")
    parser.add_argument("--ablation", action="store_true", help="xattention: rules and estimates with thresholds of their own, no products")
    parser.add_argument("--lower", help="what compiles the rewritten graph; eager: nothing, which starts sooner and answers alike")
    parser.add_argument("--thresholds", type=float, nargs="*", default=[0.8, 0.9, 0.95, 0.99])
    parser.add_argument("--strides", type=int, nargs="*", default=[8, 16])
    parser.add_argument(
        "--pools", nargs="*", default=["sum", "max"], help="sum, max or row, then any of +half, +group, +pair or +quad, +int8"
    )
    parser.add_argument("--sinks", type=int, default=128)
    parser.add_argument("--windows", type=int, nargs="*", default=[2048, 8192])
    parser.add_argument("--patterns", nargs="*", default=["512:1024"], metavar="COLUMNS:DIAGONALS", help="of minference, in tokens")
    parser.add_argument("--plans", type=Path, nargs="*", default=[], metavar="FILE", help="that `sparsify calibrate` wrote")
    parser.add_argument("--methods", nargs="+", default=["eager", "dense", "xattention", "sink_window", "plan"])
    parser.add_argument("--static", action="store_true", help="compile each length anew instead of once for all")
    parser.add_argument("--jobs", type=int, default=1, help="processes side by side (accuracy does not mind sharing a GPU)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads a process, on a CPU")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=records.RESULTS / "answers.jsonl")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    patterns = [(int(first), int(second)) for first, _, second in (text.partition(":") for text in options.patterns)]
    todo = cells(
        options.thresholds,
        options.strides,
        [] if options.ablation else options.pools,
        options.sinks,
        options.windows,
        patterns,
        options.plans,
    )
    if options.ablation:
        todo += [block_selection(pool, stride, threshold) for pool, stride, thresholds in ABLATION for threshold in thresholds]
    todo = [cell for cell in todo if cell["method"] in options.methods]
    facts = {"model": options.model.name, "model_sha256": records.sha256(options.model), "text_sha256": records.sha256(options.text)}
    return jobs.run(work, todo, options.jobs, options, facts)


if __name__ == "__main__":
    sys.exit(main())
