"""Every decoder of transformers, tiny: what of its attention is rewritten, and whether that equals eager execution.

    python -m tests.sweep.run                      every list, with the attention that each type takes by itself
    python -m tests.sweep.run causal --only llama,gemma3 --attention eager
    python -m tests.sweep.run --list               what there is, and what is known of it

What was found is kept in build/sweep, and skipped by the next run of the same sources; `--record` puts it into benchmarks/results.
On another machine, which has its own releases and gives a few minutes at a time:

    python -m tests.sweep.run --attention sdpa eager --jobs 30 --minutes 9 --state FOLDER      as often as it takes
    python -m tests.sweep.run --import FOLDER                                                  where the results are kept
"""

from __future__ import annotations

import argparse
import gc
import logging
import math
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers

from benchmarks.lib.records import append
from tests.sweep import check, models
from tests.sweep.isolated import Limits, Task, run
from tests.sweep.journal import FILE, FOLDER, NOT_BUILT, Entry, Journal, Subject, open_scenarios, summary, verdict
from tests.sweep.lists import LISTS, weight
from tests.sweep.recorded import RECORDS, line, record, take

Known = dict[Subject, dict[str, Entry]]
ATTENTIONS = ("sdpa", "eager")


def look(subject: Subject, scenarios: list[str] | None, send: Callable[[Entry], None]) -> None:
    """Builds the type and checks its scenarios, all if None; sends an entry for each. "sdpa" is whatever a type takes by itself."""
    torch.manual_seed(0)
    try:
        built = models.build(subject.which, subject.model_type, None if subject.attention == "sdpa" else subject.attention)
    except models.NotBuilt as error:
        send(Entry(subject, "", [], check.Finding(NOT_BUILT, note=str(error)[:600])))
        return
    planned = [scenario.name for scenario in built.scenarios]
    for scenario in built.scenarios:
        if scenarios is None or scenario.name in scenarios:
            found = check.check(built.model, scenario, sparse=scenario.name == "prefill")
            send(Entry(subject, scenario.name, planned, found, built.part, built.sees, models.trains_sparsity(built.model.config)))


def ended(task: Task, before: dict[str, Entry]) -> list[Entry]:
    """A task's entries, and one more that says so where it was killed or died."""
    entries: list[Entry] = list(task.sent)
    if task.end in ("done", "stopped"):
        return entries
    known = {**before, **{entry.scenario: entry for entry in entries}}
    planned = next((entry.planned for entry in known.values()), [])
    rest = [name for name in planned if name not in known]
    like = entries[-1] if entries else Entry(task.name, "", [], check.Finding(""))
    finding = check.Finding(task.end, note=f"after {task.seconds:.0f} s")
    return entries + [Entry(task.name, name, planned, finding, like.part, like.sees, like.trained) for name in rest[:1] or [""]]


def keep(task: Task, before: dict[str, Entry], journal: Journal) -> dict[str, Entry]:
    """Writes what a task found into the journal and returns it, by scenario.

    Outside of build/sweep a finished type becomes a record at once: the machine may be taken away before the end.
    """
    found = {entry.scenario: entry for entry in ended(task, before)}
    for entry in found.values():
        journal.write(entry)
    folder, entries = journal.path.parent, journal.current().get(task.name)
    if found and folder != FOLDER and entries and not open_scenarios(entries):
        append(folder / RECORDS, line(task.name, entries))
    return found


def _tasks(wanted: list[Subject], known: Known, again: list[str] | None, asked: list[str] | None) -> Iterator[Task]:
    """again: as in `open_scenarios`, empty for everything. asked: names of scenarios, None for all."""
    for subject in wanted:
        scenarios = None if again == [] else open_scenarios(known.get(subject, {}), again or ())
        if asked is not None:
            scenarios = asked if scenarios is None else [name for name in scenarios if name in asked]
        if scenarios is None or scenarios:
            yield Task(subject, lambda send, subject=subject, scenarios=scenarios: look(subject, scenarios, send))


