"""What a kernel's speed could be changed by, each variant against the others: sections `tune` (attention) and `estimate` (block scoring).

Rounds in random orders within one process, each call under its own load; variants whose outputs differ from the first one's are named.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from sparsify.backends import sparse_attention
from sparsify.backends.attention import hopper
from sparsify.backends.attention.hopper_source import GluonTuning
from sparsify.backends.select import triton
from sparsify.backends.select.source import INT8_TILING, TMA_TILING
from sparsify.commands.bench.clock import Clock, reason
from sparsify.commands.calibrate.structured import structured
from sparsify.ops import block_lists as blockmask
from sparsify.ops import scratch
from sparsify.ops.estimate import EXAMPLES, label, parse_label
from sparsify.ops.selection import SelectCall
from sparsify.ops.sparse_attention import SparseAttentionCall

ROUNDS = 4
_CLOCK = Clock("cuda")

TUNINGS = {
    "default": GluonTuning(),
    "no_delay": GluonTuning(value_delay=0),
    "k3": GluonTuning(output_in_query=True, key_stages=3),
    "v3": GluonTuning(output_in_query=True, value_stages=3),
    "q1_k3v3": GluonTuning(output_in_query=True, query_stages=1, key_stages=3, value_stages=3),
    "q1_k3": GluonTuning(query_stages=1, key_stages=3),
    "more_producer": GluonTuning(consumer_registers=232, producer_registers=40),
    "rows": GluonTuning(order="rows"),
    "query_registers": GluonTuning(output_in_query=True, value_stages=3, query_registers=True),
    "keys64": GluonTuning(key_tile=64, output_in_query=True, key_stages=5, value_stages=5),
}
TUNINGS_64 = {
    "default": GluonTuning(),
    "k4v4": GluonTuning(key_stages=4, value_stages=4),
    "k4v4_no_delay": GluonTuning(key_stages=4, value_stages=4, value_delay=0),
    "k4v4_query_registers": GluonTuning(key_stages=4, value_stages=4, query_registers=True),
    "k3v3_query_registers": GluonTuning(key_stages=3, value_stages=3, query_registers=True),
    "q3_k3v3": GluonTuning(query_stages=3, key_stages=3, value_stages=3),
}
SCORE = {
    "wide": TMA_TILING,
    "wide_band_32": replace(TMA_TILING, band=32),
    "two_band_16": replace(INT8_TILING, band=16),
    "two_band_32": INT8_TILING,
}
_WORKLOADS = {
    "sparse_128k_.05": (131072, 0.05, 128),
    "sparse_64k_.02": (65536, 0.02, 128),
    "sparse_64k_.05": (65536, 0.05, 128),
    "sparse_128k_.5": (131072, 0.5, 128),
    "dense_64k": (65536, None, 128),
    "dense_8k": (8192, None, 128),
    "dense_32k_dim_64": (32768, None, 64),
    "sparse_64k_.05_dim_64": (65536, 0.05, 64),
}


def cases(section: str) -> dict[str, Callable[[], dict[str, Any]]]:
    """Cases by name, as `timing.workloads`."""
    if section == "estimate":
        return {
            "matrix_product": _ceiling,
            "estimate_128k_stride_16": lambda: _estimate(131072, 16, "max"),
            "estimate_128k_int8": lambda: _estimate(131072, 16, "max+int8"),
            "estimate_128k_pair_int8": lambda: _estimate(131072, 16, "max+pair+int8"),
            "memory": _memory,
        }
    return {name: lambda shape=shape: _attention(*shape) for name, shape in _WORKLOADS.items()}


def line(section: str, values: dict[str, Any]) -> str:
    """A result as a table: one variant a row, fastest first."""
    rows = [f"== {section} {values['case']}"]
    for name, value in values.items():
        if name.endswith("_tflops"):
            variant = name.removesuffix("_tflops")
            more = " ".join(f"{values[f'{variant}_{key}']:>7} {key}" for key in ("mhz", "watts", "busy"))
            rows.append(f"{variant:>24} {value:8.1f} TFLOP/s {values[variant + '_ms']:9.3f} ms {more}")
        elif not name.endswith(("_ms", "_mhz", "_watts", "_busy")) and name not in ("case", "seconds"):
            rows.append(f"{name:>24} {value}")
    return "\n".join(rows)


def _milliseconds(runs: dict[str, Callable[[], Any]]) -> dict[str, dict[str, float]]:
    """Of each run under its own sustained load: milliseconds, and the clock and power meanwhile. Rounds in random orders."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in runs}
    draw = random.Random(0)
    for _ in range(ROUNDS):
        for name in draw.sample(list(runs), len(runs)):
            found[name].append(_CLOCK.under_load(runs[name]))
    return {name: {key: statistics.median(one[key] for one in rounds) for key in rounds[0]} for name, rounds in found.items()}


