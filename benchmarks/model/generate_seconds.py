"""What a user waits for from the first prompt on: `generate()` uncompiled, compiled by regions (`sparsify.compile`) and as a whole.

    python -m benchmarks run generate_seconds [--layers 32 4] [--hidden 4096] [--length 4096] [--prompts 14] [--tokens 32]
        [--ways eager regions whole] [--states cold warm]

Every measurement is a fresh process. It answers one prompt of `length` tokens twice, of which the second time compiles nothing, then
`prompts` prompts of other lengths, once each. "cold" starts with empty cache folders; "warm" is the same in the folders that cold
left. Prompts are of random tokens, batch 1, lengths spread evenly in the logarithm over 516 to 13 735 tokens (or to `longest`), shuffled.
Appends to results/generate_seconds.jsonl.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.lib import records
from benchmarks.model import GenerateSeconds

ROOT = Path(__file__).parents[2]
SHORTEST, LONGEST = 516, 13735


def lengths(count: int, longest: int = LONGEST) -> list[int]:
    """`count` prompt lengths between the shortest and the longest, in an order of their own."""
    shortest = min(SHORTEST, longest)
    steps = [math.log(shortest) + (math.log(longest) - math.log(shortest)) * i / max(1, count - 1) for i in range(count)]
    found = [round(math.exp(step)) for step in steps]
    random.Random(0).shuffle(found)
    return found


def build(layers: int, hidden: int, device: str) -> Any:
    """A llama of the 8B shape, or of its proportions at another width; random weights, bf16 on a GPU."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=128256 if hidden >= 2048 else 512, hidden_size=hidden, intermediate_size=hidden * 7 // 2, num_hidden_layers=layers,
        num_attention_heads=max(1, hidden // 128), num_key_value_heads=max(1, hidden // 512), head_dim=128, max_position_embeddings=1 << 20,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0}, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device(device):
        return LlamaForCausalLM._from_config(config, dtype=torch.bfloat16 if device == "cuda" else torch.float32).eval()


def child(way: str, layers: int, given: argparse.Namespace) -> dict[str, Any]:
    """One process: seconds of each answer, and how many graphs and layers were compiled."""
    import torch

    import sparsify
    from sparsify import api

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = build(layers, given.hidden, device)
    vocabulary = model.config.vocab_size
    generator = torch.Generator().manual_seed(0)

    def answer(length: int) -> float:
        ids = torch.randint(3, vocabulary, (1, length), generator=generator).to(device)
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=given.tokens, do_sample=False, pad_token_id=0)
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    options: dict[str, Any] = {} if given.sparse else {"exact": True}
    start = time.perf_counter()
    if way != "eager":
        sparsify.compile(model, whole=way == "whole", **options)
    asked = time.perf_counter() - start
    with torch.no_grad(), api.collect_plans() as plans:
        first = answer(given.length) + asked
        again = answer(given.length)
        others = [answer(length) for length in lengths(given.prompts, given.longest)]
    return {
        "first_s": first,
        "again_s": again,
        "prompts_s": others,
        "graphs": len(plans),
        "compiled_layers": sum(len(plan.decisions) // (plan.serves or 1) for plan in plans),
        "capture": "; ".join(dict.fromkeys(plan.capture for plan in plans if plan.capture)),
    }


def _run(way: str, layers: int, folder: str, arguments: list[str]) -> dict[str, Any]:
    variables = {"TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor", "TRITON_CACHE_DIR": f"{folder}/triton"}
    command = [sys.executable, "-m", "benchmarks.model.generate_seconds", "--child", way, "--layers", str(layers), *arguments]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **variables}, capture_output=True, text=True, timeout=1800)
    if done.returncode:
        raise RuntimeError(f"{way}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[32, 4])
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--longest", type=int, default=LONGEST)
    parser.add_argument("--prompts", type=int, default=14)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--sparse", action="store_true", help="the default methods, lossy ones too, instead of exact ones only")
    parser.add_argument("--ways", nargs="+", default=["eager", "regions", "whole"], choices=["eager", "regions", "whole"])
    parser.add_argument("--states", nargs="+", default=["cold", "warm"], choices=["cold", "warm"])
    parser.add_argument("--child", help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.child:
        print(json.dumps(child(given.child, given.layers[0], given)))
        return 0
    sizes = [f"--{name}={getattr(given, name)}" for name in ("hidden", "length", "longest", "prompts", "tokens")]
    sizes += ["--sparse"] if given.sparse else []
    for layers in given.layers:
        for way in given.ways:
            with tempfile.TemporaryDirectory() as folder:
                for state in given.states if way != "eager" else given.states[:1]:
                    found = _run(way, layers, folder, sizes)
                    record = GenerateSeconds(
                        layers=layers,
                        hidden=given.hidden,
                        length=given.length,
                        tokens=given.tokens,
                        way=way,
                        state=state,
                        exact=not given.sparse,
                        beyond_s=found["first_s"] - found["again_s"],
                        lengths=lengths(given.prompts, given.longest),
                        **found,
                    )
                    records.append(records.RESULTS / "generate_seconds.jsonl", record)
                    print(f"{layers} layers, {way}, {state}: first {found['first_s']:.1f} s, again {found['again_s']:.2f} s, "
                          f"{given.prompts} prompts {sum(found['prompts_s']):.1f} s, {found['graphs']} graphs", flush=True)  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
