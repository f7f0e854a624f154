"""What sparsify adds to compiling: a small llama's prompt and next token, cold and with Inductor's caches warm, beside Inductor alone.

    python -m benchmarks run compile_time [--layers 2] [--length 256] [--hidden 256] [--repeats 1]

Every measurement is a fresh process with a cache folder of its own; warm runs come second in the same folder. The backends take turns, and
of several repeats the median counts. CPU seconds of the process and its children (compilers), so that a busy machine changes little;
Inductor compiles in one thread. Appends to results/compile_time.jsonl.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.lib import records
from benchmarks.model import CompileTime
from sparsify.generation.compat import with_cache

ROOT = Path(__file__).parents[2]


def _cpu_seconds() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def child(backend: str, layers: int, length: int, hidden: int) -> dict[str, float]:
    """One process: how much longer a prompt and a token take when they compile, and what of it sparsify's own stages and lowering took."""
    import torch
    from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

    from sparsify import pipeline

    spent = {"compile": 0.0, "lower": 0.0, "validate": 0.0}

    def timed(name: str, function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            start = _cpu_seconds()
            try:
                return function(*args, **kwargs)
            finally:
                spent[name] += _cpu_seconds() - start

        return call

    pipeline.lower = timed("lower", pipeline.lower)
    pipeline.validate = timed("validate", pipeline.validate)
    pipeline.compile_graph = timed("compile", pipeline.compile_graph)
    torch.manual_seed(0)
    heads = hidden // 64
    sizes = {
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": max(1, heads // 2),
    }
    model = LlamaForCausalLM(LlamaConfig(vocab_size=512, num_hidden_layers=layers, **sizes)).eval()
    ids = torch.randint(0, 512, (2, length))
    mask = torch.ones_like(ids)
    mask[0, :5] = 0

    def calls() -> None:
        cache = DynamicCache(config=model.config)
        model(input_ids=ids, attention_mask=mask, **with_cache(model, cache))
        model(input_ids=ids[:, -1:], attention_mask=torch.cat([mask, mask[:, -1:]], 1), **with_cache(model, cache))

    spans = []
    for first in (True, False):  # the second time nothing is compiled: what is left over is compiling
        start, cpu = time.perf_counter(), _cpu_seconds()
        if first:
            model.compile(backend=backend)  # inside the clock: it imports Inductor for one backend, the first call does for the other
        with torch.no_grad():
            calls()
        spans.append((_cpu_seconds() - cpu, time.perf_counter() - start))
    return {
        "seconds": spans[0][0] - spans[1][0],
        "wall_s": spans[0][1] - spans[1][1],
        "run_s": spans[1][0],
        "own_s": spent["compile"] - spent["lower"],
        "lower_s": spent["lower"],
        "validate_s": spent["validate"],
    }


def _run(backend: str, folder: str, sizes: list[str]) -> dict[str, float]:
    variables = {"TORCHINDUCTOR_CACHE_DIR": folder, "TORCHINDUCTOR_COMPILE_THREADS": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "benchmarks.model.compile_time", "--child", backend, *sizes]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **variables}, capture_output=True, text=True, timeout=1800)
    if done.returncode:
        raise RuntimeError(f"{backend}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def measure(layers: int = 2, length: int = 256, hidden: int = 256, repeats: int = 1) -> dict[str, Any]:
    """Seconds of CPU of both backends, cold and warm, sparsify's own stages among them, and the ratios."""
    sizes = ["--layers", str(layers), "--length", str(length), "--hidden", str(hidden)]
    runs: dict[tuple[str, str], list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as folder:  # what each backend leaves in no cache of ours, such as compiled Python, comes before
        _run("sparsify", folder, ["--layers", "1", "--length", "16", "--hidden", "64"])
    for repeat in range(repeats):
        for backend in ("inductor", "sparsify")[:: -1 if repeat % 2 else 1]:
            with tempfile.TemporaryDirectory() as folder:
                for state in ("cold", "warm"):
                    runs.setdefault((backend, state), []).append(_run(backend, folder, sizes))
    times = {key: {name: statistics.median(run[name] for run in found) for name in found[0]} for key, found in runs.items()}
    record: dict[str, Any] = {"layers": layers, "length": length, "hidden": hidden, "repeats": repeats}
    for (backend, state), measured in times.items():
        record[f"{backend}_{state}_s"] = measured["seconds"]
        record[f"{backend}_{state}_wall_s"] = measured["wall_s"]
    ours = times["sparsify", "cold"]
    return record | {
        "own_s": ours["own_s"],
        "own_warm_s": times["sparsify", "warm"]["own_s"],
        "sparsify_lower_s": ours["lower_s"],
        "validate_s": ours["validate_s"],
        "validate_share": ours["validate_s"] / record["sparsify_cold_s"],
        "validate_warm_share": times["sparsify", "warm"]["validate_s"] / record["sparsify_warm_s"],
        "cold_ratio": record["sparsify_cold_s"] / record["inductor_cold_s"],
        "warm_ratio": record["sparsify_warm_s"] / record["inductor_warm_s"],
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.child:
        print(json.dumps(child(given.child, given.layers, given.length, given.hidden)))
        return 0
    record = measure(given.layers, given.length, given.hidden, given.repeats)
    records.append(records.RESULTS / "compile_time.jsonl", CompileTime(**record))
    print(json.dumps(record, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
