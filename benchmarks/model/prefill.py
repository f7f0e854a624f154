"""How long a whole model's prefill takes: eager, Inductor, sparsify's exact pass and block-sparse attention, side by side in one process.

    python -m benchmarks run prefill --lengths 4096 32768 131072
    python -m benchmarks run prefill --lengths 1024 2048 4096 8192 16384 32768 65536 131072 --variants eager default
    python -m benchmarks run prefill --lengths 131072 --variants eager xattention token_select --select 12:8192

`default` is `backend="sparsify"` with no options: what it chooses must never be slower than eager. Random weights attend to everything, so
that the estimate finds little to leave out: the worst case for it.

`minference` sees so many tokens in columns and in diagonals (`--pattern COLUMNS:DIAGONALS`).
`token_select` is block-sparse attention up to a layer and so many tokens behind it (`--select LAYER:TOKENS`), chosen by all of its heads;
each kind of layer is compiled by itself, as `sparsify.compile` does it. What it costs does not depend on which tokens it chooses.

The model is a LlamaForCausalLM of Llama-3.1-8B's shape with random weights, built on the GPU (bf16): speed does not depend on the weights,
and `density` fixes how many blocks are visited whatever they are. Cache on, logits of the last token. Appends to results/prefill.jsonl.
"""

from __future__ import annotations

import argparse
import sys
import traceback
from pathlib import Path
from typing import Any

import torch

import sparsify
from benchmarks.lib import peers, records
from benchmarks.lib.models import SHAPES, build, clean
from benchmarks.model import Prefill
from sparsify.commands.bench.clock import reason
from sparsify.commands.bench.prefill import compare, measure
from sparsify.generation.regions import regional
from sparsify.planning.registry import discover


def variants(
    density: float, select: tuple[int, int] = (12, 8192), pattern: tuple[int, int] = (1024, 4096)
) -> dict[str, dict[str, Any] | None]:
    """For each variant its `model.compile` arguments, None for eager.

    Args:
        select: of token_select, the layer that chooses, and tokens behind it.
        pattern: of minference, tokens in columns and in diagonals.
    """
    sparse = {"passes": ["xattention", "dense"], "xattention": {"density": density}, "min_length": 0, "strict": True}
    chosen = {"layer": select[0], "heads": "all", "keep": select[1]}
    selecting = {"passes": ["token_select", "xattention", "dense", "ffn_parts"], "token_select": chosen}
    patterns = {**sparse, "passes": ["minference", "dense"], "minference": {"columns": pattern[0], "diagonals": pattern[1]}}
    return {
        **peers.MODELS,
        "default": {"backend": "sparsify"},
        "dense": {"backend": "sparsify", "options": {"passes": ["dense"], "strict": True}},
        "xattention": {"backend": "sparsify", "options": sparse},
        "minference": {"backend": "sparsify", "options": patterns},
        "token_select": {"backend": "sparsify", "options": {**sparse, **selecting}},
    }


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 32768, 131072])
    parser.add_argument("--variants", nargs="+", default=["eager", "dense", "xattention", "inductor"], choices=list(variants(0.1)))
    parser.add_argument("--skip", nargs="*", default=["inductor:131072"], help="VARIANT:LENGTH pairs to leave out")
    parser.add_argument("--density", type=float, default=0.1)
    parser.add_argument("--select", type=_pair, default="12:8192", metavar="LAYER:TOKENS", help="of token_select")
    parser.add_argument("--pattern", type=_pair, default="1024:4096", metavar="COLUMNS:DIAGONALS", help="of minference, in tokens")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--shape", choices=list(SHAPES), default="8b")
    parser.add_argument("--layers", type=int, help="fewer layers than the shape has")
    parser.add_argument("--static", action="store_true", help="compile each length anew instead of once for all")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=records.RESULTS / "prefill.jsonl")
    return parser.parse_args(arguments)


def _pair(text: str) -> tuple[int, int]:
    first, _, second = text.partition(":")
    return int(first), int(second)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    model = build(options.shape, options.layers, options.device)
    parameters = sum(p.numel() for p in model.parameters())
    generator = torch.Generator().manual_seed(0)
    prompts = {n: torch.randint(0, model.config.vocab_size, (1, n), generator=generator).to(options.device) for n in options.lengths}
    references: dict[int, torch.Tensor] = {}
    failed = 0
    for name in options.variants:
        arguments_of = variants(options.density, options.select, options.pattern)[name]
        torch._dynamo.reset()
        model._compiled_call_impl = None  # what `model.compile` sets; None is the model as it was
        regional.remove(model)
        if name == "token_select" and arguments_of is not None:
            sparsify.compile(model, dynamic=not options.static, **arguments_of["options"])
        elif arguments_of is not None:
            model.compile(**arguments_of, dynamic=not options.static)
        for length in options.lengths:
            if f"{name}:{length}" in options.skip:
                continue
            try:
                # long prefills vary little and cost much
                repeats = max(2, options.repeats * 32768 // max(length, 32768))
                found, logits = measure(model, prompts[length], repeats, options.device)
                if name == "eager":
                    references[length] = logits
                found |= compare(logits, references.get(length))
            except Exception as error:
                traceback.print_exc()
                failed += 1
                found = {"error": reason(error)}
                clean(options.device)
            facts = {
                "shape": options.shape,
                "layers": model.config.num_hidden_layers,
                "parameters": parameters,
                "dynamic": not options.static,
            }
            requested = options.density if name in ("xattention", "token_select") else None
            if name in ("xattention", "default", "token_select"):
                chosen = {} if name == "default" else {"density": options.density}
                facts["estimate"] = list(discover()["xattention"](**chosen).estimate)
            numbers = {"token_select": options.select, "minference": options.pattern}.get(name)
            variant = name if numbers is None else f"{name} {numbers[0]}:{numbers[1]}"
            facts |= {"variant": variant, "length": length, "requested_density": requested, "seed": 0}
            record = records.append(options.out, Prefill(**({"density": None, "peak_bytes": None} | found), **facts))
            print({key: record.get(key) for key in ("variant", "length", "ms", "peak_bytes", "density", "same_token", "error")}, flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
