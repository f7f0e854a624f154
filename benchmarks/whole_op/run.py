"""Block-sparse attention as one call, estimate, selection and index building counted, beside dense causal attention in the same run.

    python -m benchmarks run whole_op --out benchmarks/results/whole_op.jsonl

Llama-3.1-8B's shape: 32 query heads, 8 KV heads, head dim 128, bf16, batch 1, on structured queries and keys for which the threshold, found
by bisection, gives the density asked for. Every sparse call is `sparsify::select_blocks` and `sparsify::attention`
together; its parts are timed too, but nothing is added up. Peers: FlashAttention-4 where it is installed, cuDNN and FlashAttention-2.
Times are medians over interleaved rounds, with the L2 cache flushed before each sample.

Kernels are compiled first, in processes of their own side by side; then one worker measures, and is killed when it takes too long.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import sparsify.backends
from benchmarks.lib import peers, precompile, records
from benchmarks.whole_op import WholeOp
from benchmarks.whole_op.data import find_threshold
from sparsify.commands.bench.clock import Clock, reason
from sparsify.commands.calibrate.structured import structured
from sparsify.ops import block_lists
from sparsify.ops.attention import AttentionCall
from sparsify.ops.estimate import parse_label
from sparsify.ops.selection import SelectCall

LENGTHS = (131072, 262144, 32768, 65536)  # what matters most first, should time run out
DENSITIES = (0.05, 0.07, 0.1, 0.2)
TARGET = {32768: 0.2, 65536: 0.1, 131072: 0.07, 262144: 0.05}  # density at which estimates are compared
ESTIMATES = (
    (16, "max+pair+int8"),
    (8, "max+pair+int8"),
    (16, "max+quad+int8"),
    (8, "max+quad+int8"),
    (16, "max+int8"),
    (8, "max+int8"),
    (16, "max+pair"),
    (16, "sum"),
    (16, "max+half"),
)
ESTIMATES += ((16, "max+group"), (16, "max+half+int8"), (8, "max"), (8, "sum"), (8, "max+pair"), (8, "max+half+int8"))
# rules and estimates at the densities that answers need of them (`benchmarks.answers`), in place of the others
ABLATION = ((8, "max+pair+int8"), (16, "row+pair+int8"), (8, "row+pair+int8"), (4, "row+pair+int8"))
ABLATION += ((8, "max+pair+int8+peak"), (8, "row+pair+int8+peak"), (4, "row+pair+int8+peak"), (4, "row+quad+int8+peak"))
ABLATION += ((8, "row+pair+int8+peak/4@0.95"),)
ABLATION_TARGETS = {32768: (0.05,), 131072: (0.04,), 262144: (0.03,)}
MAIN = (16, "max")
BLOCK = 128
ROUNDS = 3
SAMPLE_MS, MOST = 60.0, 8  # samples of a round go on for about so long, but are no more
MIB = 1 << 20


@dataclass(frozen=True)
class Cell:
    """A sparse call: `pool` names the op's pool and estimate (`sparsify.ops.estimate.label`); `target` is the density asked for."""

    stride: int
    pool: str
    target: float

    @property
    def name(self) -> str:
        return f"{self.pool}, stride {self.stride}, density {self.target:g}"


@dataclass(frozen=True)
class Tuned:
    """A cell with the threshold that was found for it."""

    cell: Cell
    threshold: float
    density: float


def cells(length: int, ablation: bool = False) -> list[Cell]:
    target = TARGET.get(length, 0.1)
    if ablation:
        return [Cell(*estimate, share) for estimate in ABLATION for share in ABLATION_TARGETS.get(length, (target,))]
    return [
        Cell(*MAIN, target),
        *(Cell(*estimate, target) for estimate in ESTIMATES),
        *(Cell(*MAIN, density) for density in DENSITIES if density != target),
    ]


def estimate_share(stride: int, pool: str, group: int) -> float:
    """The estimate's operations as a share of dense causal attention's, 8-bit ones counted half: what no kernel can save."""
    return float(parse_label(pool)["estimate"].share(group)) / (2 * stride)


def make_call(query: Tensor, key: Tensor, stride: int, pool: str, threshold: float) -> SelectCall:
    scale = query.shape[-1] ** -0.5
    return SelectCall(query, key, scale=scale, causal=True, **parse_label(pool), stride=stride, block_size=BLOCK, threshold=(threshold,))


