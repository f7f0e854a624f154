"""Measures the device in hand: its ceilings, and how far each kernel family stays below them, in under a minute on a GPU.

The kernels are the ones that graphs will run. They are compiled first, in processes side by side where there are cores for it.
"""

from __future__ import annotations

import datetime
import io
import itertools
import os
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from sparsify import backends
from sparsify.commands.calibrate import fit, timing
from sparsify.costs import profile_cache
from sparsify.costs.device import Device
from sparsify.costs.profile import Links, Profile
from sparsify.costs.samples import Dtype, Sample, Workload, predict
from sparsify.costs.work import step_kernel
from sparsify.errors import ProfileError, SparsifyError
from sparsify.passes.xattention import XAttention

K = 1024
SECONDS = 50.0  # after so long no further call is measured
_COMPILE_SECONDS = 60.0


@dataclass(frozen=True)
class Calibration:
    """A measured profile and what it was fitted to. failed: calls that did not run, with the reason."""

    profile: Profile
    samples: tuple[Sample, ...]
    failed: dict[str, str]

    def error(self, family: str) -> float:
        """Median relative error of the fit over a family's calls."""
        device = Device.from_profile("cuda" if self.profile.capability else "cpu", self.profile)
        of_family = [sample for sample in self.samples if sample.workload.works()[0].family == family]
        return statistics.median(abs(predict(one.workload, device) / one.seconds - 1) for one in of_family)


def workloads(device: str, small: bool = False) -> list[Workload]:
    """What is measured, the most telling calls first.

    Args:
        small: sizes that a CPU does in seconds.
    """
    ours = [family for family in (backends.attention_family(torch.device(device))[0],) if family != "reference"]
    if small or device != "cuda":
        lengths, shape = ((128, 256, 512), (1, 32, 64)) if small else ((1 * K, 2 * K, 4 * K), (2, 64, 512))
        kv_heads, head_dim, hidden = shape
        heads = {"query_heads": 2 * kv_heads, "kv_heads": kv_heads, "head_dim": head_dim}
        return _workloads(("sdpa", "reference", *ours), lengths, (lengths[0], lengths[-1]), heads, hidden, "float32")
    kernels: tuple[str, ...] = tuple(dict.fromkeys(("sdpa", *ours, *(["triton"] if ours else []))))
    return _workloads(kernels, (1 * K, 4 * K, 32 * K), (4 * K, 64 * K), {}, 4096, "bfloat16")


def _selection(method: XAttention) -> dict[str, Any]:
    """What a `Workload` says of a selection as a method makes it."""
    alike = {name: getattr(method, name) for name in ("stride", "pool", "threshold", "min_share", "coarse_threshold")}
    return {**alike, "variants": method.estimate, "refine_stride": method.refine_stride or 0}


