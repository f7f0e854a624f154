"""The benchmark of answers from few tokens: what it runs on a tiny model, and the table of its records."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

from benchmarks.answers import tokens, tokens_report
from benchmarks.lib import records
from tests.support.tiny_models import build


@pytest.mark.slow
def test_every_method_leaves_a_record(tmp_path: Path) -> None:
    torch._dynamo.reset()
    build("llama", layers=3, vocab_size=256, max_position_embeddings=2048).save_pretrained(tmp_path / "model")
    text, out = tmp_path / "text", tmp_path / "token_answers.jsonl"
    text.write_bytes(bytes(range(97, 123)) * 200)
    command = ["--model", str(tmp_path / "model"), "--text", str(text), "--out", str(out), "--device", "cpu", "--lengths", "1024"]
    command += [
        "--methods",
        "eager",
        "narrow",
        "prompt",
        "retrieve",
        "skip_layers",
        "--bypassed",
        "1",
        "--layers",
        "1",
        "--keeps",
        "256",
        "--heads",
        "all",
        "0,2",
    ]
    command += ["--chunk", "512", "--questions", "2", "--needles", "4", "--asks", "2"]
    assert tokens.main(command) == 0
    found = list(records.read([out]))
    assert [record["method"] for record in found] == [
        "eager",
        "skip_layers",
        "narrow",
        "narrow",
        "prompt",
        "prompt",
        "retrieve",
        "retrieve",
    ]
    for record in found:
        assert record["asked"] == 2 and ("later_asked" in record) == (record["method"] in ("eager", "narrow"))
    table = tokens_report.table(found)
    assert table.count("\n| ") == 2 + len(found) and "`sparsify.retrieve`, pieces of 512 | layer 1, heads 0, 2 | 256 | 0 of 2 [" in table
    assert "| bypass layers while answering | layer 1 | all | 0 of 2 [" in table
    assert "| go on behind the layer | layer 1, all heads | 256 | 0 of 2 [0%, 66%] / 0 of 2 |" in table