def select(query: Tensor, key: Tensor, stride: int, pool: str, threshold: float) -> tuple[Tensor, Tensor]:
    return make_call(query, key, stride, pool, threshold).run()


def attend(query: Tensor, key: Tensor, value: Tensor, lists: tuple[Tensor, Tensor] | tuple[None, None]) -> tuple[Tensor, Tensor]:
    """Output and LSE, along block lists or, without them, dense."""
    listed = {"block_counts": lists[0], "block_indices": lists[1], "block_size": BLOCK}
    return AttentionCall(query, key, value, scale=query.shape[-1] ** -0.5, causal=True, **listed).run()


def whole(query: Tensor, key: Tensor, value: Tensor, tuned: Tuned) -> tuple[Tensor, Tensor]:
    """What a rewritten layer runs."""
    return attend(query, key, value, select(query, key, tuned.cell.stride, tuned.cell.pool, tuned.threshold))


def peak_bytes(run: Callable[[], Any]) -> int | None:
    """Device memory that a call needs beside its inputs and outputs."""
    if not torch.cuda.is_available():
        return None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    outputs = run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before - sum(tensor.nbytes for tensor in outputs)


def kept_mass(sparse: Tensor, dense: Tensor) -> float:
    """Mean share of a row's softmax mass that the visited blocks hold, from the two LSEs."""
    return float((sparse.double() - dense.double()).exp().clamp(max=1).mean())


def tune(query: Tensor, key: Tensor, cell: Cell) -> Tuned:
    length = query.shape[2]

    def density(threshold: float) -> float:
        counts, _ = select(query, key, cell.stride, cell.pool, threshold)
        return block_lists.density(counts, length, length, 0, BLOCK)[1]

    return Tuned(cell, *find_threshold(density, cell.target))


