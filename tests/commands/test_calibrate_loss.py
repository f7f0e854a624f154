"""Attention calibrated by what the text's predictions lose: gradients, what they see that errors do not, and bounds on what was run."""

from __future__ import annotations

import dataclasses
import itertools
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("transformers")

from sparsify.commands import main as cli
from sparsify.commands.calibrate.attention import refine
from sparsify.commands.calibrate.attention import run as runs
from sparsify.commands.calibrate.attention import settings as tried
from sparsify.commands.calibrate.attention.capture import Capture, Captured
from sparsify.commands.calibrate.attention.choose import DENSE, Budget, Chooser
from sparsify.commands.calibrate.attention.gradients import Predictions
from sparsify.commands.calibrate.attention.make_plan import make_plan
from sparsify.commands.calibrate.attention.measure import measure, window_blocks
from sparsify.commands.cost import device as forecast_device
from sparsify.costs.sizes import AttentionSizes
from sparsify.errors import UnsupportedError
from sparsify.planning.decision import Place
from sparsify.planning.plan import Plan
from tests.support.harness import run, strict
from tests.support.tiny_models import VOCAB, build, build_sharp

IDS = torch.randint(3, VOCAB, (1, 700), generator=torch.Generator().manual_seed(0))
OPTIONS = {
    "xattention": {"block": 64, "stride": 16, "pool": "max", "estimate": [], "threshold": [0.2, 0.6]},
    "sink_window": {"window": [64]},
}
GRID = tried.grid(OPTIONS)
H200 = forecast_device.named("h200")
SETTINGS = runs.settings_for(OPTIONS)


def asked(weigh: runs.Weigh = "loss", pieces: int = 2, last: int = 0) -> runs.Asked:
    return runs.Asked(GRID, (256,), pieces, 0, (), last, weigh)


@pytest.fixture(scope="module")
def model():
    made = build_sharp()
    with torch.no_grad():
        made.lm_head.weight.mul_(4)
    return made


@pytest.fixture(scope="module")
def measured(model) -> runs.Measured:
    return runs.run(model, IDS, asked(), OPTIONS)


@pytest.fixture(scope="module")
def chooser(measured) -> Chooser:
    return Chooser(GRID, measured, H200, "hopper", at=131072)


@pytest.mark.parametrize("family, projection", [("llama", "self_attn.o_proj"), pytest.param("gpt2", "attn.c_proj", marks=pytest.mark.slow)])
def test_gradients_are_autograds(family, projection):
    model = build(family, layers=2)
    before = [weight.requires_grad for weight in model.parameters()]
    ids, follow, found, outputs = IDS[:, :40], Predictions(last=8, seed=3), {}, []
    capture = Capture(model, SETTINGS, lambda site, q, k, v, gradient: found.update({site.place.name: gradient}), follow=follow)
    with torch.no_grad(), capture.running() as forward:
        logits = forward(ids)
    assert before == [weight.requires_grad for weight in model.parameters()]

    def keep(_, inputs):
        inputs[0].retain_grad()
        outputs.append(inputs[0])

    hooks = [m.register_forward_pre_hook(keep) for name, m in model.named_modules() if name.endswith(projection)]
    exact = model(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(logits, exact)
    exact.backward(follow.gradient(exact, ids))
    for hook in hooks:
        hook.remove()
    assert len(found) == len(outputs) == 2
    for name, output in zip(sorted(found), outputs, strict=True):
        torch.testing.assert_close(found[name][0].transpose(0, 1).flatten(1), output.grad[0], atol=1e-5, rtol=1e-3)
        assert float(output.grad.abs().max()) > 1e-2


def test_the_mean_over_signs_is_fisher_information():
    draw = torch.Generator().manual_seed(0)
    logits = torch.randn(1, 3, 5, generator=draw) * 2
    p = logits[0].softmax(-1).double()
    drawn = [Predictions(seed=seed).gradient(logits, IDS)[0].double() for seed in range(1500)]
    mean = torch.stack([one[..., None] * one[:, None] for one in drawn]).mean(0)
    torch.testing.assert_close(mean, p.diag_embed() - p[..., None] * p[:, None], atol=0.05, rtol=0)
    across = torch.stack([one[0][:, None] * one[1] for one in drawn]).mean(0)
    assert float(across.abs().max()) < 0.06, "rows are drawn apart"
    plain, weighed = (Predictions(last=last, seed=1).gradient(logits, IDS)[0] for last in (0, 1))
    torch.testing.assert_close(weighed.square() / plain.square(), torch.tensor([0.75, 0.75, 1.5])[:, None].expand(3, 5))


class _Seeds:
    """New signs with every run."""

    def __init__(self):
        self.numbers = itertools.count()

    def gradient(self, logits, ids):
        return Predictions(seed=next(self.numbers)).gradient(logits, ids)


@pytest.mark.slow
def test_the_divergence_of_one_heads_change_is_that_of_running_it(model):
    """One row of one head, changed a little: KL of all the text's predictions against ½ (gradient · change)², the mean over signs."""
    ids, row, head, place = IDS[:, :24], 9, 2, "model.layers.0.self_attn"
    change = 0.01 * torch.randn(16, generator=torch.Generator().manual_seed(2))
    moved = torch.zeros(1, 4, 24, 16)
    moved[0, head, row] = change

    def instead(site, query, key, value):
        if site.place.name != place:
            return None
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=site.scale, enable_gqa=True) + moved

    with torch.no_grad():
        predictions = []
        for receive in (lambda *_: None, instead):
            with Capture(model, SETTINGS, receive, every_row=True).running() as forward:
                predictions.append(forward(ids)[0].double().log_softmax(-1))
        want = float(F.kl_div(predictions[1], predictions[0], log_target=True, reduction="sum"))
        found = []

        def receive(site, query, key, value, gradient):
            if site.place.name == place:
                found.append(float((gradient * moved).sum()) ** 2 / 2)

        with Capture(model, SETTINGS, receive, follow=_Seeds()).running() as forward:
            for _ in range(300):
                forward(ids)
    assert want > 1e-9
    assert sum(found) / len(found) == pytest.approx(want, rel=0.25)


