"""Errors by site: what a method does to the exact model's own operands, kept in a plan that a bound reads."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("transformers")

from sparsify.commands import main as cli
from sparsify.commands.calibrate import errors as calibrate_errors
from sparsify.errors import UnsupportedError
from sparsify.planning.plan import Plan
from tests.support.harness import run, strict
from tests.support.tiny_models import VOCAB, build

IDS = torch.randint(3, VOCAB, (1, 96), generator=torch.Generator().manual_seed(0))
OPTIONS = {"passes": ["sink_window", "xattention", "dense"], "sink_window": {"window": 8, "sinks": 1}, "xattention": {"block": 64}}


@pytest.fixture(scope="module")
def model():
    return build("llama", layers=2)


def windowed_error(model, layer: int) -> float:
    """‖o' - o‖ / ‖o‖ of one layer's attention under a window of 8 and one sink, from the model's own operands."""
    seen = []
    exact = F.scaled_dot_product_attention

    def watch(query, key, value, *rest, **call):
        seen.append((query, key, value))
        return exact(query, key, value, *rest, **call)

    F.scaled_dot_product_attention = watch
    torch.nn.functional.scaled_dot_product_attention = watch
    try:
        with torch.no_grad():
            model(input_ids=IDS, use_cache=False)
    finally:
        torch.nn.functional.scaled_dot_product_attention = exact
    query, key, value = seen[layer]
    key, value = (t.repeat_interleave(query.shape[1] // t.shape[1], 1) for t in (key, value))
    rows, columns = torch.arange(96)[:, None], torch.arange(96)
    causal = columns <= rows
    narrow = causal & ((columns > rows - 8) | (columns == 0))
    whole, part = (exact(query, key, value, attn_mask=mask) for mask in (causal, narrow))
    return float((part - whole).norm() / whole.norm())


def test_the_error_is_that_of_the_site_alone(model):
    errors = calibrate_errors.measure(model, IDS, OPTIONS)
    for layer in (0, 1):
        found = {one["method"]: one["error"] for one in errors.measured_at(f"model.layers.{layer}.self_attn")}
        assert found["sink_window"] == pytest.approx(windowed_error(model, layer), rel=1e-3)
        assert 0 <= found["xattention"] < found["sink_window"]


def test_pieces_add_up_and_a_method_that_keeps_everything_has_no_error(model):
    steps = []
    options = {"passes": ["sink_window"], "sink_window": {"window": 1000}}
    errors = calibrate_errors.measure(model, IDS, options, chunk=40, progress=lambda *done: steps.append(done))
    assert steps == [(1, 2), (2, 2)]
    assert all(one["error"] < 1e-5 for one in errors.measured_at("model.layers.1.self_attn"))


def test_nothing_to_measure_says_why(model):
    with pytest.raises(UnsupportedError, match="no lossy attention method is configured"):
        calibrate_errors.measure(model, IDS, {"passes": ["dense"]})


@pytest.mark.slow
def test_the_command_writes_what_a_bound_reads(model, tmp_path, capsys):
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "text").write_bytes(bytes(IDS[0].tolist()))
    plan = str(tmp_path / "plan.json")
    command = ["calibrate", "errors", str(tmp_path / "model"), "--text", str(tmp_path / "text"), "--device", "cpu", "--save", plan]
    for window in (8, 1000):
        assert cli.main([*command, "-o", "passes=['sink_window','dense']", "-o", f"sink_window.window={window}"]) == 0
    assert "worst" in capsys.readouterr().out
    assert cli.main([*command, "--json", "-o", "passes=['sink_window','dense']", "-o", "sink_window.window=1000"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert [one["site"] for one in printed] == [d.site for d in Plan.load(plan).decisions]
    assert all(one["measured"][0]["options"]["window"] == 1000 for one in printed)
    measured = Plan.load(plan).decisions[0].measured
    assert [one["options"]["window"] for one in measured] == [8, 1000]
    bound = {"plan": plan, "max_error": 0.01, "passes": ["sink_window", "dense"]}
    got = run(model, lambda m: m(input_ids=IDS, use_cache=False), strict(**bound, sink_window={"window": 8}))
    assert [d.options.get("window") for p in got.plans for d in p.decisions] == [1000, 1000]
    none = run(model, lambda m: m(input_ids=IDS, use_cache=False), strict(**bound | {"max_error": 0.0, "sink_window": {"window": 8}}))
    assert none.rewritten("sink_window") == 0
