"""Timing of the attention kernels beside FlashAttention-4, cuDNN, FlashAttention-2 and FlexAttention; `attention.run` runs it."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.lib import peers
from benchmarks.lib.models import HEADS, KV_HEADS
from sparsify.backends.attention import hopper
from sparsify.commands.bench.clock import Clock, reason
from sparsify.ops.attention import AttentionCall
from sparsify.ops.block_lists import from_dense

BLOCK = peers.BLOCK
ROUNDS, SAMPLE_MS, MOST = 2, 150.0, 1000
_CLOCK = Clock("cuda")


def workloads(section: str) -> dict[str, Callable[[], dict[str, Any]]]:
    """Cases of a section by name; each returns TFLOP/s and milliseconds of everything it timed."""
    sparse, dense = (lambda n, *more: functools.partial(_sparse, n, *more)), (lambda n, *more: functools.partial(_dense, n, *more))
    if section == "table":
        return {
            "sparse_128k_.05": sparse(131072, 0.05),
            "sparse_64k_.02": sparse(65536, 0.02),
            "sparse_64k_.05": sparse(65536, 0.05),
            "sparse_128k_.5": sparse(131072, 0.5),
            "dense_64k": dense(65536),
            "dense_128k": dense(131072),
            "sink_window_128k": _sink_window,
            "chunk_4k_of_128k": _chunk,
        }
    if section == "dims":
        return {
            "dense_32k_dim_64": dense(32768, 64),
            "sparse_64k_.05_dim_64": sparse(65536, 0.05, 64),
            "dense_16k_dim_96": dense(16384, 96),
            "dense_16k_dim_192": dense(16384, 192),
            "dense_16k_dim_256": dense(16384, 256),
            "dense_32k_fp16": dense(32768, 128, torch.float16),
        }
    return {f"dense_{n // 1024}k": functools.partial(_short, n) for n in (2048, 4096, 8192, 16384)}


def line(section: str, values: dict[str, Any]) -> str:
    """One result as one short line."""
    words = [f"{section}/{values['case']}"]
    for key, value in values.items():
        if key not in ("case", "seconds", "served") and value not in ("", None):
            words.append(f"{key}={value:.3g}" if isinstance(value, float) else f"{key}={value}")
    return " ".join(words)


def summary(results: list[dict[str, Any]]) -> str:
    """The last lines: what failed."""
    failed = [result for result in results if isinstance(result.get("error"), str)]
    lines = [f"== FAILED {line(result['section'], {key: value for key, value in result.items() if key != 'section'})}" for result in failed]
    return "\n".join([f"== {len(failed)} of {len(results)} cases failed", *lines])


def inputs(n: int, dim: int = 128, dtype: torch.dtype = torch.bfloat16, query_len: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator(device="cuda").manual_seed(0)
    shapes = ((HEADS, query_len or n), (KV_HEADS, n), (KV_HEADS, n))
    return tuple(torch.randn(1, heads, length, dim, device="cuda", dtype=dtype, generator=generator) for heads, length in shapes)


def random_blocks(n: int, density: float) -> Tensor:
    """[1, heads, blocks, blocks] bool, causal: first block and diagonal always, the others at random."""
    blocks = n // BLOCK
    generator = torch.Generator(device="cuda").manual_seed(1)
    keep = torch.rand(1, HEADS, blocks, blocks, device="cuda", generator=generator) < density
    keep |= torch.eye(blocks, dtype=torch.bool, device="cuda")
    keep[..., 0] = True
    return keep.tril_()


def make_call(
    operands: tuple[Tensor, Tensor, Tensor], lists: tuple[Tensor, Tensor] | None = None, windows: tuple[int, ...] = (), sinks: int = 0
) -> AttentionCall:
    counts, indices = lists or (None, None)
    scale = operands[0].shape[-1] ** -0.5
    return AttentionCall(*operands, block_counts=counts, block_indices=indices, scale=scale, causal=True, windows=windows, sinks=sinks)


def race(runs: dict[str, Callable[[], Any]], flops: float, reference: str | None = None) -> dict[str, Any]:
    """Milliseconds and TFLOP/s of each runner over interleaved rounds; largest difference of outputs from `reference`'s."""
    values: dict[str, Any] = {}
    ran: dict[str, Callable[[], Any]] = {}
    expected = None
    for name in sorted(runs, key=lambda name: name != reference):
        try:
            output = runs[name]()
            _CLOCK.wait()
            ran[name] = runs[name]
            if name == reference:
                expected = output.float()
            elif expected is not None and isinstance(output, Tensor) and output.shape == expected.shape:
                values[f"{name}_difference"] = float((output.float() - expected).abs().max())
            del output
        except Exception as error:
            values[f"{name}_absent"] = reason(error)
    del expected
    times, absent = _CLOCK.turns(ran, ROUNDS, SAMPLE_MS, MOST)
    for name, found in times.items():
        milliseconds = statistics.median(found)
        size = max(1, len(found) // ROUNDS)
        rounds = [statistics.median(found[i : i + size]) for i in range(0, len(found), size)]
        values |= {f"{name}_ms": round(milliseconds, 4), f"{name}_tflops": round(flops / milliseconds / 1e9)}
        values[f"{name}_rounds"] = [round(value, 4) for value in rounds]
    return values | {f"{name}_absent": why for name, why in absent.items()}


def _with_ratio(values: dict[str, Any], rivals: tuple[str, ...]) -> dict[str, Any]:
    """`ratio`: the fastest peer's time over ours."""
    times = [values[f"{peer}_ms"] for peer in rivals if f"{peer}_ms" in values]
    if times and "ours_ms" in values:
        values["ratio"] = round(min(times) / values["ours_ms"], 3)
    if "fa4_ms" in values and "ours_ms" in values:
        values["ratio_fa4"] = round(values["fa4_ms"] / values["ours_ms"], 3)
    return values


def _sparse(n: int, density: float, dim: int = 128) -> dict[str, Any]:
    query, key, value = inputs(n, dim)
    keep = random_blocks(n, density)
    visited = int(keep.sum())
    call = make_call((query, key, value), from_dense(keep))
    runs = {"ours": lambda: hopper.launch(call)[0]}
    runs |= peers.block_sparse(query, key, value, keep)
    values = race(runs, 4 * BLOCK * BLOCK * dim * visited, "flex" if density < 0.4 else None)
    blocks = n // BLOCK
    return {"density": round(visited / (HEADS * blocks * (blocks + 1) / 2), 4)} | _with_ratio(values, ("fa4", "flex"))


def _dense(n: int, dim: int = 128, dtype: torch.dtype = torch.bfloat16) -> dict[str, Any]:
    query, key, value = inputs(n, dim, dtype)
    call = make_call((query, key, value))
    runs = {"ours": lambda: hopper.launch(call)[0]} | _rivals(query, key, value)
    if n <= 16384 and dim != 128:
        keep = torch.ones(1, HEADS, n // BLOCK, n // BLOCK, dtype=torch.bool, device="cuda").tril_()
        runs["flex"] = peers.block_sparse(query, key, value, keep)["flex"]
    return _with_ratio(race(runs, 4 * n * n * dim * HEADS / 2, "cudnn"), ("fa4", "cudnn", "flex"))


def _short(n: int) -> dict[str, Any]:
    """Dense attention called from Python, and replayed from CUDA graphs, where no call waits for the host; `ratio` is the replays'."""
    query, key, value = inputs(n)
    call = make_call((query, key, value))
    runs = {"ours": lambda: hopper.launch(call)[0]} | _rivals(query, key, value)
    flops = 4 * n * n * 128 * HEADS / 2
    called = race(runs, flops, "cudnn")
    graphs, absent = {}, {}
    for name, run in runs.items():
        try:
            graphs[name] = _CLOCK.graph(run)
        except Exception as error:
            absent[f"{name}_graph_absent"] = reason(error)
    replayed = _with_ratio(race(graphs, flops), ("fa4", "cudnn"))
    return replayed | {f"{name}_called": value for name, value in called.items() if name.endswith("_ms")} | absent


def _rivals(query: Tensor, key: Tensor, value: Tensor) -> dict[str, Callable[[], Tensor]]:
    """The two fastest dense kernels of others on Hopper."""
    return {name: run for name, run in peers.dense(query, key, value).items() if name in ("fa4", "cudnn")}


def _sink_window() -> dict[str, Any]:
    n, window, sinks = 131072, 4096, 4
    query, key, value = inputs(n)
    call = make_call((query, key, value), windows=(window,), sinks=sinks)
    runs = {"ours": lambda: hopper.launch(call)[0]} | _rivals(query, key, value)
    values = _with_ratio(race(runs, 4 * n * n * 128 * HEADS / 2), ("fa4", "cudnn"))
    pairs = window * n - window * (window - 1) // 2 + sinks * max(0, n - window)
    visited = 4 * 128 * HEADS * pairs
    return values | {"ours_tflops": round(visited / values["ours_ms"] / 1e9) if "ours_ms" in values else None}


def _chunk() -> dict[str, Any]:
    n, rows = 131072, 4096
    query, key, value = inputs(n, query_len=rows)
    call = make_call((query, key, value))
    runs = {"ours": lambda: hopper.launch(call)[0], "fa4": peers.dense(query, key, value)["fa4"]}
    return _with_ratio(race(runs, 4 * 128 * HEADS * (rows * (n - rows) + rows * rows / 2)), ("fa4",))
