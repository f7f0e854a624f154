"""Feed-forward skipping at decode: milliseconds a token over the share of skipped blocks, and what skipping does to answers.

    python -m benchmarks run ffn                                     # tilings, stack, model
    python -m benchmarks run ffn --parts prefill
    python -m benchmarks run ffn --parts quality --model DIR [--text FILE]

tilings: the fastest tile sizes on this GPU. stack: the 32 blocks of Llama-3.1-8B's shape in one CUDA graph, against Inductor's; the rows'
counters change between replays. model: a token of the whole model after a 4K prompt, likewise (ffn_model.py). prefill: one block over many
rows (prefill.py). quality: ffn_quality.py. Appends to results/ffn.jsonl; without the part `tilings`, the tile sizes are the best that
this file has. `--shape tiny` runs every part but `tilings` on a CPU.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import hashlib
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.answers.train_demo_model import HELD_OUT, TEXT_BYTES
from benchmarks.ffn import FfnQuality, FfnStack, FfnTilings, prefill
from benchmarks.ffn import model as ffn_model
from benchmarks.ffn.quality import run as run_quality
from benchmarks.ffn.timing import SHAPES, Shape, bandwidth, block_weights, note, ours, plain, spread
from benchmarks.lib import records
from benchmarks.lib.needles import stdlib_text
from sparsify import backends
from sparsify.commands.bench.clock import Clock

SHARES = (0.0, 0.1, 0.25, 0.5, 1.0)
_CLOCK = Clock("cuda" if torch.cuda.is_available() else "cpu")


# -- tilings -----------------------------------------------------------------------------------------------------------------------------


def key_of(shape: Shape) -> tuple[str, int, int]:
    return "bf16", shape.hidden, shape.intermediate


def candidates(rows: int, shape: Shape) -> Iterator[Any]:
    """Tilings around the chosen one that differ in one kernel only."""
    from sparsify.backends.ffn.source import choose_tiling

    base = choose_tiling("bf16", 16 if rows <= 16 else 32, shape.hidden, shape.intermediate, True, 132)
    yield base
    for tile, step, stages in [(64, 64, 4), (64, 64, 6), (64, 128, 2), (32, 128, 4), (32, 256, 3), (16, 256, 4), (128, 64, 4), (32, 64, 6)]:
        yield dataclasses.replace(base, up_tile=tile, up_step=step, up_stages=stages)
    for tile, step, stages, parts in [
        (64, 128, 4, 4),
        (64, 128, 3, 8),
        (64, 256, 3, 4),
        (32, 256, 4, 2),
        (32, 256, 4, 4),
        (16, 256, 5, 1),
        (16, 512, 3, 2),
    ]:
        yield dataclasses.replace(base, down_tile=tile, down_step=step, down_stages=stages, parts=parts)
    yield dataclasses.replace(base, warps=8)


def find_tiling(rows: int, shape: Shape, seconds: float, out: Path) -> Any:
    """The fastest tiling for `rows`: best of the candidates for each kernel, combined if that is faster still. Stops after `seconds`."""
    from sparsify.backends.ffn import few_rows

    weights = block_weights(shape, "cuda", 6)
    x = torch.randn(rows, 1, shape.hidden, device="cuda", dtype=torch.bfloat16)
    flags = torch.zeros(len(weights), rows, dtype=torch.int32, device="cuda")
    key = key_of(shape)
    began, found = time.monotonic(), {}

    def measure(tiling: Any) -> None:
        try:
            few_rows.tilings[key] = tiling
            ms = _CLOCK.replays(lambda: ours(x, weights, flags)) / len(weights)
        except Exception as error:  # too much shared memory, for one
            print(f"  {tiling}: {type(error).__name__}: {str(error)[:100]}", flush=True)
            return
        found[tiling] = ms
        records.append(out, FfnTilings(rows=rows, tiling=dataclasses.asdict(tiling), ms_per_block=ms))
        print(f"  rows {rows}: {1e3 * ms:6.1f} us a block  {tiling}", flush=True)

    listed = list(candidates(rows, shape))
    for tiling in listed:
        if time.monotonic() - began > seconds:
            break
        measure(tiling)
    base = listed[0]
    narrows = ("down_tile", "down_step", "down_stages", "parts")
    wides = ("up_tile", "up_step", "up_stages")
    same = lambda one, names: one.warps == base.warps and all(getattr(one, n) == getattr(base, n) for n in names)
    wide = min((t for t in found if same(t, narrows)), key=found.get, default=base)
    project_down = min((t for t in found if same(t, wides)), key=found.get, default=base)
    measure(dataclasses.replace(wide, **{name: getattr(project_down, name) for name in narrows}))
    best = min(found, key=found.get)
    few_rows.tilings[key] = best
    print(f"best for {rows} rows: {1e3 * found[best]:.1f} us a block: {best}", flush=True)
    return best


def recorded_tilings(out: Path) -> dict[int, Any]:
    """The fastest tiling on record, by rows of a tile."""
    from sparsify.backends.ffn.source import FfnTiling

    best: dict[int, tuple[float, Any]] = {}
    for record in records.read([out]) if out.exists() else ():
        if record["benchmark"] == FfnTilings.NAME:
            rows = 16 if record["rows"] <= 16 else 32
            found = (record["ms_per_block"], FfnTiling(**record["tiling"]))
            best[rows] = min(best.get(rows, found), found, key=lambda pair: pair[0])
    return {rows: tiling for rows, (_, tiling) in best.items()}


def use(best: dict[int, Any], rows: int, shape: Shape) -> None:
    """The tiling on record for `rows`, where there is one."""
    if not torch.cuda.is_available():
        return
    from sparsify.backends.ffn import few_rows

    tiling = best.get(16 if rows <= 16 else 32)
    few_rows.tilings.pop(key_of(shape), None)
    if tiling is not None:
        few_rows.tilings[key_of(shape)] = tiling


# -- a stack of blocks -------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def run_stack(options: argparse.Namespace, shape: Shape, rate: dict[str, float], best: dict[int, Any]) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    weights = block_weights(shape, device)
    compiled = torch.compile(plain, fullgraph=True, dynamic=False)
    for rows in options.rows:
        use(best, rows, shape)
        facts = {"rows": rows, "shape": shape, "rate": rate}
        x = torch.randn(rows, 1, shape.hidden, device=device, dtype=torch.bfloat16)
        torch._dynamo.reset()
        times = _CLOCK.samples(_CLOCK.graph(lambda x=x: compiled(x, weights)), 20)
        note(options, FfnStack, variant="inductor", share=0.0, pattern="all rows", times=times, **facts)
        flags = torch.zeros(shape.layers, rows, dtype=torch.int32, device=device)
        graph = _CLOCK.graph(lambda x=x, flags=flags: ours(x, weights, flags))
        want = plain(x, weights[:4]).float()
        facts["error"] = (ours(x, weights[:4], flags[:4]).float() - want).abs().max().item() / want.abs().max().item()
        for share in SHARES:
            flags.zero_()
            flags[spread(share, shape.layers)] = 1
            share = len(spread(share, shape.layers)) / shape.layers
            note(options, FfnStack, variant="sparsify", share=share, pattern="all rows", times=_CLOCK.samples(graph, 20), **facts)
        for share in SHARES[1:4] if rows > 1 else ():
            generator = torch.Generator(device=device).manual_seed(0)
            flags.copy_(torch.rand(flags.shape, device=device, generator=generator) < share)
            facts["blocks_without_rows"] = (flags.sum(1) == rows).float().mean().item()
            note(options, FfnStack, variant="sparsify", share=share, pattern="each row by itself", times=_CLOCK.samples(graph, 20), **facts)
        del graph


def run_answers(options: argparse.Namespace) -> None:
    from transformers import LlamaForCausalLM

    device = "cuda" if torch.cuda.is_available() else "cpu"
    text = options.text.read_bytes() if options.text else stdlib_text(TEXT_BYTES)[-HELD_OUT:]
    model = LlamaForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval().to(device)
    facts = {
        "model": options.model.name,
        "model_sha256": records.sha256(options.model),
        "blocks": model.config.num_hidden_layers,
        "text_sha256": hashlib.sha256(text).hexdigest(),
        "length": options.length,
    }

    def report(found: dict[str, Any]) -> None:
        records.append(options.out, FfnQuality(**facts, **found))
        where = {k: v for k, v in found.items() if v not in (None, []) and k in ("threshold", "skip", "probability", "layers", "rows")}
        print(
            f"{found['policy']:10s} share {found['share']:.3f}  nll {found['nll']:.4f}  {found['right']}/{found['asked']}  {where}",
            flush=True,
        )

    run_quality(model, options.length, text, options.prompts, options.shares, report, needles=options.needles)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parts = ["tilings", "stack", "model", "prefill", "quality"]
    parser.add_argument("--parts", nargs="+", choices=parts, default=parts[:3])
    parser.add_argument("--shape", choices=list(SHAPES), default="8b")
    parser.add_argument("--layers", type=int, help="fewer layers for the whole model")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 32], help="batch sizes of the stack and of the model")
    parser.add_argument("--prompt", type=int, default=4096, help="model: tokens before the timed one")
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 16384], help="prefill: rows of the block")
    parser.add_argument("--tiling-seconds", type=float, default=40, help="for each number of rows")
    parser.add_argument("--model", type=Path, help="quality: folder of a LlamaForCausalLM over bytes")
    parser.add_argument("--text", type=Path, help="quality: file to hide the facts in; default: what the demo's model never saw")
    parser.add_argument("--length", type=int, default=8192, help="quality: bytes of a prompt")
    parser.add_argument("--needles", type=int, default=32, help="quality: facts of a prompt; half are asked for")
    parser.add_argument("--prompts", type=int, default=6)
    parser.add_argument("--shares", type=float, nargs="+", default=[0.05, 0.1, 0.15, 0.25, 0.35, 0.5], help="quality: shares to aim at")
    parser.add_argument("--out", type=Path, default=records.RESULTS / "ffn.jsonl")
    options = parser.parse_args(arguments)
    if "quality" in options.parts and options.model is None:
        parser.error("quality needs --model")
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    failed, shape = 0, SHAPES[options.shape]
    best: dict[int, Any] = {} if "tilings" in options.parts else recorded_tilings(options.out)
    rate: dict[str, float] = {}
    if set(options.parts) - {"quality"}:
        rate = bandwidth("cuda" if torch.cuda.is_available() else "cpu")
        print(", ".join(f"{name} {1e-12 * found:.2f} TB/s" for name, found in rate.items()), flush=True)
    tile = lambda rows: find_tiling(rows, shape, options.tiling_seconds, options.out)
    steps: dict[str, Callable[[], None]] = {
        "tilings": lambda: best.update({max(16, rows): tile(rows) for rows in (1, 32)}),
        "stack": lambda: run_stack(options, shape, rate, best),
        "model": lambda: ffn_model.run(options, shape, rate, lambda rows: use(best, rows, shape)),
        "prefill": lambda: prefill.run(options, shape, rate),
        "quality": lambda: run_answers(options),
    }
    for part, run in steps.items():
        if part not in options.parts:
            continue
        try:
            # a kernel that fails shall not be timed as the reference
            with backends.serving("triton" if torch.cuda.is_available() and part != "quality" else "auto"):
                run()
        except Exception:
            traceback.print_exc()
            failed += 1
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
