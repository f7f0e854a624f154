"""Long runs of the tests as tables: fuzzing, the soak of threads, and compute-sanitizer."""

from __future__ import annotations

from collections.abc import Iterable

from benchmarks.lib.registry import Benchmark
from benchmarks.test_runs import Compatibility, Fuzz, Sanitize, Soak, Sweep
from sparsify.commands.bench.tables import Found, commit, conditions, latest, markdown

_WITH = ("torch", "triton", "transformers")


def table(found: Iterable[Found]) -> str:
    """One row a run."""
    rows = []
    for record in sorted(found, key=lambda r: r["time"]):
        machine = record["machine"]
        if record["benchmark"] == Fuzz.NAME:
            rewritten = ", ".join(f"{name} {count}" for name, count in sorted(record["rewritten"].items()))
            done = f"{record['programs']} programs of seed {record['seed']}, {record['sites']} attentions; rewritten by {rewritten}"
        else:
            done = f"{record['threads']} threads × {record['calls']} calls of generate(), compiled: {', '.join(record['lower'])}"
        wrong = len(record["wrong"]) + len(record.get("errors", ()))
        versions = " · ".join(f"{name} {machine[name]}" for name in _WITH)
        rows.append([record["time"][:10], record["benchmark"], done, str(wrong), str(record["seconds"]), versions, commit(record)])
    return markdown(["date", "run", "what", "wrong", "seconds", "with", "commit"], rows)


def sanitizer_table(found: Iterable[Found]) -> str:
    """What compute-sanitizer said of each kernel family."""
    cells = latest(found, Sanitize)
    rows = [[record["family"], str(record["tool"] or "none"), record["status"]] for record in cells]
    return conditions(cells) + "\n\n" + markdown(["kernels", "tool", "status"], sorted(rows))


BENCHMARKS = (
    Benchmark(
        name="sanitizer",
        place=5,
        measures="the kernels under NVIDIA's compute-sanitizer, memcheck and racecheck (`python -m tests.sanitizer.run --record`)",
        records=(Sanitize,),
        title="Kernels under compute-sanitizer",
        table=sanitizer_table,
    ),
    Benchmark(
        name="soundness",
        place=11,
        measures="programs of the fuzzer and calls of the soak that were wrong (`make fuzz RECORD=1`, `make soak RECORD=1`)",
        records=(Fuzz, Soak),
        unshown=(Compatibility, Sweep),  # docs/compatibility.md and docs/support.md have them
        title="Fuzzing and soak",
        table=table,
    ),
)
