"""The bundled model of bytes, and the script that trains it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from benchmarks.answers import train_demo_model as training
from benchmarks.lib import needles

MODEL = Path(__file__).parents[2] / "benchmarks" / "models" / "demo"
TEXT = torch.frombuffer(bytearray(needles.stdlib_text(200_000)), dtype=torch.uint8)


def test_training_forward_is_the_models_own() -> None:
    model = training.build(training.SMOKE).eval()
    ids = torch.randint(0, 256, (2, 70))
    with torch.no_grad():
        ours = training.forward(model, ids, training.rotary(model, 70, torch.float32, ids.device), torch.float32)
        theirs = model(ids, use_cache=False).logits
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    assert theirs.std() > 0.01


@pytest.mark.parametrize("tail", [False, True])
def test_batches_hold_facts_and_later_their_questions(tail: bool) -> None:
    torch.manual_seed(0)
    ids, answers, noise = training.batch_of(TEXT, 512, 8, facts=6, asks=2, tail=tail)
    assert ids.shape == noise.shape == (8, 512)
    assert answers.shape == (8, 3 if tail else 12, 6)
    for row, spans in zip(ids, answers, strict=True):
        data = bytes(row.tolist())
        for start in spans[:, 0].tolist():
            key, value = data[start - 8 : start - 2], data[start : start + 6]
            assert value.isdigit()
            assert data[start - 12 : start + 7] == b"\n?? " + key + b": " + value + b"\n"
            assert 0 <= data.find(b"\n## " + key + b": " + value + b"\n") < start
        if tail:
            assert max(spans[:, -1].tolist()) == 510
    # what nobody can foresee: keys and values of the facts, keys of the questions, never an answer
    assert noise.sum().item() == 8 * (6 * 12 + answers.shape[1] * 6)
    assert not noise.gather(1, answers.flatten(1)).any()


def test_losses_look_at_answers_and_foreseeable_bytes_only() -> None:
    ids, answers, noise = training.batch_of(TEXT, 256, 4, facts=3, asks=2, tail=False)
    logits = torch.nn.functional.one_hot(ids.roll(-1, 1), 256).float() * 30
    text_loss, answer_loss, right = training.losses(logits, ids, answers, noise)
    assert text_loss < 1e-6 and answer_loss < 1e-6 and right == 1
    spoilt = logits.clone()
    spoilt[:, :-1][noise[:, 1:]] = 0  # ignorance of random bytes costs nothing
    assert training.losses(spoilt, ids, answers, noise)[0] < 1e-6
    spoilt = logits.clone()
    spoilt[0, answers[0, 0, 3] - 1] = 0
    text_loss, answer_loss, right = training.losses(spoilt, ids, answers, noise)
    assert text_loss < 1e-6 and answer_loss > 1e-3
    assert right.item() == pytest.approx(1 - 1 / (4 * 6))


def test_curriculum_moves_on_when_answers_come_right_and_by_the_clock() -> None:
    setup = training.SETUPS[0]
    eager, stuck = training.Curriculum(setup), training.Curriculum(setup)
    assert eager.pick(0.0)[0] == setup.lengths[0]
    for _ in range(50):
        eager.saw(setup.lengths[0], 1.0)
    eager.pick(0.0)
    assert eager.stage == 1
    stuck.pick(0.29)
    assert stuck.stage == 0
    assert {stuck.pick(0.99)[0] for _ in range(200)} == set(setup.lengths)
    for _ in range(300):
        length, facts, asks, tail = stuck.pick(0.99)
        assert training.EVENT_BYTES * (facts + facts // 2 if tail else facts * (1 + asks)) <= length


@pytest.mark.parametrize("setup", training.SETUPS, ids=lambda setup: setup.name)
def test_every_configuration_fits_the_repository(setup: training.Setup, tmp_path: Path) -> None:
    model = training.build(setup)
    training.save(model, tmp_path / "m")
    assert sorted(path.name for path in (tmp_path / "m").iterdir()) == ["config.json", "model.safetensors"]
    assert model.config.head_dim == 64
    loaded = LlamaForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.bfloat16)
    assert torch.equal(loaded.model.layers[0].mlp.up_proj.weight, model.model.layers[0].mlp.up_proj.weight.bfloat16())


def test_bundled_model_is_small_and_answers() -> None:
    files = sorted(path for path in MODEL.iterdir() if path.is_file())
    assert sum(path.stat().st_size for path in files) <= training.MAX_BYTES
    assert json.loads((MODEL / "config.json").read_text())["head_dim"] == 64
    model = LlamaForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    text = needles.stdlib_text(1_000_000)
    score = needles.score(lambda ids: model(ids, use_cache=False).logits, 4096, text, range(2), needles=16, asks=16)
    assert score.share >= 0.9, score
