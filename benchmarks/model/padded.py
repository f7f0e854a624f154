"""Prompts of different lengths in one batch: what is computed for padding, and what packing them leaves of it.

    python -m benchmarks run padded                                              # 16 prompts of 1K to 16K tokens, 8B shape
    python -m benchmarks run padded --shape tiny --prompts 6 --shortest 40 --longest 240 --device cpu

Variants, by turns in one process:

    eager       the padded batch, uncompiled
    dense       the padded batch under `sparsify.compile`
    unpad       the same with the method `unpad`
    pack        `sparsify.pack`: a cache for each prompt
    alone       each prompt by itself under `sparsify.compile`, one after the other: the time of the tokens

Cache on, logits of each prompt's last token, padding on the left. `difference` is the largest of these logits from those of `alone`.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import sparsify
from benchmarks.lib import records
from benchmarks.lib.models import SHAPES, build, clean, peak_bytes
from benchmarks.model import Padded
from sparsify.commands.bench.clock import Clock, reason
from sparsify.generation.regions import regional

VARIANTS = ("alone", "eager", "dense", "unpad", "pack")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--shortest", type=int, default=1024)
    parser.add_argument("--longest", type=int, default=16384)
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--shape", choices=list(SHAPES), default="8b")
    parser.add_argument("--layers", type=int, help="fewer layers than the shape has")
    parser.add_argument("--lower", choices=["inductor", "eager"], default="inductor", help="eager: rewritten graphs are not compiled")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=records.RESULTS / "padded.jsonl")
    return parser.parse_args(arguments)


def prompts_of(options: argparse.Namespace, vocabulary: int) -> list[Tensor]:
    """Random tokens, int64 [length] each, of lengths that are evenly spread."""
    steps = max(1, options.prompts - 1)
    lengths = [options.shortest + (options.longest - options.shortest) * step // steps for step in range(options.prompts)]
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, vocabulary, (length,), generator=generator).to(options.device) for length in lengths]


def padded(prompts: list[Tensor]) -> dict[str, Tensor]:
    """The batch, padded on the left."""
    longest = max(map(len, prompts))
    pad = lambda row: torch.nn.functional.pad(row, (longest - len(row), 0))
    mask = torch.stack([pad(torch.ones_like(prompt)) for prompt in prompts])
    return {
        "input_ids": torch.stack([pad(prompt) for prompt in prompts]),
        "attention_mask": mask,
        "position_ids": (mask.cumsum(-1) - 1).clamp(min=0),
    }


def reading(model: Any, variant: str, prompts: list[Tensor]) -> Callable[[], Tensor]:
    """A call that reads all prompts and gives the logits of their last tokens, [prompts, vocabulary]."""
    batch = padded(prompts)
    if variant == "pack":
        return lambda: torch.cat([logits for _, logits in sparsify.pack(model, prompts)])
    if variant == "alone":
        return lambda: torch.cat([model(prompt[None], use_cache=True, logits_to_keep=1).logits[:, -1] for prompt in prompts])
    return lambda: model(**batch, use_cache=True, logits_to_keep=1).logits[:, -1]


@torch.no_grad()
def measure(model: Any, variant: str, prompts: list[Tensor], options: argparse.Namespace) -> tuple[dict[str, Any], Tensor]:
    """Median and times in seconds, of the first call too; peak memory in bytes; the logits."""
    run, clock = reading(model, variant, prompts), Clock(options.device)
    clean(options.device)
    first, logits = clock.once(run)
    clean(options.device)
    times = [clock.once(run)[0] / 1e3 for _ in range(options.repeats)]
    found = {"s": statistics.median(times), "times_s": times, "first_call_s": first / 1e3, "peak_bytes": peak_bytes(options.device)}
    return found, logits.float()


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    model = build(options.shape, options.layers, options.device)
    prompts = prompts_of(options, model.config.vocab_size)
    want, failed = None, 0
    for variant in options.variants:
        torch._dynamo.reset()
        regional.remove(model)
        model._compiled_call_impl = None
        if variant != "eager":
            passes = ["unpad", "dense"] if variant == "unpad" else ["dense"]
            sparsify.compile(model, passes=passes, strict=True, lower=options.lower, unpad={"when": "always"})
        try:
            found, logits = measure(model, variant, prompts, options)
            want = logits if variant == "alone" else want
            if want is not None:
                found["difference"] = (logits - want).abs().max().item()
        except Exception as error:
            traceback.print_exc()
            failed, found = failed + 1, {"error": reason(error)}
            clean(options.device)
        facts = {
            "shape": options.shape,
            "layers": model.config.num_hidden_layers,
            "prompts": options.prompts,
            "shortest": options.shortest,
            "longest": options.longest,
            "tokens": sum(map(len, prompts)),
            "variant": variant,
        }
        record = records.append(options.out, Padded(**({"peak_bytes": None} | found), **facts))
        print({key: record.get(key) for key in ("variant", "s", "first_call_s", "peak_bytes", "difference", "error")}, flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
