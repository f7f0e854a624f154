"""`sparsify calibrate tokens`: what it asks, which heads it takes, what it runs, and the plan that a compiled model loads."""

from __future__ import annotations

import json

import pytest
import torch

pytest.importorskip("transformers")

import sparsify
from sparsify import api
from sparsify.commands import main as cli
from sparsify.commands.calibrate.tokens import heads, losses, search
from sparsify.commands.calibrate.tokens.pieces import KINDS, cut
from sparsify.errors import UnsupportedError
from sparsify.passes.token_select import TokenSelect
from sparsify.planning.plan import Plan
from tests.support import token_selection
from tests.support.harness import strict
from tests.support.tiny_models import VOCAB, build, spread_weights

LENGTH = 96
IDS = torch.randint(3, VOCAB, (1, 700), generator=torch.Generator().manual_seed(5))
METHOD = TokenSelect(window=12, sinks=2, queries=6, kernel=3)
ASKED = search.Asked(METHOD, LENGTH, (30, 60), 2, cue=8, answer=6, seed=0, budget=1e9)

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


@pytest.fixture(scope="module")
def model():
    made = build("llama", layers=4)
    spread_weights(made)
    return made


def run(model, asked=ASKED, predict=lambda method: (float(method.layer * 1000 + method.keep), 1e6)):
    found = search.Search(model, IDS, asked, {"passes": ["dense"]}, predict)
    return found, found.run()


def test_prompts_end_as_the_text_does_or_in_a_passage_that_they_hold():
    pieces = cut(IDS, LENGTH, 3, cue=8, answer=6, seed=1)
    assert [piece.kind for piece in pieces] == [*KINDS] * 3
    text = IDS[0].tolist()
    for piece in pieces:
        assert piece.prompt.shape == (1, LENGTH) and piece.answer.shape == (1, 6)
    for continued, recalled in zip(pieces[::2], pieces[1::2], strict=True):
        whole = torch.cat((continued.prompt, continued.answer), 1)[0].tolist()
        assert any(text[at : at + len(whole)] == whole for at in range(len(text)))
        body, cue = recalled.prompt[0, :-8].tolist(), recalled.prompt[0, -8:].tolist()
        assert body == whole[: LENGTH - 8]
        passage = cue + recalled.answer[0].tolist()
        assert any(body[at : at + 14] == passage for at in range(len(body)))  # what has to follow stands in the prompt


def test_texts_and_prompts_that_are_too_short():
    with pytest.raises(UnsupportedError, match="fewer than a prompt of 800 and 6 after it"):
        cut(IDS, 800, 1, cue=8, answer=6, seed=0)
    with pytest.raises(UnsupportedError, match="too few for a cue of 64"):
        cut(IDS, LENGTH, 1, cue=64, answer=32, seed=0)


@torch.no_grad()
def test_what_the_last_queries_look_at_equals_attention_that_is_written_out(model):
    prompts = [IDS[:, :LENGTH], IDS[:, 100 : 100 + LENGTH]]
    found = heads.looks(model, prompts, {"passes": ["dense"]}, 6, lambda: None)
    model.set_attn_implementation("eager")
    try:
        want = [torch.cat(model(prompt, output_attentions=True, use_cache=False).attentions) for prompt in prompts]
    finally:
        model.set_attn_implementation("sdpa")
    for one, weights in zip(found, want, strict=True):
        torch.testing.assert_close(one, weights[:, :, -6:].mean(2), rtol=1e-4, atol=1e-6)


