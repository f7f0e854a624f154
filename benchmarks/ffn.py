"""Feed-forward skipping at decode: milliseconds a token over the share of skipped blocks, and what skipping does to answers.

    python -m benchmarks.ffn                                     # tilings, stack, model
    python -m benchmarks.ffn --parts quality --model DIR --text FILE

tilings: the fastest tile sizes on this GPU. stack: the 32 blocks of Llama-3.1-8B's shape in one CUDA graph, against Inductor's; the rows'
counters change between replays. model: the whole model after a 4K prompt, likewise. quality: see ffn_quality.py. Appends to
results/ffn.jsonl; without the part `tilings`, the tile sizes are the best that this file has.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks import records
from benchmarks.ffn_quality import run as run_quality
from sparsify.api import collect_plans

HIDDEN, INTERMEDIATE, LAYERS = 4096, 14336, 32
SHARES = (0.0, 0.1, 0.25, 0.5, 1.0)
EPS = 1e-5
PROMPT = 4096


def graphed(function: Callable[[], Any]) -> torch.cuda.CUDAGraph:
    """The function in a CUDA graph, after warming up what compiles or allocates at first."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    graph.replay()
    torch.cuda.synchronize()
    return graph


def milliseconds(graph: torch.cuda.CUDAGraph, replays: int = 20) -> list[float]:
    times = []
    for _ in range(replays):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return times


def copy_bandwidth() -> float:
    """Bytes a second of a 2 GB copy, read and written."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / (1e-3 * min(milliseconds(graphed(lambda: target.copy_(source)))))


def block_weights(layers: int) -> list[dict[str, torch.Tensor]]:
    """Random weights of `layers` blocks, bf16; the timing does not depend on them."""
    draw = lambda *shape: torch.empty(*shape, device="cuda", dtype=torch.bfloat16).normal_(0, 0.02)
    return [
        {
            "up": draw(INTERMEDIATE, HIDDEN),
            "gate": draw(INTERMEDIATE, HIDDEN),
            "down": draw(HIDDEN, INTERMEDIATE),
            "norm_weight": draw(HIDDEN) + 1,
        }
        for _ in range(layers)
    ]


def plain(x: torch.Tensor, weights: list[dict[str, torch.Tensor]]) -> torch.Tensor:
    """The blocks as transformers writes them."""
    for w in weights:
        wide = x.to(torch.float32)
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)
        n = w["norm_weight"] * wide.to(x.dtype)
        linear = torch.nn.functional.linear
        x = x + linear(torch.nn.functional.silu(linear(n, w["gate"])) * linear(n, w["up"]), w["down"])
    return x


def ours(x: torch.Tensor, weights: list[dict[str, torch.Tensor]], flags: torch.Tensor) -> torch.Tensor:
    """The same through the kernels; flags int32 [layers, rows] are what each block reads as its rows' counters."""
    from sparsify import ffn_ops
    from sparsify.backends import triton_ffn

    fixed = {
        "layout": "split", "transposed": False, "activation": "silu", "norm": "rms", "eps": EPS, "post_norm": "none", "post_eps": 0.0,
        "scale": 1.0, "threshold": 2.0, "skip_next": 1, "version": ffn_ops.VERSION,
    }  # fmt: skip
    for w, remaining in zip(weights, flags, strict=True):
        x, _ = triton_ffn.ffn(x, x, remaining, w["up"], w["down"], gate=w["gate"], norm_weight=w["norm_weight"], **fixed)
    return x


def spread(share: float, layers: int) -> list[int]:
    """So many of the layers, evenly spread."""
    count = round(share * layers)
    return [int((i + 0.5) * layers / count) for i in range(count)]


# -- tilings -----------------------------------------------------------------------------------------------------------------------------


