"""The script that trains the model of word pieces: its forward is transformers', its Muon torch's, its schedule covers all lengths."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM

from benchmarks.answers import train_code_model as training
from benchmarks.answers.code_model.decoder import Decoder, rotary
from benchmarks.answers.code_model.feed import BLOCK
from benchmarks.answers.code_model.optimizer import Optimizer
from benchmarks.answers.code_model.setup import TOY, Setup, length_of, rate_of
from benchmarks.lib import int8_weights
from tests.benchmarks.test_corpus import CODE

SETUP = replace(TOY, vocabulary=300)


def test_training_forward_is_the_models_own(tmp_path: Path) -> None:
    model = Decoder(SETUP)
    reference = LlamaForCausalLM(model.config()).eval()
    missing, unexpected = reference.load_state_dict(model.state(), strict=False)
    assert missing == ["lm_head.weight"] and not unexpected
    ids = torch.randint(0, 300, (3, 65))
    with torch.no_grad():
        each, right = model(ids[:, :-1], ids[:, 1:], rotary(SETUP, 64, 3 * 64, ids.device), torch.float32)
        logits = reference(ids[:, :-1], use_cache=False).logits.flatten(0, 1)
    torch.testing.assert_close(
        each, torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten(), reduction="none"), atol=1e-4, rtol=1e-4
    )
    assert torch.equal(right, logits.argmax(-1) == ids[:, 1:].flatten())


def test_steps_are_those_of_torchs_muon() -> None:
    model = Decoder(SETUP)
    names = ["k_proj", "down_proj", "gate_proj"]
    twins = {name: [torch.nn.Parameter(layer.detach().clone()) for layer in model.matrices[name]] for name in names}
    muon = torch.optim.Muon(
        [twin for name in names for twin in twins[name]], lr=1e-2, weight_decay=SETUP.weight_decay, adjust_lr_fn="match_rms_adamw"
    )
    optimizer = Optimizer(model, fused=False)
    for step in range(3):
        torch.manual_seed(step)
        for name, parameter in model.named_parameters():
            parameter.grad = torch.randn_like(parameter)
            for twin, layer in zip(twins.get(name.split(".")[-1], []), parameter.grad, strict=False):
                twin.grad = layer.clone()
        optimizer.step(1e-2)
        muon.step()
    for name in names:
        moved = model.matrices[name].detach() - torch.stack([twin.detach() for twin in twins[name]])
        # torch's iterations run in bf16
        assert moved.norm() < 0.02 * (model.matrices[name].detach() - Decoder(SETUP).matrices[name].detach()).norm()


def test_lengths_grow_with_the_clock_and_fill_each_batch() -> None:
    for setup in (Setup(), TOY):
        lengths = {length for _, mix in setup.stages for length, _ in mix}
        assert all(setup.batch_tokens % length == 0 and length <= setup.positions for length in lengths)
        drawn = {fraction: {length_of(setup, step, fraction) for step in range(300)} for fraction in (0.0, 0.99)}
        assert drawn[0.0] == {min(lengths)} and max(drawn[0.99]) == max(lengths)
        assert rate_of(setup, 0, 0.0) < 0.1 * setup.lr
        assert rate_of(setup, 1000, 0.3) == setup.lr
        assert rate_of(setup, 1000, 1.0) == pytest.approx(0.02 * setup.lr)


def test_the_model_is_of_the_shape_that_it_stands_for() -> None:
    setup = Setup()
    assert setup.heads == 4 * setup.kv_heads and setup.head_dim == 128
    model = Decoder(setup)
    assert 15e6 < sum(p.numel() for p in model.parameters()) < 29e6
    assert len({path for path, _ in model.named_parameters()}) == 9


@pytest.mark.slow
def test_training_ends_with_a_model_that_loads(tmp_path: Path) -> None:
    for package in ("one", "two", "networkx"):
        (tmp_path / "packages" / package).mkdir(parents=True)
        for number in range(6):
            text = "".join(f"{package}_{number}_{line} = lantern({line}) + river\n# some words about the mountain\n" for line in range(250))
            (tmp_path / "packages" / package / f"{number}.py").write_text(CODE + text)
    out = tmp_path / "out"
    options = ["--out", str(out), "--work", str(tmp_path / "work"), "--packages", str(tmp_path / "packages"), "--toy", "--prompts", "1"]
    assert training.main([*options, "--minutes", "0.4", "--reserve", "6"]) == 0
    assert sorted(path.name for path in out.iterdir()) == [
        "config.json", "log.txt", "model-00001-of-00001.safetensors", "report.json", "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip
    report = json.loads((out / "report.json").read_text())
    assert report["held_out_packages"] == ["networkx"] and report["steps"] >= BLOCK
    assert report["loss_of_one_text"]["int8"] == pytest.approx(report["loss_of_one_text"]["trained"], abs=0.02)
    tokenizer = AutoTokenizer.from_pretrained(out)
    ids = tokenizer("river = lantern(", return_tensors="pt").input_ids
    with torch.no_grad():
        made = int8_weights.load(out, torch.float32)(ids).logits.argmax(-1)
    assert made.shape == ids.shape
    assert tokenizer.decode(ids[0]).startswith("river = lantern(")
