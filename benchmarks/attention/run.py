"""The attention kernels on one GPU, timed beside their peers in the same process.

    python -m benchmarks run attention tune table dims short --out results/kernels.jsonl

Sections: `tune` the kernel's variants; `table` block-sparse and dense attention at 64K and 128K tokens,
sink + window, and chunks; `dims` other head dims and fp16; `short` prompts of 2K to 8K; and, only when asked for,
`estimate`: variants of block scoring (variants.py). Shapes are Llama-3.1-8B's: 32 query heads, 8 KV
heads, head dim 128, bf16, batch 1. TFLOP/s count the visited blocks (4·128·128·D each), or half of N² for dense causal attention. Times
are medians over two interleaved rounds. Peers that are not installed are recorded as such.

Every section runs in worker processes: one that says nothing for too long is killed, the case recorded as hung, and the next case goes on.
"""

from __future__ import annotations

import argparse
import json
import queue
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

SECTIONS = ("tune", "table", "dims", "short")
VARIANTS = ("tune", "estimate")  # of variants.py; `estimate` is not run unless asked for
PATIENCE = {"tune": 120, "table": 240, "dims": 240, "short": 180, "estimate": 100}  # seconds without a word


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sections", nargs="*", default=list(SECTIONS), help="any of " + ", ".join((*SECTIONS, "estimate")))
    parser.add_argument("--out", type=Path, help="append records here (default: results/kernels.jsonl)")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--seconds", type=float, default=540, help="stop starting cases after this long, all in all")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--cases", nargs="*", default=[], help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.worker:
        work(options.worker, options.cases)
        return 0
    from benchmarks.attention import Kernels, timing, variants
    from benchmarks.lib import records

    out = options.out or records.RESULTS / "kernels.jsonl"
    end = time.monotonic() + options.seconds
    results = []

    def keep(section: str, values: dict[str, Any]) -> None:
        results.append({"section": section, **values})
        show = variants.line if section in VARIANTS else timing.line
        print(show(section, values), flush=True)
        records.append(out, Kernels(section=section, case=values["case"], more=values))

    for section in options.sections:
        supervise(section, [name for name in cases(section) if options.only in name], end, keep)
    print(timing.summary(results), flush=True)
    return 0


def cases(section: str) -> dict[str, Callable[[], dict[str, Any]]]:
    from benchmarks.attention import timing, variants

    return variants.cases(section) if section in VARIANTS else timing.workloads(section)


def supervise(section: str, names: list[str], end: float, keep) -> None:
    """Runs cases in a worker; after a hang or a crash, the rest in a fresh one."""
    left = list(names)
    while left:
        if time.monotonic() > end:
            keep(section, {"case": left[0], "error": f"out of time, {len(left)} cases left out"})
            return
        command = [sys.executable, "-m", "benchmarks.attention.run", "--worker", section, "--cases", *left]
        worker = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        lines: queue.Queue[str | None] = queue.Queue()
        complaints: list[str] = []
        threading.Thread(target=_pump, args=(worker.stdout, lines), daemon=True).start()
        threading.Thread(target=lambda stream=worker.stderr, kept=complaints: kept.extend(stream), daemon=True).start()
        current = left[0]
        problem = ""
        while True:
            try:
                line = lines.get(timeout=min(PATIENCE[section], max(end + 30 - time.monotonic(), 1)))
            except queue.Empty:
                problem = "hung"
                break
            if line is None:
                worker.wait()
                problem = f"the worker ended with {worker.returncode}: {' '.join(complaints[-4:])[-400:]}"
                break
            if not line.startswith("{"):
                continue
            message = json.loads(line)
            if "begins" in message:
                current = message["begins"]
            else:
                keep(section, message)
                left.remove(message["case"])
        worker.kill()
        worker.wait()
        if current in left:  # else the worker told its result and gave up its broken CUDA context
            keep(section, {"case": current, "error": problem})
            left.remove(current)


def _pump(stream, lines: queue.Queue[str | None]) -> None:
    for line in stream:
        lines.put(line)
    lines.put(None)


def work(section: str, names: list[str]) -> None:
    """One line when a case begins and one with its result."""
    for name in names:
        print(json.dumps({"begins": name}), flush=True)
        start = time.monotonic()
        try:
            values = cases(section)[name]()
        except Exception as error:
            at = traceback.extract_tb(error.__traceback__)[-1]
            values = {"error": f"{type(error).__name__}: {str(error)[:400]}", "at": f"{Path(at.filename).name}:{at.lineno}"}
        values = {key: _json(value) for key, value in values.items()}
        print(json.dumps({"case": name, **values, "seconds": round(time.monotonic() - start, 1)}), flush=True)
        if "CUDA error" in str(values.get("error")):
            sys.exit(1)


def _json(value: Any) -> Any:
    """NaN and infinities as text."""
    return str(value) if isinstance(value, float) and value - value != 0 else value


if __name__ == "__main__":
    sys.exit(main())
