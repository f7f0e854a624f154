"""Answers of the bundled model of word pieces by method and task: the table, and the worst task of each method."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from benchmarks.answers import CodeAnswers
from benchmarks.lib.registry import Benchmark
from sparsify.commands.bench.tables import Found, conditions, failure, groups, latest, markdown, size

MODEL = Path(__file__).parents[1] / "models" / "code"


def _method(record: Found) -> str:
    parameters = record["parameters"]
    if record["method"] == "xattention":
        return f"{parameters['pool']}, stride {parameters['stride']}, τ {parameters['threshold']:g}"
    if record["method"] == "sink_window":
        return f"sink_window, {parameters['sinks']} + {parameters['window']} tokens"
    return {"eager": "eager", "dense": "sparsify, dense"}[record["method"]]


def _cell(record: Found | None) -> str:
    if record is None:
        return "–"
    if "error" in record:
        return failure(record["error"])
    value = f"{record['nll']:.4f}" if "nll" in record else f"{record['right']}/{record['asked']}"
    return value if record["density"] == 1 else f"{value} · {record['density']:.1%}"


def worst(method: list[Found], exact: list[Found]) -> str:
    """The task of which the method loses the largest share of what an exact one answers, and that share."""
    right = {record["task"]: record["right"] for record in exact if record.get("right")}
    lost = {r["task"]: 1 - r["right"] / right[r["task"]] for r in method if "right" in r and r["task"] in right}
    if not lost:
        return "–"
    task = max(lost, key=lost.__getitem__)
    return f"{task}: {lost[task]:+.1%}" if lost[task] > 0 else "none"


def table(found: Iterable[Found]) -> str:
    """Questions right, or NLL in nats a token of text, and density: one row a method, one column a task, one table a length, device and
    number of prompts."""
    parts = []
    same = lambda r: (r["length"], r["model_sha256"], r["text_sha256"], r["dtype"], r["machine"]["gpu"] or "CPU", *r["seeds"])
    for group in groups(latest(found, CodeAnswers), same):
        tasks = list(dict.fromkeys(record["task"] for record in group))
        methods: dict[str, list[Found]] = {}
        for record in group:
            methods.setdefault(_method(record), []).append(record)
        rows = []
        for name, mine in methods.items():
            by_task = {record["task"]: record for record in mine}
            exact = methods.get("eager") or methods.get("sparsify, dense", [])
            rows.append([name, *(_cell(by_task.get(task)) for task in tasks), worst(mine, exact)])
        first = group[0]
        prompts = first["seeds"][1] - first["seeds"][0]
        head = (
            f"### {first['model']} ({first['dtype']}), {size(first['length'])} tokens, {prompts} prompts of each task\n\n"
            "Questions right of those asked, or NLL of text in nats a token · density over causal blocks (sink_window: tokens). "
            f"The last column: the task that loses most of what exact attention answers. {conditions(group)} "
            f"Model `{first['model_sha256'][:12]}`, text `{first['text_sha256'][:12]}`."
        )
        parts.append(head + "\n\n" + markdown(["method", *tasks, "lost at worst"], rows))
    return "\n\n".join(parts)


def trained() -> str:
    """docs/models.md's table: what the bundled model answered when its training was over, by task and length."""
    report = json.loads((MODEL / "report.json").read_text())
    lengths = sorted(report["answers"], key=int)
    tasks = list(dict.fromkeys(task for length in lengths for task in report["answers"][length]))
    rows = [[task, *("/".join(map(str, report["answers"][length][task])) for length in lengths)] for task in tasks]
    rows.append(["NLL, nats a token", *(f"{report['nll'][length]:.3f}" for length in lengths)])
    return markdown(["", *(f"{size(int(length))} tokens" for length in lengths)], rows)


BENCHMARKS = (
    Benchmark(
        name="code_answers",
        place=3,
        measures="the bundled model of word pieces: RULER's needles, facts in several wordings, chains of variables and NLL by method",
        module="benchmarks.answers.run_code_model",
        records=(CodeAnswers,),
        title="Answers of a model of word pieces",
        table=table,
    ),
    Benchmark(
        name="train_code_model",
        place=91,
        measures="trains a model of word pieces, GQA 4:1, on the code and documentation of installed packages",
        module="benchmarks.answers.train_code_model",
    ),
)
