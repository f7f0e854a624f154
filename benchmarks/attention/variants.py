"""What a kernel's speed could be changed by, each lever against the others: sections `lever_check`, `levers` and `estimate` of `kernels`.

`lever_check` compiles every variant and compares it with the reference on small calls, poisoned and run twice; what fails there is not
timed. `levers` times the attention variants, `estimate` those of block scoring, in interleaved rounds within one process.
"""

from __future__ import annotations

import ctypes
import functools
import math
import os
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from benchmarks.sanitizer import attention_cases
from benchmarks.whole_op.data import structured
from sparsify.backends import sparse_attention
from sparsify.backends.attention import hopper
from sparsify.backends.attention.hopper_source import GluonTuning
from sparsify.backends.select import call as select_inputs
from sparsify.backends.select import reference, triton
from sparsify.backends.select.source import INT8_TILING, TMA_TILING, Tiling
from sparsify.ops import attention as ops
from sparsify.ops import block_lists as blockmask
from sparsify.ops import scratch

SKIP = "SPARSIFY_LEVERS_SKIP"  # variants that failed their check, by comma
ROUNDS = 4
_WARM_MS, _SAMPLE_MS = 120.0, 160.0  # at the power limit clocks fall within tens of milliseconds

_BEST = GluonTuning(output_in_query=True, value_stages=3, query_registers=True)
ATTENTION = {
    "best": _BEST,
    "no_delay": replace(_BEST, value_delay=0),
    "k3": replace(_BEST, value_stages=2, key_stages=3),
    "query_in_memory": replace(_BEST, query_registers=False),
    "own_output": GluonTuning(query_registers=True),
}
_K4 = GluonTuning(key_stages=4, value_stages=4, query_registers=True)
ATTENTION_64 = {
    "k4v4": _K4,
    "query_in_memory": replace(_K4, query_registers=False),
    "k3v3": replace(_K4, key_stages=3, value_stages=3),
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
    "dense_64k": (65536, None, 128),
    "dense_8k": (8192, None, 128),
    "dense_32k_dim_64": (32768, None, 64),
    "sparse_64k_.05_dim_64": (65536, 0.05, 64),
}


def cases(section: str) -> dict[str, Callable[[], dict[str, Any]]]:
    """Cases by name, as `kernel_timing.workloads`."""
    if section == "lever_check":
        attention = {f"attention {name}": lambda one=one: _check_attention(one) for name, one in ATTENTION.items()}
        attention |= {f"attention {name}": lambda one=one: _check_attention(one, 64) for name, one in ATTENTION_64.items()}
        return attention | {f"score {name}": lambda one=one: _check_score(one) for name, one in SCORE.items()}
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


def _kept(variants: dict[str, Any], kind: str) -> dict[str, Any]:
    skipped = os.environ.get(SKIP, "").split(",")
    return {name: one for name, one in variants.items() if f"{kind} {name}" not in skipped}


def _check_attention(tuning: GluonTuning, dim: int = 128) -> dict[str, Any]:
    calls = {
        "lists": attention_cases.Call(heads=32, kv_heads=8, query_len=3000, key_len=3000, density=0.2, tuning=tuning),
        "dense": attention_cases.Call(heads=32, kv_heads=8, query_len=2000, key_len=2000, tuning=tuning),
        "empty": attention_cases.Call(heads=8, kv_heads=2, query_len=1000, key_len=1000, density=0.03, tuning=tuning),
    }
    found = {name: attention_cases.check(replace(call, head_dim=dim)) for name, call in calls.items()}
    problems = [f"{name}: {values['problems']}" for name, values in found.items() if not values.get("ok")]
    return {"served": True, "ok": not problems, "problems": "; ".join(problems), "error": max(v.get("error", 0.0) for v in found.values())}


def _score_call(stride: int, pool: str, threshold: float) -> dict[str, Any]:
    call = {"scale": 128**-0.5, "causal": True, "windows": [], "pool": pool, "stride": stride, "block_size": 128}
    return call | {"threshold": [threshold], "density": 0.0, "version": 1}