def candidates(rows: int) -> Iterator[Any]:
    """Tilings around the chosen one that differ in one kernel only."""
    from sparsify.backends.ffn_source import choose_tiling

    base = choose_tiling("bf16", 16 if rows <= 16 else 32, HIDDEN, INTERMEDIATE, True, 132)
    yield base
    for tile, step, stages in [(64, 64, 4), (64, 64, 6), (64, 128, 2), (32, 128, 4), (32, 256, 3), (16, 256, 4), (128, 64, 4), (32, 64, 6)]:
        yield dataclasses.replace(base, wide_tile=tile, wide_step=step, wide_stages=stages)
    for tile, step, stages, parts in [
        (64, 128, 4, 4),
        (64, 128, 3, 8),
        (64, 256, 3, 4),
        (32, 256, 4, 2),
        (32, 256, 4, 4),
        (16, 256, 5, 1),
        (16, 512, 3, 2),
    ]:
        yield dataclasses.replace(base, narrow_tile=tile, narrow_step=step, narrow_stages=stages, parts=parts)
    yield dataclasses.replace(base, warps=8)


def find_tiling(rows: int, seconds: float, out: Path) -> Any:
    """The fastest tiling for `rows`: best of the candidates for each kernel, combined if that is faster still. Stops after `seconds`."""
    from sparsify.backends import triton_ffn

    weights = block_weights(6)
    x = torch.randn(rows, 1, HIDDEN, device="cuda", dtype=torch.bfloat16)
    flags = torch.zeros(len(weights), rows, dtype=torch.int32, device="cuda")
    key = ("bf16", HIDDEN, INTERMEDIATE)
    began, found = time.monotonic(), {}

    def measure(tiling: Any) -> None:
        try:
            triton_ffn.tilings[key] = tiling
            ms = statistics.median(milliseconds(graphed(lambda: ours(x, weights, flags)))) / len(weights)
        except Exception as error:  # too much shared memory, for one
            print(f"  {tiling}: {type(error).__name__}: {str(error)[:100]}", flush=True)
            return
        found[tiling] = ms
        records.append(out, "ffn-tilings", rows=rows, tiling=dataclasses.asdict(tiling), ms_per_block=ms)
        print(f"  rows {rows}: {1e3 * ms:6.1f} us a block  {tiling}", flush=True)

    listed = list(candidates(rows))
    for tiling in listed:
        if time.monotonic() - began > seconds:
            break
        measure(tiling)
    base = listed[0]
    narrows = ("narrow_tile", "narrow_step", "narrow_stages", "parts")
    wides = ("wide_tile", "wide_step", "wide_stages")
    same = lambda one, names: one.warps == base.warps and all(getattr(one, n) == getattr(base, n) for n in names)
    wide = min((t for t in found if same(t, narrows)), key=found.get, default=base)
    narrow = min((t for t in found if same(t, wides)), key=found.get, default=base)
    measure(dataclasses.replace(wide, **{name: getattr(narrow, name) for name in narrows}))
    best = min(found, key=found.get)
    triton_ffn.tilings[key] = best
    print(f"best for {rows} rows: {1e3 * found[best]:.1f} us a block: {best}", flush=True)
    return best


def recorded_tilings(out: Path) -> dict[int, Any]:
    """The fastest tiling on record, by rows of a tile."""
    from sparsify.backends.ffn_source import FfnTiling

    best: dict[int, tuple[float, Any]] = {}
    for record in records.read([out]) if out.exists() else ():
        if record["benchmark"] == "ffn-tilings":
            rows = 16 if record["rows"] <= 16 else 32
            found = (record["ms_per_block"], FfnTiling(**record["tiling"]))
            best[rows] = min(best.get(rows, found), found, key=lambda pair: pair[0])
    return {rows: tiling for rows, (_, tiling) in best.items()}


# -- stack and model ---------------------------------------------------------------------------------------------------------------------


