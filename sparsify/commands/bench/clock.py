"""The benchmarks' one clock: milliseconds of calls, on a GPU by events and CUDA graphs, on a CPU by the host.

`once` times a call; `samples` several back to back; `turns` contestants that take turns, so that clock and temperature are the same for
all; `replays` a CUDA graph, in which no host time is; `under_load` a call that goes on until the device is as slow as it gets.
"""

from __future__ import annotations

import ctypes
import functools
import gc
import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

Run = Callable[[], Any]
_FLUSH_BYTES = 256 << 20  # more than any L2 cache holds
_GRAPH_MS = 3.0  # short calls are captured so often that a replay takes about so long
_WARM_MS, _LOAD_MS = 120.0, 160.0  # at the power limit clocks fall within tens of milliseconds


class Clock:
    """Times calls on one device, "cuda" or "cpu"."""

    def __init__(self, device: str) -> None:
        self.cuda = device == "cuda"

    def mark(self) -> Any:
        """A point in time: of the device's queue, or of the host."""
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between(self, begin: Any, end: Any) -> float:
        """Milliseconds from one mark to a later one; both have been waited for."""
        return begin.elapsed_time(end) if self.cuda else 1e3 * (end - begin)

    def wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def once(self, run: Run) -> tuple[float, Any]:
        """Milliseconds of a call that starts on an idle device, and what it returns."""
        self.wait()
        begin = self.mark()
        result = run()
        end = self.mark()
        self.wait()
        return self.between(begin, end), result

    def loop(self, step: Run, count: int) -> float:
        """Milliseconds a step of a loop that is waited for at its end: what its user waits, the host's time included."""
        begin = time.perf_counter()
        for _ in range(count):
            step()
        self.wait()
        return 1e3 * (time.perf_counter() - begin) / count

    def samples(self, run: Run, count: int, flush: bool = False) -> list[float]:
        """Milliseconds of each of `count` calls back to back, so that the host stays ahead. flush: each finds an empty L2 cache."""
        rubbish = _rubbish() if flush and self.cuda else None
        marks = []
        for _ in range(count):
            if rubbish is not None:
                rubbish.zero_()
            begin = self.mark()
            run()
            marks.append((begin, self.mark()))
        self.wait()
        return [self.between(*pair) for pair in marks]

    def turns(self, runs: dict[str, Run], rounds: int, sample_ms: float, most: int) -> tuple[dict[str, list[float]], dict[str, str]]:
        """Milliseconds by contestant, and why others have none. In each round each runs for about `sample_ms`, at most `most` times."""
        times: dict[str, list[float]] = {}
        absent: dict[str, str] = {}
        counts: dict[str, int] = {}
        for name, run in runs.items():
            try:
                self.samples(run, 1, flush=True)
                first = self.samples(run, 1, flush=True)[0]
            except Exception as error:
                absent[name] = reason(error)
                continue
            counts[name] = min(most, max(1, int(sample_ms / max(first, 1e-3)))) if self.cuda else 1
            times[name] = []
        for _ in range(rounds if self.cuda else 1):
            for name, found in times.items():
                found += self.samples(runs[name], counts[name], flush=True)
        return times, absent

    def graph(self, run: Run, calls: int = 1) -> Run:
        """Replays `calls` calls out of a CUDA graph and returns what the last one returned; on a CPU it calls them."""
        if not self.cuda:
            run()
            return lambda: [run() for _ in range(calls)][-1]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # what compiles or allocates at first
            for _ in range(3):
                run()
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = [run() for _ in range(calls)][-1]

        def replay() -> Any:
            graph.replay()
            return result

        replay()
        self.wait()
        return replay

    def replays(self, run: Run, count: int = 20) -> float:
        """Median milliseconds of a call without the host's time."""
        self.once(run)
        calls = min(64, max(1, int(_GRAPH_MS / max(self.once(run)[0], 1e-3)))) if self.cuda else 1
        return statistics.median(self.samples(self.graph(run, calls), count)) / calls

    def under_load(self, run: Run) -> dict[str, float]:
        """ms: mean of a call after it has run for a while already; mhz, watts: of the GPU meanwhile, NaN where it cannot say."""
        once = max(self.once(run)[0], 1e-3)
        for _ in range(max(1, round(_WARM_MS / once))):
            run()
        begin = self.mark()
        count = max(2, round(_LOAD_MS / once))
        for _ in range(count):
            run()
        end = self.mark()
        states = []
        while self.cuda and not end.query():
            if begin.query():
                states.append(_gpu_state())
            time.sleep(0.003)
        mhz, watts = (statistics.mean(column) for column in zip(*states, strict=True)) if states else (math.nan, math.nan)
        return {"ms": self.between(begin, end) / count, "mhz": mhz, "watts": watts}


def reason(error: Exception) -> str:
    """Why something did not run, short enough for a record."""
    return f"{type(error).__name__}: {str(error)[:300]}"


@functools.cache
def _rubbish() -> torch.Tensor:
    return torch.empty(_FLUSH_BYTES, dtype=torch.int8, device="cuda")


@functools.cache
def _nvml() -> tuple[Any, Any]:
    library = ctypes.CDLL("libnvidia-ml.so.1")
    library.nvmlInit_v2()
    device = ctypes.c_void_p()
    # NVML counts all GPUs, whatever CUDA_VISIBLE_DEVICES leaves
    name = f"GPU-{torch.cuda.get_device_properties(torch.cuda.current_device()).uuid}".encode()
    if library.nvmlDeviceGetHandleByUUID(name, ctypes.byref(device)):
        raise OSError("NVML does not know this GPU")
    return library, device


def _gpu_state() -> tuple[float, float]:
    """The multiprocessors' clock in MHz and the board's power in watts."""
    clock, power = ctypes.c_uint(), ctypes.c_uint()
    try:
        library, device = _nvml()
        failed = library.nvmlDeviceGetClockInfo(device, 1, ctypes.byref(clock)) or library.nvmlDeviceGetPowerUsage(
            device, ctypes.byref(power)
        )
    except (OSError, AttributeError):
        failed = True
    return (math.nan, math.nan) if failed else (float(clock.value), power.value / 1000)


def clean(device: str) -> None:
    """Gives memory back, and forgets how much was allocated at most."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_bytes(device: str) -> int | None:
    """Most device memory since `clean`; None on a CPU."""
    return torch.cuda.max_memory_allocated() if device == "cuda" else None
