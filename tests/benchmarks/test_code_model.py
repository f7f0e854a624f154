"""The bundled model of word pieces: small, complete, it answers, and its benchmark counts what it answers."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM

from benchmarks.answers import CodeAnswers, code_report, run_code_model
from benchmarks.lib import code_model, recall
from benchmarks.lib.needles import stdlib_text

TEXT = stdlib_text(60_000).decode(errors="ignore")


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return code_model.load(torch.float32)


@pytest.fixture(scope="module")
def maker() -> recall.Maker:
    return code_model.maker(TEXT)


def test_it_is_small_and_of_the_shape_that_it_stands_for(model: LlamaForCausalLM) -> None:
    assert sum(path.stat().st_size for path in code_model.MODEL.iterdir()) <= 30_000_000
    config = model.config
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (8, 2, 128)
    assert config.max_position_embeddings >= 16384 and config.vocab_size == 8192
    report = json.loads((code_model.MODEL / "report.json").read_text())
    assert report["parameters"] == sum(p.numel() for p in model.parameters())
    assert report["loss_of_one_text"]["int8"] == pytest.approx(report["loss_of_one_text"]["trained"], abs=0.005)


@torch.no_grad()
def test_it_finds_a_number_among_code(model: LlamaForCausalLM) -> None:
    tokenizer = AutoTokenizer.from_pretrained(code_model.MODEL)
    fact = "\nOne of the special magic numbers for brave-river is: 4917306.\n"
    other = "\nOne of the special magic numbers for green-lamp is: 8250941.\n"
    ask = "\nWhat is the special magic number for brave-river mentioned in the provided text? The special magic number for brave-river "
    prompt = TEXT[:500] + fact + TEXT[500:900] + other + TEXT[900:1300] + ask + "mentioned in the provided text is"
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    answer = tokenizer(" 4917306", return_tensors="pt").input_ids
    guesses = model(torch.cat((ids, answer), 1), use_cache=False).logits[0].argmax(-1)
    assert tokenizer.decode(guesses[ids.shape[1] - 1 : -1]) == " 4917306"


@pytest.mark.parametrize("task", ["facts, remember", "magic, digits in needles"])
def test_it_answers_what_the_benchmark_asks(model: LlamaForCausalLM, maker: recall.Maker, task: str) -> None:
    cell = {"method": "eager", "parameters": {}, "options": None}
    found = run_code_model.measure(model, cell, maker, task, 320, range(1, 2))
    assert found["asked"] >= 2 and found["right"] == found["asked"]
    assert found["density"] == 1 and found["interval"][1] == 1


def test_a_wrong_model_answers_nothing_and_text_has_an_nll(model: LlamaForCausalLM, maker: recall.Maker) -> None:
    cell = {"method": "eager", "parameters": {}, "options": None}
    nll = run_code_model.measure(model, cell, maker, "text", 256, range(1))
    assert 0.5 < nll["nll"] < 4 and "right" not in nll

    class Deaf(torch.nn.Module):
        device = torch.device("cpu")

        def forward(self, ids: torch.Tensor, use_cache: bool) -> Any:
            return model(ids.flip(1), use_cache=use_cache)

    assert run_code_model.measure(Deaf(), cell, maker, "facts, remember", 256, range(2))["right"] == 0
    with pytest.raises(RuntimeError, match="not every layer was sparse"):
        run_code_model.measure(model, {**cell, "method": "xattention"}, maker, "text", 64, range(1))


@pytest.mark.slow
def test_blocks_that_are_chosen_are_counted(model: LlamaForCausalLM, maker: recall.Maker) -> None:
    cell = run_code_model.block_selection("max", 8, 0.6)
    compiled = code_model.load(torch.float32)
    compiled.compile(backend="sparsify", options={**cell["options"], "lower": "eager"}, dynamic=True)
    with torch.no_grad():
        found = run_code_model.measure(compiled, cell, maker, "facts, value", 512, range(1))
    assert 0 < found["density"] < 1 and found["asked"] > 0


def test_it_is_exported_for_transformers(tmp_path: Path, model: LlamaForCausalLM) -> None:
    assert code_model.main([str(tmp_path)]) == 0
    loaded = LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert torch.equal(loaded.model.layers[3].mlp.up_proj.weight, model.model.layers[3].mlp.up_proj.weight.bfloat16())
    assert AutoTokenizer.from_pretrained(tmp_path)("def f(12)").input_ids == code_model.maker(TEXT).tokenizer.encode("def f(12)").ids


def record(method: str, task: str, **values: Any) -> dict[str, Any]:
    parameters = {"pool": "row", "stride": 4, "threshold": 0.5} if method == "xattention" else {}
    facts = {"model": "code", "model_sha256": "a" * 64, "text_sha256": "b" * 64, "dtype": "bfloat16"}
    line = CodeAnswers(**facts, method=method, parameters=parameters, task=task, length=8192, seeds=[0, 2], density=0.05, **values)
    return {"benchmark": "code_answers", "time": "2026-01-01", "machine": {"gpu": "NVIDIA H200"}, **line.values()}


def test_the_table_names_the_worst_task() -> None:
    found = [
        record(method, task, right=right, asked=100)
        for method, task, right in (("eager", "one", 100), ("eager", "two", 50), ("xattention", "one", 99), ("xattention", "two", 45))
    ] + [record("eager", "text", nll=1.5), record("xattention", "text", nll=1.6)]
    last = code_report.table(found).splitlines()[-1]
    assert last.startswith("| row, stride 4, τ 0.5 | 99/100 · 5.0% | 45/100 · 5.0% | 1.6000 · 5.0% |")
    assert last.endswith("| two: +10.0% |")


def test_every_task_of_the_benchmark_is_made(maker: recall.Maker) -> None:
    tasks = recall.asked(maker, 512)
    assert set(run_code_model.TASKS) - {"text"} <= tasks.keys()
    for name, task in tasks.items():
        ids, codes = task(random.Random(0))
        assert len(ids) == 512 and recall.answers(codes), name
