"""The sweep itself: what it says of types that are known, of a rewriting that is wrong, and what it does a second time."""

from __future__ import annotations

import json
import os
import time

import pytest
import torch
import torch.nn.functional as F

from benchmarks.lib import records
from benchmarks.test_runs import sweep_report
from sparsify.passes.dense import Dense
from sparsify.rewriting.validate import Outcome, Validator
from tests.sweep import models
from tests.sweep.check import Finding, check, reason
from tests.sweep.isolated import Limits, Task, run
from tests.sweep.journal import NOT_BUILT, Entry, Journal, Subject, open_scenarios, verdict
from tests.sweep.lists import LISTS
from tests.sweep.oracle import SINKS, WINDOW, SinkWindow
from tests.sweep.recorded import RECORDS, record, take
from tests.sweep.run import ended, keep
from tests.sweep.scenarios import Scenario
from tests.sweep.seen import Seen

LLAMA = Subject("causal", "llama", "sdpa")


def prefill(model_type):
    built = models.build("causal", model_type, None)
    return built, next(one for one in built.scenarios if one.name == "prefill")


def test_a_type_is_checked_whole_and_against_the_oracle():
    built, scenario = prefill("llama")
    found = check(built.model, scenario, sparse=True)
    assert (found.verdict, found.sites, found.rewritten, found.graphs, found.sparse) == ("whole", 2, 2, 1, "agrees")
    assert [one.name for one in built.scenarios] == ["prefill", "left", "chunks"] and not built.part


@pytest.mark.parametrize("model_type", ["qwen2_vl", "gemma3", "llava", "idefics3"])
def test_images_are_shown_where_a_model_takes_them(model_type):
    """Patches with their grid, an image, an image and sizes, tiles: as many tokens as features, or the model refuses them."""
    built = models.build("multimodal", model_type, None)
    assert built.sees and not built.part


def test_a_draft_reads_keys_that_it_is_given():
    """One row over as many keys as the text has tokens, of each kind of layer."""
    built, scenario = prefill("gemma4_assistant")
    found = check(built.model, scenario)
    assert (found.verdict, found.sites, found.rewritten) == ("whole", 2, 2)
    assert scenario.call(built.model).shape[:2] == (1, 1)


def test_what_is_no_attention_is_none():
    rows = torch.linspace(-1, 1, 40).reshape(1, 10, 4)
    assert check(torch.nn.Linear(4, 4), Scenario("prefill", lambda model: model(rows))).verdict == "none"


@pytest.mark.parametrize("validated", [True, False])
def test_a_wrong_rewriting_is_found(monkeypatch, validated):
    """By what is run of each site before it is rewritten, and without that by the numbers."""

    def rewrite(self, editor, site):
        editor.move_to(site)
        scale = {"scale": 2 * site.scale, "enable_gqa": True}
        editor.replace(site, editor.call(F.scaled_dot_product_attention, site.query, site.key, site.value, is_causal=True, **scale))

    monkeypatch.setattr(Dense, "rewrite", rewrite)
    if not validated:
        monkeypatch.setattr(Validator, "check", lambda *given: Outcome("agrees"))
    built, scenario = prefill("llama")
    found = check(built.model, scenario)
    assert found.verdict == "wrong"
    assert (found.error > 1e-2) is not validated


@pytest.mark.unforeseen
def test_an_error_of_ours_is_no_failure_of_the_model(monkeypatch):
    def rewrite(self, editor, site):
        raise AttributeError("ours")

    monkeypatch.setattr(Dense, "rewrite", rewrite)
    built, scenario = prefill("llama")
    found = check(built.model, scenario)
    why = "cannot be run: a form that is not read: AttributeError: ours"
    assert (found.verdict, found.note, found.rewritten, found.reasons) == ("crashed", why, 0, {why: 2})


def test_reasons_of_different_nodes_are_one():
    text = "dense: the mask could not be read: {}: scatter is not read"
    assert reason(text.format("scatter")) == reason(text.format("scatter_1")) == "the mask could not be read: scatter is not read"
    assert reason("dense: the mask could not be read: the mask is an input of the graph").endswith(
        "read: the mask is an input of the graph"
    )


def test_a_finished_type_is_skipped_and_a_part_is_finished(tmp_path):
    journal, planned = Journal(tmp_path / "sweep.jsonl"), ["prefill", "left"]
    assert open_scenarios(journal.current().get(LLAMA, {})) is None
    journal.write(Entry(LLAMA, "prefill", planned, Finding("whole", 2, 2)))
    assert open_scenarios(journal.current()[LLAMA]) == ["left"]
    journal.write(Entry(LLAMA, "left", planned, Finding("partly", 2, 1, reasons={"why": 1})))
    entries = journal.current()[LLAMA]
    assert open_scenarios(entries) == [] and open_scenarios(entries, ["partly"]) == ["left"]
    assert entries["left"].finding == Finding("partly", 2, 1, reasons={"why": 1})
    other = json.loads(journal.path.read_text().splitlines()[0]) | {"sources": "other"}
    (tmp_path / "other.jsonl").write_text(json.dumps(other) + "\n")
    assert not Journal(tmp_path / "other.jsonl").current()