def needle() -> tuple[torch.Tensor, ...]:
    """Two heads over 512 tokens. The first reads the same everywhere but in its last row, which looks for one key far back; the second
    averages values that rise along the text, so that a window changes each of its rows a little."""
    query, key = torch.zeros(1, 2, 512, 16), torch.zeros(1, 2, 512, 16)
    value = torch.ones(1, 2, 512, 16)
    key[0, 0, 100, 0] = query[0, 0, -1, 0] = 10
    value[0, 0, 100] = 3
    value[0, 1] = 1 + torch.linspace(0, 1, 512)[:, None]
    gradient = torch.full((1, 2, 512, 16), 1e-3)
    gradient[0, 0, -1] = 1
    return query, key, value, gradient


@pytest.mark.parametrize("weigh, dense", [("error", 1), ("loss", 0)])
def test_rows_that_look_for_something_are_seen(weigh, dense):
    query, key, value, gradient = needle()
    grid = tried.Grid((), (64,), 4)
    record = measure(query, key, value, 1.0, grid, gradient=gradient if weigh == "loss" else None)
    sizes = AttentionSizes(1, 2, 2, 512, 512, 16, 16, dtype=torch.float32)
    site = Captured(Place("attention", 0), 0, sizes, 1.0)
    found = runs.Measured({}, [], {site.place: site}, {site.place: {512: record}})
    chooser = Chooser(grid, found, H200, "hopper")
    one = (1 + window_blocks(512, 64, 128) / 10) / 2
    (layer,) = chooser.choose(Budget("density", one)).layers
    assert [setting == DENSE for setting in layer.settings] == [head == dense for head in (0, 1)]


def test_divergences_are_of_the_definition():
    draw = torch.Generator().manual_seed(1)
    query, key, value, gradient = (torch.randn(1, heads, 300, 16, generator=draw) for heads in (4, 2, 2, 4))
    outputs = []
    plain = measure(query, key, value, 0.25, GRID)
    found = measure(query, key, value, 0.25, GRID, last=50, gradient=gradient)
    assert plain.divergence is None and torch.equal(plain.visited, found.visited)
    window = torch.ones(300, 300, dtype=torch.bool).tril().triu(-63)
    window[:, : GRID.sinks] = torch.ones(300, GRID.sinks, dtype=torch.bool).tril()
    for mask in (torch.ones(300, 300, dtype=torch.bool).tril(), window):
        outputs.append(F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=0.25, enable_gqa=True))
    along = ((outputs[1] - outputs[0]) * gradient)[0].double().sum(-1)
    torch.testing.assert_close(found.divergence[0], along.square().sum(-1) / 2, rtol=1e-3, atol=1e-6)
    most = measure(query, key, value, 0.25, GRID, gradient=gradient, most=0.0)
    assert bool(most.error[1:].isnan().all()) and bool(most.divergence[1:].isnan().all()) and torch.equal(most.visited, found.visited)


@pytest.mark.slow
def test_choices_bound_the_predicted_loss(chooser):
    seconds = []
    for bound in (0.0, 1e-4, 1e-2, 1e3):
        choice = chooser.choose(Budget("keep_loss", bound))
        assert choice.loss(256) <= bound * (1 + 1e-9) and choice.bounded(256) == choice.loss(256)
        seconds.append(choice.seconds)
    assert seconds == sorted(seconds, reverse=True) and seconds[0] > seconds[-1]