def run_stack(options: argparse.Namespace, best: dict[int, Any], bandwidth: float) -> None:
    weights = block_weights(LAYERS)
    size = sum(t.numel() * t.element_size() for w in weights for t in w.values())
    compiled = torch.compile(plain, fullgraph=True, dynamic=False)
    for rows in (1, 8, 32):
        use(best, rows)
        x = torch.randn(rows, 1, HIDDEN, device="cuda", dtype=torch.bfloat16)
        with torch.no_grad():
            torch._dynamo.reset()
            times = milliseconds(graphed(lambda x=x: compiled(x, weights)))
            note(
                options,
                "ffn-stack",
                variant="inductor",
                rows=rows,
                share=0.0,
                pattern="all rows",
                times=times,
                bytes=size,
                bandwidth=bandwidth,
            )
            flags = torch.zeros(LAYERS, rows, dtype=torch.int32, device="cuda")
            graph = graphed(lambda x=x, flags=flags: ours(x, weights, flags))
            want = plain(x, weights[:4]).float()
            error = (ours(x, weights[:4], flags[:4]).float() - want).abs().max().item() / want.abs().max().item()
            for share in SHARES:
                flags.zero_()
                flags[spread(share, LAYERS)] = 1
                note(options, "ffn-stack", variant="sparsify", rows=rows, share=share, pattern="all rows", times=milliseconds(graph),
                     bytes=size, bandwidth=bandwidth, error=error)  # fmt: skip
            for share in SHARES[1:4] if rows > 1 else ():
                generator = torch.Generator(device="cuda").manual_seed(0)
                flags.copy_(torch.rand(flags.shape, device="cuda", generator=generator) < share)
                saved = (flags.sum(1) == rows).float().mean().item()
                note(options, "ffn-stack", variant="sparsify", rows=rows, share=share, pattern="each row by itself",
                     times=milliseconds(graph), bytes=size, bandwidth=bandwidth, blocks_without_rows=saved)  # fmt: skip
        del graph


def use(best: dict[int, Any], rows: int) -> None:
    from sparsify.backends import triton_ffn

    key = ("bf16", HIDDEN, INTERMEDIATE)
    tiling = best.get(16 if rows <= 16 else 32)
    triton_ffn.tilings.pop(key, None)
    if tiling is not None:
        triton_ffn.tilings[key] = tiling


@torch.no_grad()
def run_model(options: argparse.Namespace, best: dict[int, Any], bandwidth: float) -> None:
    """Decode steps of the whole model. The counters that a forward starts with are set from outside, between replays of one graph."""
    from transformers import StaticCache

    from benchmarks.prefill import build
    from sparsify.backends import triton_ffn

    use(best, 1)
    model = build("8b", options.layers, "cuda")
    layers = model.config.num_hidden_layers
    forced = torch.zeros(1, dtype=torch.int32, device="cuda")
    start = triton_ffn.ffn_start
    triton_ffn.ffn_start = lambda like, *arguments, **call: forced.clone()
    ffn = {"cold_first": 0, "cold_last": 0, "warmup": 0, "threshold": 2.0}
    variants = {
        "inductor": {"backend": "inductor"},
        "sparsify": {"backend": "sparsify", "options": {"passes": ["ffn_skip"], "ffn_skip": ffn, "min_length": 0, "strict": True}},
    }
    token = torch.full((1, 1), 5, device="cuda")
    try:
        for name, arguments in variants.items():
            torch._dynamo.reset()
            cache = StaticCache(config=model.config, max_cache_len=PROMPT + 1024)
            ids = torch.randint(0, model.config.vocab_size, (1, PROMPT), device="cuda")
            model._compiled_call_impl = None
            model(ids, past_key_values=cache, logits_to_keep=1)
            model.compile(**arguments, dynamic=False)
            position = torch.full((1, 1), PROMPT, device="cuda")
            began = time.monotonic()
            step = lambda cache=cache, position=position: model(token, past_key_values=cache, position_ids=position).logits
            with collect_plans() as plans:
                graph = graphed(step)
            rewritten = sum(len(plan.rewritten) for plan in plans)
            if name == "sparsify" and rewritten != layers:
                raise RuntimeError(f"{rewritten} of {layers} blocks were rewritten:\n" + "\n".join(map(str, plans)))
            print(f"  {name}: compiled and recorded in {time.monotonic() - began:.0f} s", flush=True)
            for share in SHARES[:4] if name == "sparsify" else (0.0,):
                # a counter of n skips the first n blocks
                forced.fill_(round(share * layers))
                note(options, "ffn-model", variant=name, rows=1, share=share, pattern="first blocks", layers=layers, prompt=PROMPT,
                     times=milliseconds(graph), bytes=layers * 3 * HIDDEN * INTERMEDIATE * 2, bandwidth=bandwidth)  # fmt: skip
            del graph, cache, step
            gc.collect()
            torch.cuda.empty_cache()
    finally:
        triton_ffn.ffn_start = start