def _warm() -> None:
    """Imports and compiles once what each type needs, before processes are forked."""
    look(Subject("causal", "llama", "sdpa"), ["prefill"], lambda entry: None)
    torch._dynamo.reset()
    gc.collect()
    gc.freeze()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.sweep.run", description=__doc__.splitlines()[0])
    parser.add_argument("lists", nargs="*", choices=[*LISTS, []], help=f"of {', '.join(LISTS)} (default: all)")
    parser.add_argument("--only", help="model types, with commas")
    parser.add_argument("--attention", nargs="+", choices=ATTENTIONS, default=["sdpa"], help="eager: written-out attention (default: sdpa)")
    parser.add_argument("--scenarios", nargs="+", help="of prefill, left, right, chunks (default: all)")
    parser.add_argument("--jobs", type=int, default=1, help="processes (default: %(default)s)")
    parser.add_argument("--limit", type=int, default=Limits.cpu_s, help="seconds of processor time for one type (default: %(default)s)")
    parser.add_argument("--memory", type=float, default=Limits.memory_gib, help="GiB for one type (default: %(default)s)")
    parser.add_argument("--minutes", type=float, help="of the whole: then it stops, and a later run goes on (default: none)")
    parser.add_argument("--state", type=Path, default=FOLDER, help="folder of what was found (default: build/sweep)")
    parser.add_argument("--again", nargs="*", metavar="VERDICT", help="check again, what had one of these verdicts or everything")
    parser.add_argument("--list", action="store_true", help="check nothing; one line per type")
    parser.add_argument("--record", action="store_true", help="check nothing; put what is known into benchmarks/results/sweep.jsonl")
    parser.add_argument("--import", dest="brought", type=Path, metavar="FOLDER", help="check nothing; record what another machine found")
    given = parser.parse_args(arguments)
    if given.brought:
        return take(given.brought / RECORDS)
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # a process that is forked could not use one
    begin = time.monotonic()
    only = given.only.split(",") if given.only else None
    wanted = [Subject(which, kind, way) for way in given.attention for which in given.lists or LISTS for kind in LISTS[which].types()]
    wanted = [subject for subject in wanted if only is None or subject.model_type in only]
    wanted.sort(key=lambda subject: -weight(subject.model_type))  # the longest first, or all would wait for one in the end
    journal = Journal(given.state / FILE)
    if given.list or given.record:
        known = {subject: entries for subject, entries in journal.current().items() if subject in wanted}
        for subject in wanted if given.list else ():
            print(*subject, summary(known[subject]) if subject in known else "not checked", sep="  ")
        return record(known) if given.record else 0
    transformers.logging.set_verbosity_error()
    logging.getLogger("torch._dynamo").setLevel(logging.CRITICAL)
    torch.set_num_threads(1)
    counts: Counter[str] = Counter()
    known = journal.current()
    tasks = list(_tasks(wanted, known, given.again, given.scenarios))
    print(f"{len(tasks)} types to check, {len(wanted) - len(tasks)} known", flush=True)
    if tasks:
        _warm()
    stop = begin + 60 * given.minutes if given.minutes else math.inf
    left = len(tasks)
    for task in run(tasks, given.jobs, Limits(given.limit, memory_gib=given.memory, stop=stop)):
        found = keep(task, known.get(task.name, {}), journal)
        if task.end == "stopped":
            continue
        left -= 1
        counts[verdict(entry.finding for entry in found.values())] += 1
        print(f"{task.name.which:10s} {task.name.model_type:28s} {task.seconds:5.1f} s  {summary(found)}"[:400], flush=True)
    print(dict(counts), f"{left} types left" if left else "")
    return int(any(counts[bad] for bad in ("wrong", "crashed", "fell back")))


if __name__ == "__main__":
    sys.exit(main())