def test_records_say_what_was_not_run(tmp_path):
    path, entry = tmp_path / "records.jsonl", Entry(LLAMA, "prefill", ["prefill"], Finding("whole", 2, 2, graphs=1, error=1.23e-7))
    absent = Subject("causal", "gemma3n", "sdpa")
    known = {LLAMA: {"prefill": entry}, absent: {"": Entry(absent, "", [], Finding(NOT_BUILT, note="timm"))}}
    assert record(known, path) == 0
    first, second = records.read([path])
    assert (first["verdict"], first["found"]) == (
        "whole", {"prefill": {"verdict": "whole", "sites": 2, "rewritten": 2, "graphs": 1, "error": 1.2e-7}},
    )  # fmt: skip
    assert (second["verdict"], second["note"], second["found"]) == (NOT_BUILT, "timm", {})
    unfinished = {LLAMA: {"prefill": Entry(LLAMA, "prefill", ["prefill", "left"], Finding("whole"))}}
    assert record(unfinished, path) == 1
    *_, last = records.read([path])
    assert last["unrun"] == ["left"] and "1 causal language models (sdpa) without left" in sweep_report.part([last])


def test_records_of_another_machine_are_taken_once(tmp_path):
    path, brought = tmp_path / "records.jsonl", tmp_path / "brought.jsonl"
    record({LLAMA: {"prefill": Entry(LLAMA, "prefill", ["prefill"], Finding("whole", 2, 2))}}, brought)
    line = json.loads(brought.read_text())
    line["machine"] |= {"commit": "0" * 40, "torch": "other"}
    brought.write_text(json.dumps(line) + "\n")
    for _ in range(2):
        assert take(brought, path) == 0
    assert list(records.read([path])) == [line]
    line["machine"]["commit"] = None
    brought.write_text(json.dumps(line) + "\n")
    with pytest.raises(ValueError, match="no record of a sweep with its commit"):
        take(brought, path)


def test_a_finished_type_is_recorded_before_the_end(tmp_path):
    """Elsewhere than in build/sweep, whose machine may be taken away; a type that is not finished, when it is."""
    journal, planned = Journal(tmp_path / "journal.jsonl"), ["prefill", "left"]
    entry = lambda name: Entry(LLAMA, name, planned, Finding("whole", 2, 2))
    keep(Task(LLAMA, lambda send: None, sent=[entry("prefill")], end="stopped"), {}, journal)
    assert not (tmp_path / RECORDS).exists()
    found = keep(Task(LLAMA, lambda send: None, sent=[entry("left")], end="done"), journal.current()[LLAMA], journal)
    (line,) = records.read([tmp_path / RECORDS])
    assert [*found] == ["left"] and [*line["found"]] == planned and "unrun" not in line


def test_all_stop_together():
    tasks = [Task(name, lambda send: (send(3), time.sleep(60))) for name in ("first", "second", "third")]
    ends = list(run(tasks, 2, Limits(stop=time.monotonic() + 1.5)))
    assert [(task.name, task.end, task.sent) for task in ends] == [("first", "stopped", [3]), ("second", "stopped", [3])]
    assert not ended(Task(LLAMA, tasks[0].work, end="stopped"), {})


@pytest.mark.parametrize(
    ("found", "whole"),
    [
        (["whole", "whole"], "whole"),
        (["whole", "fails"], "whole"),
        (["whole", "refused"], "partly"),
        (["refused", "wrong", "crashed"], "wrong"),
        (["fails"], "fails"),
        (["none", "none"], "none"),
    ],
)
def test_the_verdict_of_a_type(found, whole):
    assert verdict(Finding(one) for one in found) == whole


def test_processes_that_hang_or_die_end_alone():
    def hang(send):
        send(Entry(LLAMA, "prefill", ["prefill", "left"], Finding("whole")))
        while True:
            pass

    def die(send):
        os.kill(os.getpid(), 9)

    tasks = [Task("hangs", hang), Task("waits", lambda send: time.sleep(60)), Task("dies", die), Task("works", lambda send: send(3))]
    ends = {task.name: task for task in run(tasks, 4, Limits(cpu_s=1, wall_s=3.0))}
    assert {name: task.end for name, task in ends.items()} == {"hangs": "late", "waits": "late", "dies": "died", "works": "done"}
    assert ends["works"].sent == [3]
    assert [(e.scenario, e.finding.verdict) for e in ended(ends["hangs"], {})] == [("prefill", "whole"), ("left", "late")]