def measure(length: int, options: argparse.Namespace, keep: Callable[..., None]) -> None:
    """All calls at one length, interleaved; keeps one record for each peer and each cell."""
    operands = structured(length, heads=options.heads, kv_heads=options.kv_heads, dtype=options.dtype, device=options.device)
    query, key = operands[:2]
    clock = Clock(options.device)
    tuned: dict[str, Tuned] = {}
    failed: dict[str, str] = {}
    for cell in cells(length, options.ablation):
        try:
            tuned[cell.name] = tune(query, key, cell)
        except Exception as error:
            traceback.print_exc()
            failed[cell.name] = reason(error)
    runs = {**peers.dense(*operands), "ours, dense": lambda: attend(*operands, (None, None))}
    dense_names = list(runs)
    runs |= {name: lambda one=one: whole(*operands, one) for name, one in tuned.items()}
    times, absent = clock.turns(runs, ROUNDS, SAMPLE_MS, MOST)
    medians = {name: statistics.median(found) for name, found in times.items()}
    for name in dense_names:
        keep(kind="dense", length=length, name=name, ms=medians.get(name), samples=times.get(name), error=absent.get(name))
    rivals = {name: medians[name] for name in dense_names if name in medians and name != "ours, dense"}
    dense_lse = attend(*operands, (None, None))[1]
    for cell in cells(length, options.ablation):
        shape = dataclasses.asdict(cell)
        error = failed.get(cell.name) or absent.get(cell.name)
        if error:
            keep(kind="sparse", length=length, **shape, error=error)
            continue
        one = tuned[cell.name]
        lists = select(query, key, cell.stride, cell.pool, one.threshold)
        milliseconds = medians[cell.name]
        share = estimate_share(cell.stride, cell.pool, options.heads // options.kv_heads)
        keep(
            kind="sparse",
            length=length,
            **shape,
            threshold=one.threshold,
            density=one.density,
            ms=milliseconds,
            samples=times[cell.name],
            select_ms=statistics.median(
                clock.samples(lambda one=one: select(query, key, one.cell.stride, one.cell.pool, one.threshold), 5, flush=True)
            ),
            attend_ms=statistics.median(clock.samples(lambda lists=lists: attend(*operands, lists), 5, flush=True)),
            speedup=min(rivals.values()) / milliseconds if rivals else None,
            speedups={name: other / milliseconds for name, other in rivals.items()},
            estimate_share=share,
            bound=1 / (one.density + share),
            kept_mass=kept_mass(attend(*operands, lists)[1], dense_lse),
            scratch_bytes=peak_bytes(lambda one=one: whole(*operands, one)),
        )
    if clock.cuda and not options.ablation:
        keep(kind="chunks", length=length, stride=MAIN[0], pool=MAIN[1], select_ms=chunk_times(clock, query, key))


def chunk_times(clock: Clock, query: Tensor, key: Tensor) -> dict[str, float]:
    """Does it cost time to serve a few heads at a time? Selection alone by MiB of scratch allowed."""
    from sparsify.backends.select import triton

    call = make_call(query, key, *MAIN, 0.9)
    runs = {}
    for mib in (128, 256, 512, 1024, 4096):
        limits = triton.Limits(scratch_bytes=mib * MIB)
        runs[str(mib)] = lambda limits=limits: triton.select_blocks(call, limits=limits)
    return {name: statistics.median(found) for name, found in clock.turns(runs, ROUNDS, SAMPLE_MS, MOST)[0].items()}


def work(options: argparse.Namespace) -> None:
    """The worker: every length, one record after the other."""
    facts = {"heads": options.heads, "kv_heads": options.kv_heads, "head_dim": 128, "dtype": str(options.dtype).removeprefix("torch.")}

    def keep(**values: Any) -> None:
        record = records.append(options.out, WholeOp(**facts, **values))
        print(line(record), flush=True)

    with torch.no_grad():
        for length in options.lengths:
            try:
                measure(length, options, keep)
            except Exception as error:
                traceback.print_exc()
                keep(kind="failure", length=length, error=reason(error))
                if "CUDA error" in str(error):
                    return


def line(record: dict[str, Any]) -> str:
    """A record as one short line."""
    hidden = ("benchmark", "time", "machine", "samples", "heads", "kv_heads", "head_dim", "dtype", "speedups", "estimate_share")
    words = [f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={json.dumps(v)}" for k, v in record.items() if k not in hidden]
    return " ".join(words)


def compile_kernels(options: argparse.Namespace) -> None:
    """Compiles what `measure` needs into Triton's cache: one process per estimate, one for attention."""
    estimates = sorted({(cell.stride, cell.pool) for length in options.lengths for cell in cells(length, options.ablation)})
    jobs = ["attention", *(f"{stride} {pool}" for stride, pool in estimates)]
    base = [sys.executable, "-m", "benchmarks.whole_op.run", "--lengths", *map(str, options.lengths)]
    precompile.compile_side_by_side({job: [*base, "--warm", job] for job in jobs}, 100)


@torch.no_grad()
def warm(job: str, options: argparse.Namespace) -> None:
    """Runs one kind of kernel at each length, on few heads where the kernel does not depend on them."""
    heads, kv_heads = (options.heads, options.kv_heads) if job == "attention" else (options.heads // options.kv_heads, 1)
    for length in sorted(options.lengths):
        query = torch.zeros(1, heads, length, 128, dtype=options.dtype, device="cuda")
        key = torch.zeros(1, kv_heads, length, 128, dtype=options.dtype, device="cuda")
        if job != "attention":
            stride, pool = job.split()
            select(query, key, int(stride), pool, 0.5)
            continue
        counts, indices = make_call(query, key, *MAIN, 0.9).empty_lists()
        attend(query, key, key, (counts.fill_(1), indices.zero_()))
        attend(query, key, key, (None, None))
    torch.cuda.synchronize()


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=records.RESULTS / "whole_op.jsonl", help="append records here")
    parser.add_argument("--lengths", type=int, nargs="+", default=list(LENGTHS))
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=230, help="kill the worker after this long, compilation counted")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu: a smoke test on the reference")
    parser.add_argument("--ablation", action="store_true", help="rules and estimates at few densities, see ABLATION")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--warm", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    options.dtype = torch.bfloat16 if options.device == "cuda" else torch.float32
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    if options.warm or options.worker or options.device == "cpu":
        with sparsify.backends.serving("triton" if options.device == "cuda" else "reference", strict=True):
            warm(options.warm, options) if options.warm else work(options)
        return 0
    end = time.monotonic() + options.seconds
    compile_kernels(options)
    print(f"compiled, {end - time.monotonic():.0f} s left", flush=True)
    command = [sys.executable, "-m", "benchmarks.whole_op.run", "--worker", *(sys.argv[1:] if arguments is None else arguments)]
    try:
        return subprocess.run(command, timeout=max(30, end - time.monotonic())).returncode
    except subprocess.TimeoutExpired:
        print("out of time: the rest is left out", flush=True)
        return 1


if __name__ == "__main__":
    sys.exit(main())