def test_heads_that_know_are_chosen():
    """Head 2 of layer 0 looks where a later head will, the others elsewhere; layer 1 has no such head."""
    method = METHOD.model_copy(update={"keep": METHOD.sinks + METHOD.window + 3, "kernel": 1})
    look = torch.zeros(3, 4, LENGTH)
    look[:, :, 70:72] = 0.3  # of no use to anyone
    look[2, 1, [20, 40, 60]] = 0.9
    look[0, 2, [20, 40, 60]] = 0.5
    look[1, 3, [21, 41, 61]] = 0.5
    assert heads.choose_heads([look], 0, method) == ((2,), pytest.approx(2.7 / 4.8))
    assert heads.choose_heads([look], 1, method)[1] < 0.5
    look[1] = torch.nan
    assert heads.choose_heads([look], 1, method) == ((), 0.0)
    together = look.nan_to_num(0.0)
    together[0] = 0
    together[0, 0, [20, 40]], together[0, 3, [60]] = 0.5, 0.5
    assert heads.choose_heads([together], 0, method) == ((0, 3), pytest.approx(2.7 / 3.3))  # layer 1 has nothing to say any more


def test_a_window_and_sinks_count_for_nothing():
    look = torch.rand(2, 4, LENGTH)
    later = heads.looked_at_later(look, METHOD)
    assert not later[:, :2].any() and not later[:, -12:].any() and not later[1].any()
    assert torch.equal(later[0, 2:-12], look[1, :, 2:-12].amax(0))


@torch.no_grad()
def test_losses_are_those_of_a_model_whose_later_layers_see_less(model):
    """Against eager layers under a mask that hides the same tokens."""
    method = METHOD.model_copy(update={"layer": 1, "heads": (0, 3), "keep": 40})
    pieces = cut(IDS, LENGTH, 2, cue=8, answer=6, seed=0)
    with losses.compiled(model, None, {"passes": ["dense"]}):
        dense = losses.answers(model, pieces)
    with losses.compiled(model, method, {"passes": ["dense"]}):
        found = losses.answers(model, pieces)
    assert model._compiled_call_impl is None
    select = {name: getattr(method, name) for name in ("layer", "heads", "keep", "queries", "window", "sinks", "kernel")}
    for index, piece in enumerate(pieces):
        whole = torch.cat((piece.prompt, piece.answer), 1)
        kept = token_selection.chosen(model, {"input_ids": piece.prompt}, select)
        want = token_selection.hidden_later(model, {"input_ids": whole}, kept, LENGTH, 1)[0, LENGTH - 1 : -1]
        nll = torch.nn.functional.cross_entropy(want, piece.answer[0], reduction="none")
        torch.testing.assert_close(found.nll[index], nll, rtol=1e-3, atol=1e-4)
        assert torch.equal(found.likeliest[index], want.argmax(-1))
        plain = model(whole, use_cache=False).logits[0, LENGTH - 1 : -1]
        torch.testing.assert_close(
            dense.nll[index], torch.nn.functional.cross_entropy(plain, piece.answer[0], reduction="none"), rtol=1e-3, atol=1e-4
        )
        assert not torch.allclose(found.nll[index], dense.nll[index], atol=1e-2)
    compared = losses.compare(pieces, dense, found)
    lost = [float((found.nll[i] - dense.nll[i]).mean()) for i in (0, 2)]
    assert compared["continued"].nll == pytest.approx(sum(lost) / 2) and compared["continued"].error > 0
    assert 0 <= compared["recalled"].agree <= 1


@pytest.mark.slow
def test_the_cheapest_of_what_was_run_within_the_budget(model):
    found, point = run(model)
    assert (point.method.layer, point.method.keep) == (0, 30)  # anything goes: the earliest layer, the fewest tokens
    assert {one.method.layer for one in found.points} == {2, 1, 0} and point.method.heads
    last = {one.method.keep: one.loss for one in found.points if one.method.layer == 2}
    again, other = run(model, search.Asked(**{**vars(ASKED), "budget": last[60]}))
    assert other.loss <= last[60] and other in again.points
    with pytest.raises(UnsupportedError, match=r"the least is -?\d+\.\d+, layer"):
        run(model, search.Asked(**{**vars(ASKED), "budget": -1e9}))


