"""`sparsify bench`: what it measures, prints and writes, and how it ends."""

from __future__ import annotations

import json

import pytest
import torch

from sparsify.commands.bench import command, prefill, variants, whole_call
from sparsify.commands.bench.registry import Subject
from sparsify.commands.exit_codes import DIFFERS, DONE, FAILED
from sparsify.commands.main import main
from tests.support.tiny_models import build

PLAIN = ["-o", "lower=eager", "-o", "min_length=0"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    where = tmp_path_factory.mktemp("model")
    build("llama").save_pretrained(where)
    return where


def bench(folder, *words):
    return main(["bench", str(folder), "--lengths", "24,48", "--tokens", "3", "--repeats", "1", *PLAIN, *words])


@pytest.mark.slow
def test_records_tables_and_plots(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert bench(folder, "--variants", "eager", "sparsify", "--out", "found") == DONE
    printed = capsys.readouterr().out
    lines = [json.loads(line) for line in (tmp_path / "found" / "results.jsonl").read_text().splitlines()]
    cells = [(one["benchmark"], one["variant"], one["length"]) for one in lines]
    assert cells == [(name, way, n) for name in ("prefill", "whole_call") for way in ("eager", "sparsify") for n in (24, 48)]
    assert all(one["ms"] > 0 and one["same_token"] and one["logits_error"] < 1e-3 for one in lines if one["benchmark"] == "prefill")
    assert all(one["whole_s"] > 0 and one["prompt_s"] > 0 and one["same_tokens"] == 3 for one in lines if one["benchmark"] == "whole_call")
    assert [one.get("density") is None for one in lines] == [True, True, False, False] * 2  # blocks were chosen, and counted
    assert (tmp_path / "found" / "report.md").read_text() == printed
    assert printed.count("| 48 | sparsify |") == 2
    assert {path.name for path in (tmp_path / "found").iterdir()} == {"results.jsonl", "report.md", "prefill.png", "whole_call.png"}
    assert [path.name for path in tmp_path.iterdir()] == ["found"]


def test_json_and_one_benchmark(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert bench(folder, "--variants", "eager", "--only", "prefill", "--json") == DONE
    assert [(one["benchmark"], one["length"]) for one in json.loads(capsys.readouterr().out)] == [("prefill", 24), ("prefill", 48)]
    assert not list(tmp_path.iterdir()), "nothing is written unless a folder is named"


def test_a_variant_that_fails_has_its_reason_and_the_others_their_numbers(folder, capsys, monkeypatch):
    real = prefill.measure

    def measure(model, ids, *others):
        if model._compiled_call_impl is not None and ids.shape[1] == 48:
            raise RuntimeError("no room\nat all")
        return real(model, ids, *others)

    monkeypatch.setattr(prefill, "measure", measure)
    monkeypatch.setattr(variants.torch, "compile", lambda call, **_: call)
    assert bench(folder, "--variants", "eager", "inductor", "--only", "prefill") == DIFFERS
    rows = [line for line in capsys.readouterr().out.splitlines() if "Inductor" in line]
    assert rows[0].startswith("| 24 | Inductor |") and "failed" not in rows[0]
    assert rows[1].startswith("| 48 | Inductor | failed: RuntimeError: no room |")


def test_the_model_is_left_as_it_was(folder):
    model = build("llama").eval()
    before = dict(model.__dict__)
    ids = torch.arange(24)[None]
    subject = Subject(
        model=model, name="x", ids=ids, lengths=(24,), tokens=2, variants=("sparsify",), options={"lower": "eager"}, repeats=1
    )
    with variants.compiled(subject, "sparsify"):
        assert model.__dict__.keys() != before.keys() or model._compiled_call_impl is not None or "generate" in model.__dict__
    assert model._compiled_call_impl is None and model.__dict__.keys() - {"_compiled_call_impl"} == before.keys() - {"_compiled_call_impl"}


def test_wrong_words(folder, tmp_path, capsys):
    text = tmp_path / "prompt.txt"
    text.write_text("short")
    assert bench(folder, "--prompt", str(text)) == FAILED
    assert "the prompt has 5 tokens" in capsys.readouterr().err
    (tmp_path / "file").touch()
    assert bench(folder, "--out", str(tmp_path / "file")) == FAILED
    assert "--out" in capsys.readouterr().err
    assert main(["bench", str(folder), "--lengths", "1M"]) == FAILED  # more than the model has positions


def test_it_names_what_there_is():
    assert tuple(one.name for one in command.benchmarks()) == command.NAMES
    assert tuple(variants.VARIANTS) == command.VARIANTS


def test_bars_of_calls():
    cells = {
        "sparsify": {"whole_s": 1.0, "prompt_s": 0.5, "density": 0.25},
        "eager": {"whole_s": 2.0, "prompt_s": 1.0},
        "inductor": {"error": "x"},
    }
    common = {"benchmark": "whole_call", "time": "1", "machine": {"gpu": None}, "model": "m", "length": 64, "tokens": 4}
    lines = [common | {"variant": way} | more for way, more in cells.items()]
    figure = whole_call.plot(lines)
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert labels == ["eager", "sparsify,\n25% of the blocks"]
    assert whole_call.plot([line for line in lines if "error" in line]) is None