def note(options: argparse.Namespace, benchmark: str, *, times: list[float], **values: Any) -> None:
    ms = statistics.median(times)
    records.append(options.out, benchmark, ms=ms, times_ms=times, **values)
    shown = {k: v for k, v in values.items() if k not in ("bytes", "bandwidth")}
    streamed = values["bytes"] * (1 - values["share"]) / values["bandwidth"] * 1e3
    print(f"{benchmark} {shown}: {ms:.3f} ms (min {min(times):.3f}); blocks' bytes at copy bandwidth {streamed:.3f} ms", flush=True)


def run_answers(options: argparse.Namespace) -> None:
    from transformers import LlamaForCausalLM

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = LlamaForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval().to(device)
    facts = {
        "model": options.model.name,
        "model_sha256": records.sha256(options.model),
        "text_sha256": records.sha256(options.text),
        "length": options.length,
    }

    def report(found: dict[str, Any]) -> None:
        records.append(options.out, "ffn-quality", **facts, **found)
        where = {k: v for k, v in found.items() if v not in (None, []) and k in ("threshold", "skip", "probability", "layers")}
        print(
            f"{found['policy']:10s} share {found['share']:.3f}  nll {found['nll']:.4f}  {found['right']}/{found['asked']}  {where}",
            flush=True,
        )

    run_quality(model, options.length, options.text.read_bytes(), options.prompts, [0.05, 0.1, 0.15, 0.25, 0.35, 0.5], report)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parts = ["tilings", "stack", "model", "quality"]
    parser.add_argument("--parts", nargs="+", choices=parts, default=parts[:3])
    parser.add_argument("--layers", type=int, help="fewer layers for the whole model")
    parser.add_argument("--tiling-seconds", type=float, default=40, help="for each number of rows")
    parser.add_argument("--model", type=Path, help="quality: folder of a LlamaForCausalLM over bytes")
    parser.add_argument("--text", type=Path, help="quality: file to hide the facts in")
    parser.add_argument("--length", type=int, default=8192, help="quality: bytes of a prompt")
    parser.add_argument("--prompts", type=int, default=6)
    parser.add_argument("--out", type=Path, default=records.RESULTS / "ffn.jsonl")
    options = parser.parse_args(arguments)
    if "quality" in options.parts and (options.model is None or options.text is None):
        parser.error("quality needs --model and --text")
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    failed = 0
    best: dict[int, Any] = {} if "tilings" in options.parts else recorded_tilings(options.out)
    bandwidth = 0.0
    if set(options.parts) - {"quality"}:
        import sparsify.backends  # noqa: F401  registers the ops

        bandwidth = copy_bandwidth()
        print(f"copy: {bandwidth / 1e12:.2f} TB/s", flush=True)
    steps: dict[str, Callable[[], None]] = {
        "tilings": lambda: best.update({max(16, rows): find_tiling(rows, options.tiling_seconds, options.out) for rows in (1, 32)}),
        "stack": lambda: run_stack(options, best, bandwidth),
        "model": lambda: run_model(options, best, bandwidth),
        "quality": lambda: run_answers(options),
    }  # fmt: skip
    for part, run in steps.items():
        if part not in options.parts:
            continue
        try:
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