def test_the_oracle_masks_what_is_plainly_causal():
    query = torch.randn(1, 2, 50, 8, generator=torch.Generator().manual_seed(0))
    causal = torch.ones(50, 50, dtype=torch.bool).tril()
    kept = causal & ((torch.arange(50) < SINKS) | (torch.arange(50)[:, None] - torch.arange(50) < WINDOW))
    with SinkWindow() as oracle:
        plain = F.scaled_dot_product_attention(query, query, query, is_causal=True)
        written = (query @ query.mT * 8**-0.5).masked_fill(~causal, -torch.inf).softmax(-1) @ query
        windowed = F.scaled_dot_product_attention(query, query, query, kept)
        scores = (query @ query.mT * 8**-0.5).masked_fill(~causal, -torch.inf)
        denominator = scores.logsumexp(-1)
    assert oracle.changed == 2
    torch.testing.assert_close(denominator, scores.masked_fill(~kept, -torch.inf).logsumexp(-1))
    want = F.scaled_dot_product_attention(query, query, query, kept)
    for got in (plain, written, windowed):
        torch.testing.assert_close(got, want)


def test_the_tables_say_what_was_recorded(tmp_path):
    path, why = tmp_path / "records.jsonl", "the mask is an input"
    trained = Subject("causal", "deepseek_v32", "sdpa")
    known = {
        LLAMA: {"prefill": Entry(LLAMA, "prefill", ["prefill"], Finding("partly", 2, 1, reasons={why: 1}, sparse="agrees"))},
        trained: {"prefill": Entry(trained, "prefill", ["prefill"], Finding("refused", 2, 0, reasons={"chosen": 2}), trained=True)},
    }
    assert record(known, path) == 0
    text = sweep_report.part(list(records.read([path])))
    assert "| causal language models | sdpa | 1 | – | 1 | – | – | – | – | – | 1 |" in text
    assert "| causal language models, trained sparsity | sdpa | 1 | – | – | 1 | – | – | – | – | – |" in text
    assert f"| {why} | 1 | llama |" in text and "| chosen | 1 | deepseek_v32 (trained sparsity) |" in text
    assert list(sweep_report.TITLES) == list(LISTS)


def _one(model, release, verdict, time="2026-01-01T00:00:00+00:00", **more):
    machine = {"torch": "2.11.0", "transformers": release, "commit": "0" * 40, "gpu": None}
    same = {"benchmark": "sweep", "task": "causal", "attention": "sdpa", "trained": False, "found": {}}
    return {**same, "time": time, "model": model, "verdict": verdict, "machine": machine, **more}


def test_releases_of_transformers_have_tables_of_their_own():
    """A later run of an older release replaces nothing of the newest, and versions are in the order of their numbers."""
    refused = {"found": {"prefill": {"verdict": "refused", "reasons": {"not read": 2}}}}
    newest = [_one("llama", "5.24.0", "whole"), _one("gemma", "5.24.0", "whole")]
    older = [
        _one("llama", "5.9.0", "partly"),
        _one("llama", "5.9.0", "refused", "2026-02-01T00:00:00+00:00", **refused),
        _one("old", "5.9.0", "whole"),
    ]
    text = sweep_report.part(older + newest)
    first, second = text.split("### transformers 5.9.0")
    assert first.startswith("### transformers 5.24.0\n")
    assert "| causal language models | sdpa | 2 | 2 | – | – | – | – | – | – | – |" in first and "not read" not in first
    assert "| causal language models | sdpa | 2 | 1 | – | 1 | – | – | – | – | – |" in second
    assert "| llama | sdpa | whole | refused | not read |" in second and "| old | sdpa | not listed | whole |  |" in second
    assert "gemma" not in second and "transformers 5.9.0;" in second
    same = sweep_report.part([*newest, _one("llama", "5.9.0", "whole")])
    assert same.count("Every type that was run has the verdict that it has under 5.24.0.") == 1


def test_reasons_that_differ_by_a_name_are_one_row():
    written = "the mask could not be read: {} is written while the mask is made"
    twice = written.format("mask_2") + ", and read by its values: mask_1 is written while the mask is made"
    why = lambda *reasons: {"found": {"prefill": {"verdict": "refused", "reasons": dict.fromkeys(reasons, 1)}}}
    late = {"trained": True, "found": {"chunks": {"verdict": "late", "note": "after 151 s"}}}
    also = {"trained": True, "found": {"chunks": {"verdict": "late", "note": "after 152 s"}}}
    text = sweep_report.part(
        [
            _one("a", "5.24.0", "refused", **why(written.format("getitem"))),
            _one("b", "5.24.0", "refused", **why(written.format("bias"), twice)),
            _one("c", "5.24.0", "late", **late),
            _one("d", "5.24.0", "late", **also),
        ]
    )
    refusals, failures = text.split("Runs that failed:")
    assert f"| {written.format('a tensor')} | 2 | a, b |" in refusals and refusals.count("is written") == 1
    assert "| late: out of processor time | 2 | c, d (trained sparsity) |" in failures and "late" not in refusals


def test_attentions_are_counted_however_they_are_written():
    scores = torch.linspace(-1, 1, 800).reshape(2, 20, 20)
    with Seen() as seen:
        (scores - scores.logsumexp(-1, keepdim=True)).exp()
    assert seen.count == 1
    with seen:
        scores.softmax(-1)
        scores[:, :4].softmax(-1)  # too few rows: it chooses among something else
        F.scaled_dot_product_attention(scores, scores, scores)
    assert seen.count == 2
