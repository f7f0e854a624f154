"""Trained heads of locret: what they learn from, that they learn, and questions that are asked after the text was read."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

import tests.support.cache_reference as reference
from benchmarks.cache import eviction, train_retaining_heads
from benchmarks.cache.asking import ASKED
from benchmarks.lib.needles import stdlib_text

SIZES = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=256, num_hidden_layers=2, max_position_embeddings=4096, **SIZES)).eval()


@torch.no_grad()
def test_what_is_observed_are_the_largest_logits_of_later_queries(model):
    ids, first, shown = torch.arange(3, 63)[None], 50, {}

    def note(layer, query, key, scale):
        shown[layer] = query @ key.transpose(-1, -2) * scale
        return shown[layer].masked_fill(torch.ones(60, 60, dtype=torch.bool).triu(1), -torch.inf)

    reference.run(model, ids, note)
    for layer, (states, targets) in enumerate(train_retaining_heads.observed(model, ids, first)):
        assert states.shape == (first, 64)
        want = shown[layer][0, :, first:, :first].unflatten(0, (2, 2)).amax((1, 2)).T
        torch.testing.assert_close(targets, want, rtol=1e-4, atol=1e-5)


def test_a_head_learns(model):
    torch.manual_seed(0)
    states = torch.randn(3000, 12)
    targets = torch.stack((states[:, 0].abs() * 3 + 5, states[:, 1] * states[:, 2]), 1)
    head, losses = train_retaining_heads.train((states[:2500], targets[:2500]), (states[2500:], targets[2500:]), 32, 300)
    first, *_, last = losses
    assert last < 0.5 * first
    assert head(states).shape == targets.shape


def test_from_training_to_answers(model, tmp_path):
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "text").write_bytes(stdlib_text(40_000))
    where = ["--model", str(tmp_path / "model"), "--text", str(tmp_path / "text"), "--device", "cpu"]
    heads, out = tmp_path / "heads.safetensors", tmp_path / "eviction.jsonl"
    short = ["--length", "2048", "--prompts", "1", "--steps", "5", "--hidden", "4"]
    train_retaining_heads.main([*where, *short, "--out", str(heads)])
    assert {name: list(weight.shape) for name, weight in load_file(heads).items()} == {
        f"layers.{n}.{name}": size for n in range(2) for name, size in (("w1", [4, 64]), ("w2", [2, 4]))
    }
    asked = ["--lengths", "2048", "--shares", "0.1", "--questions", "1", "--heads", str(heads), "--out", str(out)]
    assert eviction.main(["answers", *where, *asked, "--policies", "locret"]) == 0
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(r["policy"], r["asked"], r["questions"]) for r in records] == [("locret", asked, 16) for asked in ASKED]
    assert records[0]["heads_sha256"] and abs(records[1]["kept"] - 0.1) < 0.005
