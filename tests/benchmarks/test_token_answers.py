"""The benchmark of answers from few tokens: what it runs on a tiny model, and the table of its records."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from benchmarks.answers import tokens, tokens_report
from benchmarks.lib import records
from tests.support.tiny_models import build


@pytest.mark.slow
def test_every_method_leaves_a_record(tmp_path: Path) -> None:
    torch._dynamo.reset()
    build("llama", layers=4, vocab_size=256, max_position_embeddings=2048).save_pretrained(tmp_path / "model")
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
        "ffn_skip",
        "--bypassed",
        "1",
        "--shares",
        "0.25",
        "--layers",
        "1",
        "--keeps",
        "256",
        "--heads",
        "all",
        "found",
    ]
    command += ["--chunk", "512", "--questions", "2", "--batch", "2", "--needles", "4", "--asks", "2"]
    assert tokens.main(command) == 0
    found = list(records.read([out]))
    assert [record["method"] for record in found] == [
        "eager",
        "skip_layers",
        "ffn_skip",
        "ffn_skip",
        "narrow",
        "narrow",
        "prompt",
        "prompt",
        "retrieve",
        "retrieve",
    ]
    for record in found:
        assert record["asked"] == 2 and ("later_asked" in record) == (record["method"] in ("eager", "narrow"))
    assert {len(record["parameters"]["heads"]) for record in found if "held" in record["parameters"]} <= {1, 2, 3, 4}
    table = tokens_report.table(found)
    assert "`sparsify.retrieve`, pieces of 512 | layer 1, heads " in table and "| layer 1, all heads | 256 | 0 of 2 [" in table
    assert "| bypass layers while answering (`skip_layers`) | layer 1 | all | 0 of 2 [" in table
    assert "answering (`ffn_skip`) | schedule, 25% of the blocks | all | 0 of 2 [" in table
    assert "| go on behind the layer | layer 1, all heads | 256 | 0 of 2 [0%, 66%] / 0 of 2 |" in table


def found(
    method: str, length: int, right: int, later: int | None = None, listed: int | None = None, **parameters: object
) -> dict[str, Any]:
    record = {"benchmark": "token_answers", "time": "", "machine": {"gpu": "H"}, "model": "m", "model_sha256": "a", "text_sha256": "b"}
    record |= {
        "needles": 4,
        "dtype": "bfloat16",
        "method": method,
        "parameters": parameters,
        "length": length,
        "listed": listed,
        "layers": 8,
    }
    record |= {"right": right, "asked": 48, "interval": [0.0, 1.0]}
    return record | ({} if later is None else {"later_right": later, "later_asked": 96})


def test_the_earliest_layer_is_that_which_loses_one_answer_in_48() -> None:
    dense = [found("eager", 2048, 47, 90), found("eager", 4096, 40, 80), found("eager", 2048, 30, 60, listed=3)]
    chosen = [
        found("narrow", 2048, right, later, layer=layer, keep=256, heads="all")
        for layer, right, later in [(2, 45, 88), (3, 46, 87), (4, 47, 88)]
    ]
    chosen += [found("narrow", 4096, right, 0, layer=layer, keep=256, heads="all") for layer, right in [(2, 1), (3, 38)]]
    chosen += [found("prompt", 2048, right, layer=layer, keep=256, heads=[layer], held=0.5) for layer, right in [(2, 46), (3, 48)]]
    chosen += [found("narrow", 2048, right, 60, 3, layer=layer, keep=256, heads="all") for layer, right in [(2, 28), (3, 29)]]
    chosen += [found("prompt", 2048, 48, layer=1, keep=64, heads=[1])]  # named by hand, and one layer alone: no earliest one
    table = tokens_report.table([*dense, *chosen])
    assert "The earliest layer of 8, from 0, whose choice loses at most one in 48" in table
    assert "| go on behind the layer | all heads | 256 | 3 / 2 | none / none |" in table
    assert '| read anew (`mode = "prompt"`) | heads that were found | 256 | 2 | – |' in table
    assert "| go on behind the layer, all asked | all heads | 256 | 3 / 2 | – |" in table
    assert "| go on behind the layer, all asked | layer 2, all heads | 256 | 28 of 48 [0%, 100%] / 60 of 96 | – |" in table
    earliest = table.split("| tokens | chosen by | kept |")[1].split("| tokens | chosen by, or left out |")[0]
    assert "| 64 |" not in earliest