@pytest.mark.slow
def test_what_is_lost_is_what_the_compiled_plan_loses(model, measured, chooser, tmp_path):
    choice = chooser.choose(Budget("keep_loss", 1e3))
    lost = refine.Losses(model, IDS, asked(last=16), OPTIONS).lost(choice)
    plan = make_plan(model, IDS, OPTIONS, asked(), measured, chooser, choice, lost)
    plan.save(tmp_path / "plan.json")
    assert plan.calibration.lost == pytest.approx(lost, rel=1e-4) and plan.calibration.losses["256"] > 0

    def predictions(options):
        found = []
        for at in asked().offsets(700, 256):
            ids = IDS[:, at : at + 256]
            logits = run(model, lambda m, ids=ids: m(input_ids=ids, use_cache=False).logits, options).value
            found.append(logits[0].double().log_softmax(-1))
        return torch.stack(found)

    dense, other = predictions(strict(passes=["dense"])), predictions(strict(plan=str(tmp_path / "plan.json"), min_length=0))
    rows = (dense.exp() * (dense - other)).sum(-1)
    assert lost == pytest.approx(max(float(rows.mean()), float(rows[:, -16:].mean())), rel=1e-3)
    assert lost > 1e-4


def test_the_cheapest_choice_that_was_run_within_the_bound_is_kept():
    tried_so_far = []

    def choose(budget):
        tried_so_far.append(budget.value)
        return SimpleNamespace(seconds=1 / (1 + budget.value), value=budget.value), ""

    choice, _, lost = refine.keep(0.01, choose, lambda one: 3 * one.value)  # three times what was predicted
    assert lost <= 0.01 and lost > 0.8 * 0.01 and len(tried_so_far) == refine.RUNS
    assert lost == max(3 * value for value in tried_so_far if 3 * value <= 0.01) and choice.seconds == 1 / (1 + lost / 3)
    choice, _, lost = refine.keep(0.01, choose, lambda one: 1.0)
    assert (choice.value, lost) == (0.0, 0.0), "nothing keeps it: dense"
    assert refine.keep(0.01, choose, lambda one: 0.0)[0].value == 0.01 * 4 ** (refine.RUNS - 1)


@pytest.mark.slow
def test_a_run_goes_on_and_another_weight_is_refused(model, measured, tmp_path):
    file = tmp_path / "measured.pt"

    def stop(done: int, all_: int, what: str) -> None:
        if done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        runs.run(model, IDS, asked(), OPTIONS, file=file, progress=stop)
    again = runs.run(model, IDS, asked(), OPTIONS, file=file)
    for place, by_length in measured.records.items():
        assert torch.equal(again.records[place][256].divergence, by_length[256].divergence)
    with pytest.raises(UnsupportedError, match="another weigh"):
        runs.run(model, IDS, asked("error"), OPTIONS, file=file)


@pytest.mark.slow
def test_a_model_of_several_graphs_is_refused():
    model = build("llama", layers=2)
    forward = model.model.norm.forward

    def broken(hidden):
        torch._dynamo.graph_break()
        return forward(hidden)

    model.model.norm.forward = broken
    with pytest.raises(UnsupportedError, match="gradients are followed through one"):
        runs.run(model, IDS, asked(pieces=1), OPTIONS)


@pytest.mark.slow
def test_the_command_keeps_a_loss(model, tmp_path, capsys):
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "text").write_bytes(bytes(IDS[0].tolist()))
    plan = tmp_path / "plan.json"
    command = ["calibrate", "attention", str(tmp_path / "model"), "--text", str(tmp_path / "text"), "--device", "cpu", "--save", str(plan)]
    command += ["--lengths", "256", "--pieces", "1", "--target", "h200", "--last", "16"]
    for table, values in OPTIONS.items():
        command += itertools.chain.from_iterable(("-o", f"{table}.{name}={value}") for name, value in values.items())
    assert cli.main([*command, "--keep-loss", "0.05"]) == 0
    assert "by running the plan" in capsys.readouterr().out
    found = Plan.load(plan).calibration
    assert found.lost <= 0.05 and found.budget == {"keep_loss": 0.05} and set(found.losses) == {"256"}
    assert cli.main([*command, "--weigh", "loss", "--density", "0.9"]) == 0  # from the same measurements
    assert dataclasses.asdict(Plan.load(plan).calibration)["lost"] is not None
    for wrong in (["--keep-loss", "-1"], ["--keep-loss", "1", "--weigh", "error"], ["--keep-error", "1", "--weigh", "loss"]):
        assert cli.main([*command, *wrong]) == 2