def _workloads(
    kernels: tuple[str, ...], lengths: tuple[int, ...], ends: tuple[int, int], shape: dict[str, Any], hidden: int, dtype: Dtype
) -> list[Workload]:
    prompt = lambda kind, n, kernel="", **more: Workload(kind, kernel, query_len=n, key_len=n, dtype=dtype, **shape, **more)
    own = [kernel for kernel in kernels if kernel != "sdpa"]
    found = [prompt("attention", n, kernel) for n in lengths for kernel in kernels]
    for kernel in own:
        found += [prompt("attention", n, kernel, density=d) for n, d in itertools.product(ends, (0.05, 0.3))]
        found += [prompt("attention", n, kernel, window=lengths[0] // 2, sinks=4) for n in ends]
    if own:
        found += [prompt("select", n, stride=stride) for n in sorted({ends[0], lengths[-1], ends[1]}) for stride in (8, 16)]
        # the default rule compares each cell's masses with one cutoff after the other, which no other call tells
        found += [prompt("select", n, stride=stride, pool="row") for n in ends for stride in (4, 8)]
        # the default in two stages, and what stands in where two do not serve
        found += [
            prompt("select", n, **_selection(method))
            for n in ends
            for method in map(XAttention.model_validate, ({}, {"refine_stride": None}))
        ]
    decoders: tuple[str, ...] = ("sdpa", "masked", *(["cache"] if own else []), *(step_kernel(kernel) for kernel in own[-1:]))
    for kernel, n, batch in itertools.product(decoders, ends, (1, 8)):
        found.append(Workload("decode", kernel, key_len=n, batch=batch, dtype=dtype, **shape))
    wide = hidden * 7 // 2
    if own:
        found += [Workload("ffn", rows=rows, inputs=hidden, outputs=wide, skipped=s, dtype=dtype) for rows in (1, 16) for s in (0.0, 0.5)]
    matrices = ((hidden, hidden), (hidden, wide), (wide, hidden))
    found += [Workload("linear", rows=rows, inputs=i, outputs=o, dtype=dtype) for rows in (1, 16, 512, 4 * K) for i, o in matrices]
    return found + [Workload("elementwise", size=3 * hidden * size, dtype=dtype) for size in (64, 4 * K, 64 * K)]


def calibrate(
    device: str,
    *,
    small: bool = False,
    seconds: float = SECONDS,
    progress: Callable[[int, int, str], None] = lambda done, all_, what: None,
    links: Links | None = None,
) -> Calibration:
    """Measures and fits; nothing is written.

    Args:
        device: "cuda" or "cpu". small: few and small calls, for tests. progress: called with (calls done, calls, what runs now).
        links: to other devices, as they were measured; None: as they are known.

    Raises:
        ProfileError: there is no such device, or nothing could be measured.
    """
    if device not in ("cuda", "cpu"):
        raise ProfileError(f"no calibration for {device!r}", where="device", hint="cuda or cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise ProfileError("there is no CUDA device here", where="device", hint="--device cpu measures the CPU")
    wanted = workloads(device, small)
    if device == "cuda" and not small:
        progress(0, len(wanted), "compiling")
        compile_kernels(wanted)
    progress(0, len(wanted), "ceilings")
    here = profile_cache.identity(device)
    measured = timing.ceilings(device, small=small or device == "cpu")
    source = f"sparsify calibrate device, {datetime.date.today()}"
    facts = {"device": here.device, "versions": here.versions, "measured": True, "source": source}
    known = profile_cache.default(device)
    prior = known.model_copy(update={**measured, **facts, "links": links or known.links})
    end, samples, failed = time.monotonic() + seconds, [], {}
    for done, workload in enumerate(wanted):
        if samples and time.monotonic() > end:
            failed["time"] = f"{len(wanted) - done} of {len(wanted)} calls left out after {seconds:.0f} s"
            break
        progress(done, len(wanted), f"{workload.kind} {workload.kernel}".strip())
        try:
            samples.append(timing.measure(workload, device, replays=3))
        except (SparsifyError, RuntimeError) as error:
            failed[str(workload.as_record())] = f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}"
    if not samples:
        raise ProfileError("no call could be measured", where=here.device, hint=next(iter(failed.values()), ""))
    progress(len(wanted), len(wanted), "fitting")
    return Calibration(fit.fit(samples, Device.from_profile(device, prior), prior), tuple(samples), failed)


def table(found: Calibration, width: int = 140) -> str:
    """The ceilings, each family's efficiency and fixed time with the error of its fit, and what did not run."""
    one = found.profile
    lines = [f"{one.device}: {one.flops / 1e12:.4g} TFLOP/s, {one.bandwidth / 1e9:.4g} GB/s, {1e6 * one.launch:.3g} µs a launch"]
    if one.links is not None and one.links.processes:
        rates = f"{one.links.exchange / 1e9:.4g} GB/s of an exchange, {one.links.reduce / 1e9:.4g} GB/s of a sum"
        lines.append(f"among {one.links.processes} processes: {rates}, {1e6 * one.links.latency:.3g} µs each")
    grid = Table()
    for name in ("kernels", "calls", "of the ceiling", "fixed", "error of the fit"):
        grid.add_column(name, justify="left" if name == "kernels" else "right")
    count = Counter(sample.workload.works()[0].family for sample in found.samples)
    for family, terms in sorted(one.families.items()):
        if not count[family]:
            grid.add_row(family, "not measured")
            continue
        main = next((terms[name] for name in ("work", "bytes", "scores") if terms.get(name)), None)
        ceiling = f"{1 / main:.0%}" if main else ""
        grid.add_row(family, str(count[family]), ceiling, f"{1e6 * terms.get('call', 0):.3g} µs", f"{found.error(family):.1%}")
    text = io.StringIO()
    console = Console(file=text, width=width)
    console.print(grid)
    failed = [f"did not run: {call}: {reason}" for call, reason in found.failed.items()]
    return "\n".join([*lines, text.getvalue().rstrip(), *failed])


def compile_kernels(wanted: Sequence[Workload]) -> None:
    """Fills Triton's cache from processes side by side; what fails there fails again, with its reason, when it is measured."""
    jobs = min(len(wanted), os.cpu_count() or 1, 12)
    if jobs < 2:
        return
    command = [sys.executable, "-m", "sparsify.commands.calibrate.device"]
    started = [subprocess.Popen([*command, str(i), str(jobs)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) for i in range(jobs)]
    end = time.monotonic() + _COMPILE_SECONDS
    for process in started:
        try:
            process.wait(max(0.1, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()


def _distinct_kernels(wanted: Sequence[Workload]) -> list[Workload]:
    """One workload for each kernel text: time does not matter here, so few heads where the kernel does not depend on them."""
    chosen: dict[tuple[Any, ...], Workload] = {}
    for workload in wanted:
        if workload.kernel in ("sdpa", "masked") or workload.kind in ("linear", "elementwise"):
            continue
        few = workload
        if workload.kind == "select":
            few = replace(workload, query_heads=workload.query_heads // workload.kv_heads, kv_heads=1)
        by_length = workload.key_len if workload.kind == "select" or workload.kernel == "hopper" else 0
        clauses = workload.density is None, workload.window, workload.stride, workload.variants, workload.pool, workload.rows
        clauses += workload.refine_stride, workload.min_share > 0
        chosen.setdefault((workload.kind, workload.kernel, *clauses, by_length), few)
    return list(chosen.values())


@torch.no_grad()
def _warm(job: int, jobs: int) -> None:
    for workload in _distinct_kernels(workloads("cuda"))[job::jobs]:
        timing.prepare(workload, "cuda").run()
    torch.cuda.synchronize()


if __name__ == "__main__":
    _warm(int(sys.argv[1]), int(sys.argv[2]))