def _check_score(tiling: Tiling) -> dict[str, Any]:
    problems, largest = [], 0.0
    for length, heads in ((8192, 8), (5000, 4)):
        query, key, _ = structured(length, heads=heads, kv_heads=heads // 4)
        options = _score_call(16, "max", 0.9)
        one = select_inputs.describe(query, key, **options)
        own = triton.importance(query, key, tiling=tiling, **options)
        largest = max(largest, float((own - reference.importance(one)).abs().max()))
        lists = [triton.select_blocks(query, key, tiling=tiling, **options) for _ in range(2)]
        kept = [blockmask.to_dense(*pair, one.key_blocks) for pair in lists]
        wanted = reference.choose(own, *reference.candidates(one), one.threshold, one.density)
        problems += ["two runs differ"] * (not torch.equal(*kept)) + ["other blocks than its importances ask for"] * (
            not (kept[0] ^ wanted).float().mean() < 1e-4  # sums are rounded in another order
        )
    problems += [f"importance off by {largest:.1e}"] * (not largest < 2e-3)
    return {"served": True, "ok": not problems, "problems": "; ".join(problems), "error": largest}


def _milliseconds(runs: dict[str, Callable[[], Any]]) -> dict[str, dict[str, float]]:
    """Of each run under its own sustained load: milliseconds, and the clock and power meanwhile. Rounds in random orders."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in runs}
    draw = random.Random(0)
    for _ in range(ROUNDS):
        for name in draw.sample(list(runs), len(runs)):
            found[name].append(_sustained(runs[name]))
    return {name: {key: statistics.median(one[key] for one in rounds) for key in rounds[0]} for name, rounds in found.items()}


def _sustained(run: Callable[[], Any]) -> dict[str, float]:
    begin, middle, end = (torch.cuda.Event(enable_timing=True) for _ in range(3))
    begin.record()
    run()
    end.record()
    torch.cuda.synchronize()
    once = max(begin.elapsed_time(end), 1e-3)
    for _ in range(max(1, round(_WARM_MS / once))):
        run()
    middle.record()
    count = max(2, round(_SAMPLE_MS / once))
    for _ in range(count):
        run()
    end.record()
    clocks, watts = [], []
    while not end.query():
        if middle.query():
            clock, power = _gpu_state()
            clocks.append(clock)
            watts.append(power)
        time.sleep(0.003)
    state = {"mhz": statistics.mean(clocks), "watts": statistics.mean(watts)} if clocks else {"mhz": math.nan, "watts": math.nan}
    return {"ms": middle.elapsed_time(end) / count} | state


@functools.cache
def _nvml():
    library = ctypes.CDLL("libnvidia-ml.so.1")
    library.nvmlInit_v2()
    device = ctypes.c_void_p()
    # NVML counts all GPUs, whatever CUDA_VISIBLE_DEVICES leaves
    name = f"GPU-{torch.cuda.get_device_properties(torch.cuda.current_device()).uuid}".encode()
    if library.nvmlDeviceGetHandleByUUID(name, ctypes.byref(device)):
        raise OSError("NVML does not know this GPU")
    return library, device


def _gpu_state() -> tuple[float, float]:
    """The multiprocessors' clock in MHz and the board's power in watts; NaN where NVML cannot say."""
    try:
        library, device = _nvml()
        clock, power = ctypes.c_uint(), ctypes.c_uint()
        failed = library.nvmlDeviceGetClockInfo(device, 1, ctypes.byref(clock)) or library.nvmlDeviceGetPowerUsage(
            device, ctypes.byref(power)
        )
    except (OSError, AttributeError):
        return math.nan, math.nan
    return (math.nan, math.nan) if failed else (float(clock.value), power.value / 1000)


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
        lists, flops = attention_cases.block_lists(keep), 4 * 128 * 128 * dim * int(keep.sum())
        del keep
    call = timing.options(query, lists)
    variants = _kept(ATTENTION if dim == 128 else ATTENTION_64, "attention")
    runs = {name: lambda one=one: hopper.launch(query, key, value, tuning=one, **call)[0] for name, one in variants.items()}
    expected, differences, absent = None, {}, {}
    for name, run in list(runs.items()):
        try:
            output = run()
            expected = output if expected is None else expected
            differences[name] = float((output - expected).abs().max())
        except Exception as error:
            absent[f"{name}_absent"] = f"{type(error).__name__}: {str(error)[:160]}"
            del runs[name]
    return _table(_milliseconds(runs), flops, differences) | absent


def _estimate(length: int, stride: int, pool: str) -> dict[str, Any]:
    """Scoring and choosing together, then each kernel's own time."""
    query, key, _ = structured(length)
    options = _score_call(stride, pool, 0.9)
    kept: dict[str, float] = {}
    runs, absent = {}, {}
    for name, tiling in _kept(SCORE, "score").items():
        runs[name] = lambda tiling=tiling: triton.select_blocks(query, key, tiling=tiling, **options)
        try:
            kept[name] = runs[name]()[0].sum().item()
        except Exception as error:
            absent[f"{name}_absent"] = f"{type(error).__name__}: {str(error)[:160]}"
            del runs[name]
    first = next(iter(kept.values()))
    differences = {name: abs(count / first - 1) for name, count in kept.items()}
    values = _table(_milliseconds(runs), length * length * 128 * 32 / stride, differences)
    for name, run in runs.items():
        values |= {f"{name} {kernel}": milliseconds for kernel, milliseconds in _apart(run).items()}
    return values | absent


def _memory() -> dict[str, Any]:
    """Bytes that the whole call takes beside its output at a million tokens, beside the formula; and whether parts change bits."""
    options = {"scale": 128**-0.5, "causal": True, "windows": [], "stride": 16, "block_size": 128, "threshold": [0.5], "density": 0.0}
    options |= {"seq_major": False, "version": ops.VERSION, "key_flags": None, "segments": None, "query_start": None}
    values: dict[str, Any] = {}
    inputs = structured(32768)
    for pool in ("max", "max+group+int8"):
        whole = sparse_attention.sparse_attention(*inputs, pool=pool, **options)
        parts = sparse_attention.sparse_attention(*inputs, pool=pool, limit=1 << 22, **options)
        values[f"same_bits {pool}"] = all(torch.equal(one, other) for one, other in zip(whole, parts))
        del whole, parts
    inputs = structured(1 << 20)
    for pool in ("max", "max+half", "max+int8", "max+pair+int8", "max+group"):
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        found = sparse_attention.sparse_attention(*inputs, pool=pool, **options)
        end.record()
        torch.cuda.synchronize()
        taken = torch.cuda.max_memory_allocated() - before - sum(one.nbytes for one in found)
        foretold = scratch.scratch_bytes(1, 32, 8, 1 << 20, 1 << 20, 128, stride=16, block=128, variants=tuple(pool.split("+")[1:]))
        values[f"1m {pool}"] = f"{taken / 1e9:.2f} GB, foretold {foretold / 1e9:.2f}, {begin.elapsed_time(end):.0f} ms"
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
