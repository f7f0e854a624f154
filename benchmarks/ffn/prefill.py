"""One feed-forward block over a prompt's rows, by the share of rows that skip it, beside Inductor's dense block; in rounds, taking turns.

Rows that skip are random. `efficiency` of a record: dense milliseconds times the share that is computed, over sparsify's; the cost's
constant COMPACTED (sparsify/costs/compaction.py) is what it is with nothing skipped, without the pass over the activations that only the
dense block makes.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
from typing import Any

import torch

from benchmarks.ffn import FfnPrefill, FfnPrefillTilings
from benchmarks.ffn.timing import Shape, block_weights, ours, plain
from benchmarks.lib import records
from sparsify.commands.bench.clock import Clock

SHARES = (0.0, 0.1, 0.25, 0.5)
_ROUNDS = 3
_REPLAYS = 5


def candidates() -> dict[str, dict[str, Any]]:
    """Changes of the chosen tiling."""
    return {
        "chosen": {},
        "flatten": {"flatten": True},
        "4 stages": {"up_stages": 4, "down_stages": 4},
        "4 stages, flatten": {"up_stages": 4, "down_stages": 4, "flatten": True},
        "narrow 128, flatten": {"down_tile": 128, "flatten": True},
    }


def counters(rows: int, share: float, device: str) -> torch.Tensor:
    """int32 [1, rows]: 1 for exactly `share` of the rows, at random places."""
    flags = torch.zeros(1, rows, dtype=torch.int32, device=device)
    flags[0, torch.randperm(rows, generator=torch.Generator().manual_seed(0))[: round(share * rows)].to(device)] = 1
    return flags


def find_tiling(options: argparse.Namespace, x: torch.Tensor, weights: list[dict[str, torch.Tensor]]) -> None:
    """Leaves the fastest candidate in force; one record each."""
    from sparsify.backends.ffn import many_rows
    from sparsify.backends.ffn.source import choose_rows_tiling

    clock = Clock("cuda")
    flags, found = counters(x.shape[1], 0.0, "cuda"), {}
    for name, changes in candidates().items():
        tiling = dataclasses.replace(choose_rows_tiling("bf16", True), **changes)
        try:
            many_rows.tilings["bf16"] = tiling
            found[tiling] = statistics.median(clock.samples(clock.graph(lambda: ours(x, weights, flags)), _REPLAYS))
        except Exception as error:  # too much shared memory, for one
            print(f"  {name}: {type(error).__name__}: {str(error)[:100]}", flush=True)
            continue
        facts = {"rows": x.shape[1], "tiling": dataclasses.asdict(tiling), "name": name, "ms": found[tiling]}
        records.append(options.out, FfnPrefillTilings(**facts))
        print(f"  {name}: {found[tiling]:.3f} ms", flush=True)
    many_rows.tilings["bf16"] = min(found, key=found.get)


def largest_error(weights: list[dict[str, torch.Tensor]], x: torch.Tensor) -> float:
    """Relative, of some hundred computed rows, against the block in float32."""
    part = x[:, : min(300, x.shape[1])].contiguous()
    wide = [{name: w.float() for name, w in weights[0].items()}]
    want = plain(part.float(), wide)
    return ((ours(part, weights, counters(part.shape[1], 0.0, str(x.device))).float() - want).abs().max() / want.abs().max()).item()


@torch.no_grad()
def run(options: argparse.Namespace, shape: Shape, rate: dict[str, float]) -> None:
    """One record for every number of rows and share, and one for Inductor."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    clock, weights = Clock(device), block_weights(shape, device, 1)
    compiled = torch.compile(plain, fullgraph=True, dynamic=False)
    lengths = sorted(options.lengths)
    if device == "cuda":
        find_tiling(options, torch.randn(1, lengths[-1], shape.hidden, device=device, dtype=torch.bfloat16), weights)
    for rows in lengths:
        x = torch.randn(1, rows, shape.hidden, device=device, dtype=torch.bfloat16)
        error = largest_error(weights, x)
        flags = counters(rows, 0.0, device)
        torch._dynamo.reset()
        dense, graph = clock.graph(lambda x=x: compiled(x, weights)), clock.graph(lambda x=x, flags=flags: ours(x, weights, flags))
        times: dict[Any, list[float]] = {key: [] for key in ("inductor", *SHARES)}
        for _ in range(_ROUNDS):
            times["inductor"] += clock.samples(dense, _REPLAYS)
            for share in SHARES:
                flags.copy_(counters(rows, share, device))
                times[share] += clock.samples(graph, _REPLAYS)
        base = statistics.median(times["inductor"])
        for key, found in times.items():
            share, ms = key if key != "inductor" else 0.0, statistics.median(found)
            flops = 6 * rows * shape.hidden * shape.intermediate * (1 - share)
            values = {"variant": "inductor" if key == "inductor" else "sparsify", "rows": rows, "share": share, "ms": ms}
            values |= {"tflops": 1e-9 * flops / ms, "over_dense": ms / base, "efficiency": base * (1 - share) / ms}
            facts = {"times_ms": found, "shape": dataclasses.asdict(shape), "bandwidths": rate}
            facts |= {"error": error} if key != "inductor" else {}
            records.append(options.out, FfnPrefill(**values, **facts))
            print("ffn-prefill", {k: round(v, 3) if isinstance(v, float) else v for k, v in values.items()}, flush=True)
