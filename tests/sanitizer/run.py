"""The kernels under NVIDIA's compute-sanitizer: memory that is not theirs (memcheck), and shared memory that threads race for (racecheck).

    python -m tests.sanitizer.run --record     # appends to benchmarks/results/sanitize.jsonl

A reduced matrix of small calls for each family of kernels: Gluon attention, Triton attention, block selection (scored at once, and while
keys pass by), columns and diagonals, rows without a key, caches, linear and feed-forward layers, tokens of images; and a control, a
hand-over through shared memory that is in order by construction (control.py), to judge what the tool says of the others by.
First every family runs alone, which compiles its kernels and must succeed; then each family runs under each tool, side by side in
processes of their own that are killed when they take too long. The last line is a JSON summary; the exit status is 1 when a tool found
something, 0 too when it is absent.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.lib import records
from benchmarks.test_runs import Sanitize

TOOLS = ("memcheck", "racecheck")
# family -> names of the generated modules that its calls load, as they are given to `source.load`; the control's is written by hand
FAMILIES: dict[str, tuple[str, ...]] = {
    "gluon": ("gluon_attention",),
    "triton": ("attention",),
    "empty_rows": ("attention", "empty_rows"),
    "select": ("select",),
    "passing": ("select",),
    "pattern": ("pattern",),
    "cache": ("append", "bounds", "decode", "mass", "pages", "quantised", "take_back"),
    "linear": ("linear",),
    "ffn": ("ffn", "ffn_activation", "ffn_rows", "ffn_start"),
    "tokens": ("farthest_first",),
    "control": (),
}
_SUMMARIES = (r"ERROR SUMMARY: (\d+) error", r"RACECHECK SUMMARY: (\d+) hazard")


def find_tool() -> str | None:
    """compute-sanitizer: what COMPUTE_SANITIZER names, on the path, in a CUDA toolkit, or in NVIDIA's wheels."""
    if named := os.environ.get("COMPUTE_SANITIZER"):
        return named
    if found := shutil.which("compute-sanitizer"):
        return found
    places = [Path("/usr/local").glob("cuda*/bin/compute-sanitizer"), Path("/usr/local").glob("cuda*/compute-sanitizer/compute-sanitizer")]
    places += [Path(folder).glob("nvidia/**/compute-sanitizer") for folder in sys.path if folder.endswith("site-packages")]
    return next((str(path) for place in places for path in place if path.is_file() and os.access(path, os.X_OK)), None)


def cases(family: str, device: str = "cuda") -> Iterator[tuple[str, Callable[[], Any]]]:
    """The calls of a family by name. It imports torch, which workers alone need."""
    from tests.sanitizer import attention, cache, control, layers, selection

    if family in ("gluon", "triton", "empty_rows"):
        return {"gluon": attention.with_messages, "triton": attention.plain, "empty_rows": attention.empty_rows}[family](device)
    if family in selection.FAMILIES:
        return selection.cases(*selection.FAMILIES[family], device)
    others = {"cache": cache.cases, "linear": layers.linear_cases, "ffn": layers.ffn_cases, "tokens": layers.token_cases}
    return others[family](device) if family in others else iter([("hand-over", control.run)])


def work(family: str) -> None:
    """Runs one family's cases; says when each is done, as the tool's report may come in between."""
    import torch

    for name, run in cases(family):
        run()
        torch.cuda.synchronize()
        print("DONE", name, flush=True)


def command(family: str, tool: str | None, path: str | None) -> list[str]:
    worker = [sys.executable, "-m", "tests.sanitizer.run", "--worker", family]
    if tool is None:
        return worker
    # padding between allocations makes a read that is slightly out of bounds one that is seen
    extra = ["--padding", "512"] if tool == "memcheck" else []
    return [str(path), "--tool", tool, "--error-exitcode", "99", "--print-limit", "20", *extra, *worker]


def observe(family: str, tool: str | None, path: str | None, seconds: float) -> dict[str, Any]:
    """One family under one tool (None: alone), as a record."""
    started = time.monotonic()
    # each tensor its own allocation, so that a neighbour's memory is out of bounds
    environment = {**os.environ, **({"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} if tool else {})}
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command(family, tool, path), stdout=log, stderr=subprocess.STDOUT, env=environment)
        try:
            code: int | None = process.wait(max(1.0, seconds))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            code = None
        log.seek(0)
        text = log.read()
    return {"family": family, "tool": tool or "none", **judge(text, code, tool), "seconds": round(time.monotonic() - started, 1)}


def judge(text: str, code: int | None, tool: str | None) -> dict[str, Any]:
    """status: "clean", "found" (by the tool), "failed" (the run itself) or "late" (killed); with what backs it up."""
    done = re.findall(r"^DONE (.*)$", text, re.MULTILINE)
    counts = [int(count) for pattern in _SUMMARIES for count in re.findall(pattern, text)]
    if counts and sum(counts):
        status = "found"
    elif code is None:
        status = "late"
    elif code != 0 or (tool is not None and not counts):
        status = "failed"
    else:
        status = "clean"
    result: dict[str, Any] = {"status": status, "done": done, "reports": sum(counts)}
    if unserved := re.findall(r"^NOT SERVED (.*)$", text, re.MULTILINE):
        result["not_served"] = unserved
    if status != "clean":
        lines = [line for line in text.splitlines() if line.startswith("=========") and len(line) > 12] or text.splitlines()[-6:]
        result["says"] = "\n".join(lines[:12])[:1500]
    return result


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--record", type=Path, nargs="?", const=records.RESULTS / "sanitize.jsonl", help="append records (default: %(const)s)"
    )
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--tools", nargs="+", choices=TOOLS, default=list(TOOLS))
    parser.add_argument("--seconds", type=float, default=115, help="kill what runs after this long, all in all")
    parser.add_argument("--worker", choices=FAMILIES, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.worker:
        work(options.worker)
        return 0
    path = find_tool()
    if path is None:
        print(json.dumps({"summary": "compute-sanitizer is absent", "hint": "set COMPUTE_SANITIZER to its path"}))
        return 0
    end = time.monotonic() + options.seconds
    with ThreadPoolExecutor(len(options.families) * len(options.tools)) as pool:
        alone = list(pool.map(lambda family: observe(family, None, None, options.seconds / 2), options.families))
        pairs = [(one["family"], tool) for one in alone if one["status"] == "clean" for tool in options.tools]
        found = list(pool.map(lambda pair: observe(*pair, path, end - time.monotonic()), pairs))
    results = [one for one in alone if one["status"] != "clean"] + found
    for one in results:
        print(json.dumps(one), flush=True)
        if options.record:
            records.append(options.record, Sanitize(**one))
    states = {f"{one['family']} {one['tool']}": one["status"] for one in results}
    print(json.dumps({"summary": states, "clean": all(state == "clean" for state in states.values()), "sanitizer": path}))
    return int("found" in states.values())


if __name__ == "__main__":
    sys.exit(main())
