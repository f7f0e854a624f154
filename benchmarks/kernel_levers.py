"""What a kernel's speed could be changed by, each lever against the others: sections `lever_check`, `levers` and `estimate` of `kernels`.

`lever_check` compiles every variant and compares it with the reference on small calls, poisoned and run twice; what fails there is not
timed. `levers` times the attention variants, `estimate` those of block scoring, in interleaved rounds within one process.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from benchmarks import kernel_checks
from benchmarks.whole_op_data import structured
from sparsify import blockmask
from sparsify.backends import gluon_attention, reference_select, select_inputs, triton_select
from sparsify.backends.gluon_source import GluonTuning
from sparsify.backends.select_source import TMA_TILING, Tiling

SKIP = "SPARSIFY_LEVERS_SKIP"  # variants that failed their check, by comma
ROUNDS = 3
_SAMPLE_MS = 25.0

_V3 = GluonTuning(output_in_query=True, value_stages=3)
_WALK = GluonTuning(walker=True)
_ACROSS = replace(_WALK, across_tiles=True)
ATTENTION = {
    "default": GluonTuning(),
    "v3": _V3,
    "walker": _WALK,
    "walker4": replace(_WALK, walk_stages=4),
    "walker16": replace(_WALK, walk_stages=16),
    "walker_v3": replace(_V3, walker=True),
    "across": GluonTuning(across_tiles=True),
    "walker_across": _ACROSS,
    "walker_across_v3": replace(_V3, walker=True, across_tiles=True),
    "rotate_snake_v3": replace(_V3, rotate=True, order="snake"),
    "snake_v3": replace(_V3, order="snake"),
    "walker_rotate": replace(_WALK, rotate=True),
    "walker_rotate_snake": replace(_WALK, rotate=True, order="snake"),
    "walker_rotate_snake_v3": replace(_V3, walker=True, rotate=True, order="snake"),
    "all": replace(_ACROSS, rotate=True, order="snake"),
    "all_v3": replace(_V3, walker=True, across_tiles=True, rotate=True, order="snake"),
    "all_v3_232": replace(_V3, walker=True, across_tiles=True, rotate=True, order="snake", consumer_registers=232, producer_registers=40),
    "all_k3": GluonTuning(walker=True, across_tiles=True, rotate=True, order="snake", output_in_query=True, key_stages=3),
}
# without lists a walk is neither rotated nor slowed by reading
DENSE = ("default", "v3", "walker_v3", "across", "walker_across", "walker_across_v3", "snake_v3")
SCORE = {
    "base": replace(TMA_TILING, fused=False, band=16),
    "fused": Tiling(128, 256, 8, 4, 1, True, fused=True),
    "fused_3_stages": Tiling(128, 256, 8, 3, 1, True, fused=True),
    "fused_band_8": Tiling(128, 256, 8, 4, 1, True, fused=True, band=8),
    "fused_band_32": Tiling(128, 256, 8, 4, 1, True, fused=True, band=32),
    "tall_fused": Tiling(256, 128, 8, 4, 1, True, fused=True),
    "two": Tiling(128, 128, 4, 3, 2, True),
    "two_fused": Tiling(128, 128, 4, 3, 2, True, fused=True),
}
_WORKLOADS = {
    "sparse_128k_.05": (131072, 0.05),
    "sparse_64k_.02": (65536, 0.02),
    "sparse_64k_.05": (65536, 0.05),
    "dense_64k": (65536, None),
    "sparse_128k_.5": (131072, 0.5),
}


def cases(section: str) -> dict[str, Callable[[], dict[str, Any]]]:
    """Cases by name, as `kernel_timing.workloads`."""
    if section == "lever_check":
        attention = {f"attention {name}": lambda one=one: _check_attention(one) for name, one in ATTENTION.items()}
        return attention | {f"score {name}": lambda one=one: _check_score(one) for name, one in SCORE.items()}
    if section == "estimate":
        return {"estimate_128k_stride_16": lambda: _estimate(131072, 16, "max")}
    return {name: lambda shape=shape: _attention(*shape) for name, shape in _WORKLOADS.items()}


def line(section: str, values: dict[str, Any]) -> str:
    """A result as a table: one variant a row, fastest first."""
    rows = [f"== {section} {values['case']}"]
    for name, value in values.items():
        if name.endswith("_tflops"):
            variant = name.removesuffix("_tflops")
            rows.append(f"{variant:>24} {value:8.1f} TFLOP/s {values[variant + '_ms']:9.3f} ms")
        elif not name.endswith("_ms") and name not in ("case", "seconds"):
            rows.append(f"{name:>24} {value}")
    return "\n".join(rows)


def _kept(variants: dict[str, Any], kind: str) -> dict[str, Any]:
    skipped = os.environ.get(SKIP, "").split(",")
    return {name: one for name, one in variants.items() if f"{kind} {name}" not in skipped}


def _check_attention(tuning: GluonTuning) -> dict[str, Any]:
    calls = {
        "lists": kernel_checks.Call(heads=32, kv_heads=8, query_len=3000, key_len=3000, density=0.2, tuning=tuning),
        "dense": kernel_checks.Call(heads=32, kv_heads=8, query_len=2000, key_len=2000, tuning=tuning),
        "empty": kernel_checks.Call(heads=8, kv_heads=2, query_len=1000, key_len=1000, density=0.03, tuning=tuning),
    }
    found = {name: kernel_checks.check(call) for name, call in calls.items()}
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
        own = triton_select.importance(query, key, tiling=tiling, **options)
        largest = max(largest, float((own - reference_select.importance(one)).abs().max()))
        lists = [triton_select.select_blocks(query, key, tiling=tiling, **options) for _ in range(2)]
        kept = [blockmask.to_dense(*pair, one.key_blocks) for pair in lists]
        wanted = reference_select.choose(own, *reference_select.candidates(one), one.threshold, one.density)
        problems += ["two runs differ"] * (not torch.equal(*kept)) + ["other blocks than its importances ask for"] * (
            not (kept[0] ^ wanted).float().mean() < 1e-4  # sums are rounded in another order
        )
    problems += [f"importance off by {largest:.1e}"] * (not largest < 2e-3)
    return {"served": True, "ok": not problems, "problems": "; ".join(problems), "error": largest}


def _milliseconds(runs: dict[str, Callable[[], Any]]) -> dict[str, list[float]]:
    """Samples of each run over interleaved rounds, back to back within one."""

    def samples(run: Callable[[], Any], count: int) -> list[float]:
        pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]
        run()
        for begin, end in pairs:
            begin.record()
            run()
            end.record()
        torch.cuda.synchronize()
        return [begin.elapsed_time(end) for begin, end in pairs]

    first = {name: samples(run, 1)[0] for name, run in runs.items()}
    counts = {name: min(8, max(1, round(_SAMPLE_MS / milliseconds))) for name, milliseconds in first.items()}
    found: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(ROUNDS):
        for name, run in runs.items():
            found[name] += samples(run, counts[name])
    return found


def _table(found: dict[str, list[float]], flops: float, differences: dict[str, float]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name in sorted(found, key=lambda name: statistics.median(found[name])):
        milliseconds = statistics.median(found[name])
        values |= {f"{name}_ms": round(milliseconds, 4), f"{name}_tflops": round(flops / milliseconds / 1e9, 1)}
    return values | {f"{name}_difference": value for name, value in differences.items() if not value < 0.02}


def _attention(length: int, density: float | None) -> dict[str, Any]:
    from benchmarks import kernel_timing

    query, key, value = kernel_timing.inputs(length)
    flops, lists = 4 * length * length * 128 * 32 / 2, None
    if density is not None:
        keep = kernel_timing.random_blocks(length, density)
        lists, flops = kernel_checks.block_lists(keep), 4 * 128 * 128 * 128 * int(keep.sum())
        del keep
    call = kernel_timing.options(query, lists)
    variants = {name: one for name, one in _kept(ATTENTION, "attention").items() if density is not None or name in DENSE}
    if density is not None and density > 0.2:
        variants = {name: one for name, one in variants.items() if name in DENSE or name.startswith("all")}
    runs = {name: lambda one=one: gluon_attention.launch(query, key, value, tuning=one, **call)[0] for name, one in variants.items()}
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
    """Scoring and choosing together, and apart for the first variant."""
    query, key, _ = structured(length)
    options = _score_call(stride, pool, 0.9)
    kept: dict[str, float] = {}
    runs, absent = {}, {}
    for name, tiling in _kept(SCORE, "score").items():
        runs[name] = lambda tiling=tiling: triton_select.select_blocks(query, key, tiling=tiling, **options)
        try:
            kept[name] = runs[name]()[0].sum().item()
        except Exception as error:
            absent[f"{name}_absent"] = f"{type(error).__name__}: {str(error)[:160]}"
            del runs[name]
    first = next(iter(kept.values()))
    differences = {name: abs(count / first - 1) for name, count in kept.items()}
    values = _table(_milliseconds(runs), length * length * 128 * 32 / stride, differences)
    fastest = min(runs, key=lambda name: values[f"{name}_ms"])
    return values | absent | _apart(runs[fastest])


def _apart(run: Callable[[], Any]) -> dict[str, float]:
    """Device milliseconds of each kernel of a call."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as found:
        for _ in range(4):
            run()
        torch.cuda.synchronize()
    return {
        f"kernel_{event.key[:24].replace(' ', '_')}": round(event.device_time_total / 4000, 4)
        for event in found.key_averages()
        if event.device_time_total / 4000 > 0.02
    }
