"""What every table of results needs: the latest record of a cell, Markdown, and the line that says where numbers come from."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

Record = dict[str, Any]


# what tells the cells of the feed-forward quality part apart, within a model
QUALITY_KEYS = ("policy", "threshold", "skip", "probability", "layers", "seed", "length", "rows")


def latest(found: Iterable[Record], *keys: str) -> list[Record]:
    """The last record of each cell, a cell being the values of `keys` and the device."""
    cells: dict[str, Record] = {}
    for record in found:
        cell = repr([record.get(key) for key in keys] + [record["machine"]["gpu"]])
        if cell not in cells or record["time"] >= cells[cell]["time"]:
            cells[cell] = record
    return list(cells.values())


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def size(length: int) -> str:
    return f"{length // 1024}K" if length % 1024 == 0 else str(length)


def failure(message: str) -> str:
    """Why a cell has no number, short enough for a table."""
    return "failed: " + (message.splitlines() or [""])[0][:60].replace("|", "/")


def groups(cells: Iterable[Record], key: Callable[[Record], Any]) -> list[list[Record]]:
    """The records by the value of `key`, in its order."""
    found: dict[Any, list[Record]] = {}
    for record in cells:
        found.setdefault(key(record), []).append(record)
    return [found[name] for name in sorted(found, key=repr)]


def conditions(found: Sequence[Record]) -> str:
    """One line that says where a table's numbers come from; several machines or commits are all named."""
    parts = []
    for name, label in (("gpu", ""), ("driver", "driver "), ("torch", "torch "), ("triton", "triton "), ("transformers", "transformers ")):
        values = sorted({str(record["machine"].get(name)) for record in found} - {"None"})
        parts += [label + ", ".join(values)] if values else (["CPU"] if name == "gpu" else [])
    commits = sorted({short(record["machine"].get("commit") or "unknown") for record in found})
    return "; ".join([*parts, "commit " + ", ".join(commits)]) + "."


def short(commit: str) -> str:
    """Ten digits, and still saying when the code was not quite that commit's."""
    name, plus, changes = commit.partition("+")
    return name[:10] + plus + changes


def fastest_dense(found: Iterable[Record], gpu: str | None) -> dict[int, tuple[float, str, str]]:
    """By length, the least milliseconds that dense causal attention took in any run on `gpu`, whose kernel it was, and which run.

    Only the shape of the whole-op benchmark counts: 32 query heads, 8 KV heads, head dim 128, bf16, batch 1.
    """
    fastest: dict[int, tuple[float, str, str]] = {}
    for record in found:
        if record["machine"]["gpu"] != gpu:
            continue
        for length, name, milliseconds in _dense_times(record):
            if length not in fastest or milliseconds < fastest[length][0]:
                fastest[length] = (milliseconds, name, record["benchmark"])
    return fastest


PEERS = {"ours": "sparsify", "ours, dense": "sparsify", "fa4": "FlashAttention-4", "cudnn": "cuDNN", "fa2": "FlashAttention-2",
         "flash": "FlashAttention-2", "flex": "FlexAttention", "sdpa": "SDPA", "sparsify": "sparsify"}  # fmt: skip


def _dense_times(record: Record) -> Iterable[tuple[int, str, float]]:
    if record["benchmark"] == "whole_op" and record["kind"] == "dense" and "ms" in record:
        if (record["heads"], record["kv_heads"], record["head_dim"], record["dtype"]) == (32, 8, 128, "bfloat16"):
            yield record["length"], PEERS.get(record["name"], record["name"]), record["ms"]
    elif record["benchmark"] == "kernels" and record["section"] in ("table", "short"):
        length = dense_length(record["case"])
        for name in ("ours", "fa4", "cudnn", "flex"):
            # in the windowed case only the peers are dense
            if length and f"{name}_ms" in record and (name != "ours" or record["case"].startswith("dense_")):
                yield length, PEERS[name], record[f"{name}_ms"]


def dense_length(case: str) -> int | None:
    """Tokens of a kernels case whose peers are dense causal attention over a whole prompt: dense_64k, sink_window_128k; else None."""
    name, _, kilo = case.rpartition("_")
    return int(kilo[:-1]) * 1024 if name in ("dense", "sink_window") and kilo.endswith("k") and kilo[:-1].isdigit() else None