def _table(found: dict[str, dict[str, float]], flops: float, differences: dict[str, float]) -> dict[str, Any]:
    """`busy`: share of the cycles in which the tensor cores could not have done less: products over what the clock allows."""
    values: dict[str, Any] = {}
    processors = torch.cuda.get_device_properties(0).multi_processor_count
    for name, one in sorted(found.items(), key=lambda item: item[1]["ms"]):
        rate = flops / one["ms"] / 1e9
        values |= {f"{name}_ms": round(one["ms"], 4), f"{name}_mhz": round(one["mhz"], 1), f"{name}_watts": round(one["watts"], 1)}
        values |= {f"{name}_busy": round(rate * 1e12 / (processors * 4096 * one["mhz"] * 1e6), 3), f"{name}_tflops": round(rate, 1)}
    return values | {f"{name}_difference": value for name, value in differences.items() if not value < 0.02}


def _attention(length: int, density: float | None, dim: int) -> dict[str, Any]:
    from benchmarks.attention import timing

    query, key, value = timing.inputs(length, dim)
    flops, lists = 4 * length * length * dim * 32 / 2, None
    if density is not None:
        keep = timing.random_blocks(length, density)
        lists, flops = blockmask.from_dense(keep), 4 * 128 * 128 * dim * int(keep.sum())
        del keep
    call = timing.make_call((query, key, value), lists)
    variants = TUNINGS if dim == 128 else TUNINGS_64
    runs = {name: lambda one=one: hopper.launch(call, tuning=one)[0] for name, one in variants.items()}
    expected, differences, absent = None, {}, {}
    for name, run in list(runs.items()):
        try:
            output = run()
            expected = output if expected is None else expected
            differences[name] = float((output - expected).abs().max())
        except Exception as error:
            absent[f"{name}_absent"] = reason(error)
            del runs[name]
    return _table(_milliseconds(runs), flops, differences) | absent


def _estimate(length: int, stride: int, pool: str) -> dict[str, Any]:
    """Scoring and choosing together, then each kernel's own time."""
    query, key, _ = structured(length)
    call = SelectCall(query, key, scale=128**-0.5, causal=True, **parse_label(pool), stride=stride, threshold=(0.9,))
    kept: dict[str, float] = {}
    runs, absent = {}, {}
    for name, tiling in SCORE.items():
        runs[name] = lambda tiling=tiling: triton.select_blocks(call, tiling=tiling)
        try:
            kept[name] = runs[name]()[0].sum().item()
        except Exception as error:
            absent[f"{name}_absent"] = reason(error)
            del runs[name]
    first = next(iter(kept.values()))
    differences = {name: abs(count / first - 1) for name, count in kept.items()}
    values = _table(_milliseconds(runs), length * length * 128 * 32 / stride, differences)
    for name, run in runs.items():
        values |= {f"{name} {kernel}": milliseconds for kernel, milliseconds in _apart(run).items()}
    return values | absent


def _memory() -> dict[str, Any]:
    """Bytes that the whole call takes beside its output at a million tokens, beside the formula."""
    values: dict[str, Any] = {}
    inputs = structured(1 << 20)
    for estimate in EXAMPLES:
        call = SparseAttentionCall(*inputs, scale=128**-0.5, causal=True, estimate=estimate, stride=16, threshold=(0.5,))
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        spent, found = _CLOCK.once(lambda call=call: sparse_attention.sparse_attention(call))
        taken = torch.cuda.max_memory_allocated() - before - sum(one.nbytes for one in found)
        foretold = scratch.scratch_bytes(1, 32, 8, 1 << 20, 1 << 20, 128, stride=16, block=128, estimate=estimate)
        values[f"1m {label('max', estimate)}"] = f"{taken / 1e9:.2f} GB, foretold {foretold / 1e9:.2f}, {spent:.0f} ms"
        del found
    return values


def _ceiling() -> dict[str, Any]:
    """A large matrix product of the vendor's library, for the clock and the power that it gets."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return _table(_milliseconds({"8192^3": lambda: a @ b}), 2 * 8192**3, {})


def _apart(run: Callable[[], Any]) -> dict[str, float]:
    """Device milliseconds of each kernel of a call."""
    from torch.profiler import ProfilerActivity, profile

    for _ in range(12):  # under load
        run()
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        for _ in range(12):
            run()
        torch.cuda.synchronize()
    return {
        event.key[:24]: round(event.device_time_total / 12000, 4)
        for event in found.key_averages()
        if event.device_time_total / 12000 > 0.02
    }