def test_layers_that_were_not_measured_are_passed_over(model, monkeypatch):
    """Layers with a window are not: the last of them may be one, and they may lie among others."""
    look, tried = torch.rand(6, 4, LENGTH), []
    look[[0, 2, 4]] = torch.nan
    monkeypatch.setattr(search.Search, "_within", lambda self, layer, *rest: tried.append(layer) or layer >= 2)
    for heads_named, want in ((None, [3, 1]), ((0,), [4, 2, 1])):
        tried.clear()
        asked = search.Asked(**{**vars(ASKED), "method": METHOD.model_copy(update={"heads": heads_named})})
        search.Search(model, IDS, asked, {}, lambda method: (0.0, 0.0))._earliest(30, [], [look], losses.Answers([], []))
        assert tried == want


def test_where_no_head_can_choose_that_is_said(model, monkeypatch):
    monkeypatch.setattr(search, "looks", lambda *given: [torch.zeros(3, 4, LENGTH)])
    monkeypatch.setattr(losses, "answers", lambda *given: losses.Answers([], []))
    with pytest.raises(UnsupportedError, match="no head of any layer looks at what later layers look at"):
        run(model, search.Asked(**{**vars(ASKED), "keeps": (30,), "count": 1}))


def test_answers_without_a_number_are_within_no_budget():
    lost = {"continued": losses.Loss(0.1, 0.0, 1.0), "recalled": losses.Loss(float("nan"), 0.0, 0.0)}
    for found in (lost, dict(reversed(lost.items()))):
        assert search.Point(METHOD, found, 0.0, 0.0, 0.0).loss == float("inf")


@pytest.mark.slow
def test_the_plan_narrows_as_the_options_do(model, tmp_path):
    asked = search.Asked(**{**vars(ASKED), "keeps": (40,), "count": 1, "method": METHOD.model_copy(update={"heads": (1, 2)})})
    found, point = run(model, asked)
    plan = search.make_plan(found, point, LENGTH, "a device")
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json").calibration.budget == {"keep_error": 1e9}
    (decision,) = [one for one in plan.decisions if one.kind == "stream"]
    assert (decision.layer, decision.options["heads"], decision.error) == (point.method.layer, [1, 2], point.loss)
    prompt, logits = IDS[:, 300 : 300 + LENGTH], []
    for options in ({"plan": str(tmp_path / "plan.json")}, {"passes": ["token_select", "dense"], "token_select": point.method.options()}):
        torch._dynamo.reset()
        sparsify.compile(model, **strict(**options))
        with torch.no_grad(), api.collect_plans() as plans:
            logits.append(model(prompt, use_cache=False).logits)
        assert [d.method for one in plans for d in one.decisions if d.kind == "stream"] == ["token_select"]
    torch.testing.assert_close(*logits, equal_nan=True)
    assert int(logits[0].isnan().all(-1).sum()) == LENGTH - 40


@pytest.mark.slow
def test_the_command(model, tmp_path, capsys):
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_bytes(bytes((IDS[0] % 60 + 3).tolist()))
    command = ["calibrate", "tokens", str(tmp_path / "model"), "--text", str(tmp_path / "text.txt"), "--save", str(tmp_path / "plan.json")]
    command += ["--prompt-length", "96", "--keep", "30", "--pieces", "1", "--cue", "8", "--answer", "6", "-o", 'passes=["dense"]']
    command += ["-o", "token_select.window=12", "-o", "token_select.sinks=2"]
    assert cli.main([*command, "--keep-error", "1000", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["chosen"]["keep"] == 30 and printed["chosen"] in printed["points"]
    assert cli.main([*command, "--keep-error", "1000", "--at", "131072"]) == 0
    assert "* layer" in capsys.readouterr().out
    assert cli.main([*command, "--keep-error", "1000", "--keep", "10"]) != 0
    assert "sinks and a window of 12 go on anyway" in capsys.readouterr().err
    assert cli.main([*command, "--keep-error", "1000", "--prompt-length", "100K"]) != 0
