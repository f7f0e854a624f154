"""Calibration of ffn_skip: what it measures, what it proposes, and that the plan file it writes acts."""

from __future__ import annotations

import json

import pytest
import torch

from sparsify.commands import main as cli
from sparsify.commands.calibrate import feed_forward
from sparsify.errors import UnsupportedError
from sparsify.planning.plan import Plan
from tests.support.harness import run, strict
from tests.support.tiny_models import VOCAB, build


def test_similarities_are_those_of_the_residual_stream():
    model = build("llama", layers=3)
    ids = torch.randint(3, VOCAB, (1, 20), generator=torch.Generator().manual_seed(0))
    before, after, handles = [], [], []
    for layer in model.model.layers:
        handles.append(layer.post_attention_layernorm.register_forward_pre_hook(lambda module, inputs: before.append(inputs[0])))
        handles.append(layer.register_forward_hook(lambda module, inputs, output: after.append(output)))
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
    for handle in handles:
        handle.remove()
    want = torch.cat([torch.cosine_similarity(b, a, dim=-1) for b, a in zip(before, after, strict=True)])
    steps = []
    got = feed_forward.similarities(model, ids, progress=lambda *done: steps.append(done))
    assert got.shape == (3, 20) and steps == [(1, 1)]
    assert torch.allclose(got, want, atol=1e-5)
    assert feed_forward.similarities(model, ids, chunk=6).shape == (3, 18)


def test_experts_cannot_be_calibrated():
    with pytest.raises(Exception, match="routes tokens to experts"):
        feed_forward.similarities(build("mixtral"), torch.ones(1, 5, dtype=torch.long))


def test_simulation_counts_like_the_op():
    table = torch.tensor([[0.9, 0.1], [0.9, 0.9], [0.9, 0.9], [0.9, 0.9], [0.9, 0.1]])
    skipped = feed_forward.simulate(table, 0, 0, 0.5, 2)
    assert skipped.T.int().tolist() == [[0, 1, 1, 0, 1], [0, 0, 1, 1, 0]]
    assert not feed_forward.simulate(table, 2, 2, 0.5, 1).any()


@pytest.mark.parametrize("share", [0.05, 0.25, 0.4])
def test_a_proposal_reaches_its_share(share):
    table = torch.rand(12, 400, generator=torch.Generator().manual_seed(1)) * 0.2 + torch.linspace(0.6, 0.8, 12)[:, None]
    proposal = feed_forward.propose(table, share)
    skipped = feed_forward.simulate(table, *(getattr(proposal, n) for n in ("cold_first", "cold_last", "threshold", "skip")))
    assert share <= skipped.float().mean() <= share + 0.05
    assert 1 <= proposal.cold_first <= 3 and 1 <= proposal.cold_last <= 3
    assert proposal.prefill_share == pytest.approx(12 * proposal.share / (12 - proposal.cold_first - proposal.cold_last), abs=1e-3)


def test_blocks_in_a_row_lose_more_than_blocks_apart():
    table = torch.full((5, 2), 0.98)
    apart = torch.tensor([[0, 0], [1, 0], [0, 0], [1, 0], [0, 0]], dtype=torch.bool)
    in_a_row = torch.tensor([[0, 0], [0, 0], [0, 0], [1, 0], [1, 0]], dtype=torch.bool)
    assert feed_forward.lost_turn(table, apart) == pytest.approx(0.02, rel=1e-4)
    assert feed_forward.lost_turn(table, in_a_row) == pytest.approx(0.04, rel=1e-4)
    assert feed_forward.lost_turn(table, torch.zeros_like(apart)) == 0
    # with blocks all alike, a quarter is skipped one by one
    assert feed_forward.propose(0.98 + 0.01 * torch.rand(12, 500), 0.25).skip == 1


def test_too_large_a_share_says_what_is_possible():
    with pytest.raises(UnsupportedError, match="cannot be skipped"):
        feed_forward.propose(torch.rand(6, 50), 0.9)


@pytest.mark.slow
def test_the_command_writes_a_plan_that_acts(tmp_path, capsys):
    model = build("llama", layers=6)
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "text").write_bytes(bytes(range(3, 120)) * 3)
    command = ["calibrate", "ffn", str(tmp_path / "model"), "--text", str(tmp_path / "text"), "--chunk", "64", "--share", "0.2"]
    command += ["--warmup", "0", "--save", str(tmp_path / "plan.json"), "--plot", str(tmp_path / "plot.png"), "--device", "cpu"]
    assert cli.main(command) == 0
    said = capsys.readouterr().out
    assert "[ffn_skip]" in said and "block   5" in said
    assert cli.main([*command, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert len(printed["blocks"]) == 6 and f"skip = {printed['ffn_skip']['skip']}" in said
    assert (tmp_path / "plot.png").stat().st_size > 1000
    got = run(model, lambda m: m(input_ids=torch.tensor([[5]]), use_cache=False), strict(plan=str(tmp_path / "plan.json")))
    assert 2 <= got.rewritten("ffn_skip") <= 4
    errors = [one["error"] for d in Plan.load(tmp_path / "plan.json").decisions for one in d.measured]
    assert len(errors) == got.rewritten("ffn_skip") and all(0 <= error < 2 for error in errors) and max(errors) > 0
    least = strict(plan=str(tmp_path / "plan.json"), max_error=sorted(errors)[0])
    bounded = run(model, lambda m: m(input_ids=torch.tensor([[5]]), use_cache=False), least)
    assert 1 <= bounded.rewritten("ffn_skip") < got.rewritten("ffn_skip")
    assert any("exceeds max_error" in refusal for refusal in bounded.refusals())


def test_a_bad_share_is_refused(tmp_path, capsys):
    assert cli.main(["calibrate", "ffn", str(tmp_path), "--text", "x", "--share", "1.5"]) == 2
    assert "between 0 and 1" in capsys.readouterr().err
