"""Long runs of the tests as tables: fuzzing, and the soak of threads."""

from __future__ import annotations

from collections.abc import Iterable

from benchmarks.lib.tables import Record, markdown, short

TITLE = "Fuzzing and soak"
NAMES = ("fuzz", "soak")
_WITH = ("torch", "triton", "transformers")


def table(found: Iterable[Record]) -> str:
    """One row a run."""
    rows = []
    for record in sorted(found, key=lambda r: r["time"]):
        machine = record["machine"]
        if record["benchmark"] == "fuzz":
            rewritten = ", ".join(f"{name} {count}" for name, count in sorted(record["rewritten"].items()))
            done = f"{record['programs']} programs of seed {record['seed']}, {record['sites']} attentions; rewritten by {rewritten}"
        else:
            done = f"{record['threads']} threads × {record['calls']} calls of generate(), compiled: {', '.join(record['lower'])}"
        wrong = len(record["wrong"]) + len(record.get("errors", ()))
        versions = " · ".join(f"{name} {machine[name]}" for name in _WITH)
        commit = short(machine.get("commit") or "unknown")
        rows.append([record["time"][:10], record["benchmark"], done, str(wrong), str(record["seconds"]), versions, commit])
    return markdown(["date", "run", "what", "wrong", "seconds", "with", "commit"], rows)
