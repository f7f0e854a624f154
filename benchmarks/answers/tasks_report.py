"""Scores by task and setting, and what each setting loses at worst: the table."""

from __future__ import annotations

from collections.abc import Iterable

from benchmarks.answers import TaskAnswers
from benchmarks.lib.registry import Benchmark
from sparsify.commands.bench.tables import Found, conditions, failure, groups, latest, markdown, size

_DENSE = "dense"


def table(found: Iterable[Found]) -> str:
    """One table a model, length and device: one row a setting, one column a task."""
    parts = []
    for group in groups(
        latest(found, TaskAnswers),
        lambda r: (r["model"], r["model_digest"], r.get("length") or 0, r["dtype"], r["chat"], r["machine"]["gpu"] or "CPU"),
    ):
        tasks = list(dict.fromkeys((record["task"], record["metric"]) for record in group))
        settings: dict[str, list[Found]] = {}
        for record in group:
            settings.setdefault(record["setting"], []).append(record)
        rows = []
        for name in sorted(settings, key=lambda name: (name != _DENSE, name)):
            by_task = {(record["task"], record["metric"]): record for record in settings[name]}
            rows.append([f"`{name}`", *(_cell(by_task.get(task)) for task in tasks), worst(settings[name])])
        first = group[0]
        length = "" if first.get("length") is None else f", {size(first['length'])} tokens"
        head = (
            f"### {first['model']} ({first['dtype']}){length}\n\n"
            "Mean score [95 % interval], or NLL of text in nats a token · density over causal blocks. The last column: the task that loses "
            f"most against dense attention on the same questions. {conditions(group)} Model `{first['model_digest'][:12]}`."
        )
        parts.append(head + "\n\n" + markdown(["setting", *(task for task, _ in tasks), "lost at worst"], rows))
    return "\n\n".join(parts)


def _cell(record: Found | None) -> str:
    if record is None:
        return "–"
    if "error" in record or "mean" not in record:
        return failure(record.get("error", "no scores"))
    density = "" if record.get("density") is None else f" · {record['density']:.1%}"
    if record["metric"] == "nll":
        return f"{record['mean']:.4f}{density}"
    low, high = record["interval"]
    return f"{record['mean']:.3f} [{low:.2f}, {high:.2f}]{density}"


def worst(found: Iterable[Found]) -> str:
    """The task of which a setting loses most, with the questions that it answers worse and better. NLL counts as none."""
    compared = [record for record in found if record.get("difference") is not None and record["metric"] != "nll"]
    if not compared:
        return "–"
    record = min(compared, key=lambda one: (one["difference"], one["difference_interval"][0]))
    return f"{record['task']}: {record['difference']:+.3f} ({record['lost']} worse, {record['gained']} better)"


BENCHMARKS = (
    Benchmark(
        name="task_answers",
        place=4,
        measures="RULER's tasks and NLL of any model by setting, as `sparsify eval` asks them",
        module="benchmarks.answers.tasks",
        records=(TaskAnswers,),
        title="Answers by task",
        table=table,
    ),
)
