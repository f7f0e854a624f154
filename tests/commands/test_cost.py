"""Forecasts: the compiler's own choices at any length, costs that add up, caches that shrink, and the command."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math

import pytest
import torch

pytest.importorskip("transformers")

import sparsify
from benchmarks.cost_model import whole_model
from sparsify import SparseCache, pipeline
from sparsify.commands import main as cli
from sparsify.commands.cost import command as cost_command
from sparsify.commands.cost import device as forecast_device
from sparsify.commands.cost import forecaster as forecast
from sparsify.commands.cost import meta_model, report
from sparsify.costs import profile
from sparsify.costs.links import Sharing
from sparsify.errors import ConfigError, SparsifyError
from sparsify.planning import registry
from sparsify.planning.config import config
from sparsify.planning.decision import Decision
from sparsify.planning.plan import Plan
from tests.planning.test_plan import plan_for, site
from tests.support.tiny_models import build

H200 = forecast_device.named("h200")
LLAMA_8B = {
    "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 131072, "dtype": "bfloat16",
}  # fmt: skip
LENGTHS = (4096, 32768, 131072)


def settings(**options):
    return config.load(options, method_models=registry.discover(), environ={}, cwd="/nonexistent")


def forecaster(model, batch=1, make_cache=None, **options) -> forecast.Forecaster:
    chosen = settings(**options)
    return forecast.Forecaster(model, chosen, forecast_device.context(H200, chosen), batch, make_cache)


@pytest.fixture(scope="module")
def llama():
    from transformers import LlamaConfig

    return meta_model.build("8b", config=LlamaConfig(**LLAMA_8B))


@pytest.fixture(scope="module")
def of_8b(llama):
    return forecaster(llama).forecast(LENGTHS)


@pytest.fixture(scope="module")
def gemma():
    """Windows of 64 in layers 0 and 2, full attention in layers 1 and 3; wide enough that caches show in a step's time."""
    shape = {"head_dim": 128, "num_attention_heads": 16, "num_key_value_heads": 16, "hidden_size": 512, "sliding_window": 64}
    from transformers import Gemma3TextConfig

    common = {"vocab_size": 512, "intermediate_size": 512, "num_hidden_layers": 4, "sliding_window_pattern": 2, "dtype": "bfloat16"}
    return meta_model.build("gemma", config=Gemma3TextConfig(**shape, **common))


@pytest.mark.slow
def test_the_choice_is_the_one_that_a_compilation_makes():
    model = build("gemma3", layers=3)
    options = {"passes": ["xattention", "sink_window", "dense"], "min_length": 0, "xattention": {"block": 64}}
    options["rules"] = [{"layers": "2", "method": ["sink_window"], "window": 5}]
    with torch.no_grad():
        plan = sparsify.explain(model, torch.zeros(1, 200, dtype=torch.int64), use_cache=True, options=options)
    chosen = settings(**options)
    asked = forecast.Forecaster(meta_model.build("", config=model.config), chosen, pipeline.make_context(torch.device("cpu"), chosen))
    decided = asked.decide(asked.model.calls(200).prefill, chosen)
    facts = lambda decisions: [(d.site, d.method, d.options, d.reason, d.refusals, d.sizes, d.mask) for d in decisions]
    assert facts(decision for _, decision in decided) == facts(plan.decisions)
    assert len({d.method for d in plan.decisions}) > 1


@pytest.mark.slow
def test_whole_models_cost_what_the_cost_model_says(llama, of_8b):
    shape = whole_model.ModelShape.from_config(llama.config)
    for row in of_8b.rows:
        prefill, decode = row.dense.prefill, row.dense.decode
        attention = [prefill.attention / 32] * 32
        assert prefill.total == pytest.approx(float(whole_model.prefill_seconds(shape, H200, row.length, attention=attention)), rel=0.02)
        attention = [decode.attention / 32] * 32
        assert decode.total == pytest.approx(float(whole_model.decode_seconds(shape, H200, row.length + 1, attention=attention)), rel=0.02)
        assert row.dense.memory.weights == pytest.approx(shape.weight_bytes, rel=0.01)
        assert row.dense.memory.cache == shape.cache_bytes(row.length)


def test_predictions_are_near_what_was_measured(of_8b):
    """Medians of the compiled exact model on an H200, and its peak of memory."""
    measured = {4096: (0.0989, 17.0e9), 32768: (1.222, 23.35e9), 131072: (10.08, 45.1e9)}
    for row in of_8b.rows:
        seconds, peak = measured[row.length]
        assert row.dense.prefill.total == pytest.approx(seconds, rel=0.12)
        assert row.dense.memory.peak == pytest.approx(peak, rel=0.03)


@pytest.mark.slow
def test_feed_forward_blocks_in_parts_take_the_memory_of_one_part():
    """8192 rows at a time hold gate and up of 8192 rows; below `min_rows` blocks are whole."""
    from transformers import LlamaConfig

    model = meta_model.build("two layers", config=LlamaConfig(**LLAMA_8B | {"num_hidden_layers": 2}))
    options = {"passes": ["dense", "ffn_parts"], "ffn_parts": {"min_rows": 8192, "part_rows": 8192}}
    short, long = forecaster(model, **options).forecast([4096, 32768]).rows
    assert short.chosen.memory == short.dense.memory
    assert long.dense.memory.scratch - long.chosen.memory.scratch == (32768 - 8192) * 2 * 14336 * 2
    assert {group.choice for group in long.chosen.groups if group.what == "ffn" and group.phase == "prefill"} == {"ffn_parts"}


def test_crossovers_are_where_the_plan_changes(of_8b):
    found = [one for one in of_8b.crossovers if one.after == "xattention"]
    assert [(one.phase, one.layers) for one in found] == [("prefill", tuple(range(32)))]
    context = forecast_device.context(H200, settings())
    assert [plan_for(site(found[0].length - step), context).method for step in (1, 0)] == ["dense", "xattention"]
    assert of_8b.rows[0].length < found[0].length < of_8b.rows[1].length
    assert [row.chosen.groups[0].choice for row in of_8b.rows] == ["dense (hopper)", "xattention", "xattention"]
    assert of_8b.rows[0].chosen.prefill == of_8b.rows[0].dense.prefill
    assert of_8b.rows[2].chosen.prefill.total < 0.6 * of_8b.rows[2].dense.prefill.total


@pytest.mark.slow
def test_a_cache_that_shrinks_makes_later_reads_cheaper_and_windows_do_not_benefit(gemma):
    budget = forecaster(gemma, make_cache=lambda c: SparseCache(c, "snapkv", 1024)).forecast([256, 16384, 65536])
    short, middle, long = budget.rows
    assert long.dense.decode.attention > 2.5 * middle.dense.decode.attention
    assert long.chosen.decode.attention == pytest.approx(middle.chosen.decode.attention)  # what is kept is read, whatever the prompt
    assert long.chosen.memory.cache == middle.chosen.memory.cache < middle.dense.memory.cache
    # a cache that is not full costs what it holds
    assert short.chosen.decode.attention < middle.chosen.decode.attention
    groups = {group.layers: group for group in long.chosen.groups if group.phase == "decode"}
    assert {layers: group.sees for layers, group in groups.items()} == {(0, 2): "64 keys", (1, 3): "1024 keys"}
    plain = {group.layers: group.sees for group in long.dense.groups if group.phase == "decode"}
    assert plain == {(0, 2): "64 keys", (1, 3): ""}  # the windows read the same with and without a budget


@pytest.mark.slow
def test_sums_of_attention_cost_a_prompt_its_logits_again(gemma):
    totals = {}
    for policy in ("h2o", "keydiff"):
        rows = forecaster(gemma, make_cache=lambda c, policy=policy: SparseCache(c, policy, 1024)).forecast([16384, 65536]).rows
        totals[policy] = [row.chosen.prefill.total for row in rows]
    more = [h2o - keydiff for h2o, keydiff in zip(totals["h2o"], totals["keydiff"], strict=True)]
    assert 0 < 8 * more[0] < more[1], "quadratic in the prompt"


def test_sink_window_reads_its_window_in_decode():
    near, far = (plan_for(site(1, keys), passes=["sink_window"], min_length=0) for keys in (16384, 1 << 20))
    assert near.seconds == pytest.approx(far.seconds) and far.seconds < far.dense_seconds / 10


@pytest.mark.slow
def test_windows_are_not_estimated(gemma):
    row = forecaster(gemma).forecast([65536]).rows[0]
    groups = {group.layers: group for group in row.chosen.groups if group.phase == "prefill"}
    assert (groups[1, 3].choice, groups[0, 2].choice) == ("xattention", "dense (hopper)")
    assert "window of 64 tokens" in groups[0, 2].refusals[0]
    assert groups[1, 3].density == pytest.approx(0.11, abs=0.01) and groups[0, 2].density is None


def test_experts_cost_what_is_active():
    from transformers import Qwen3MoeConfig

    shape = {
        **LLAMA_8B,
        "hidden_size": 1024,
        "num_hidden_layers": 2,
        "num_experts": 64,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 512,
    }
    model = meta_model.build("moe", config=Qwen3MoeConfig(**shape))
    calls = model.calls(1024)
    steps = {}
    for batch in (1, 8, 512):
        asked = forecaster(model, batch)
        asked._shapes = asked._layer_shapes(calls.prefill)
        steps[batch] = asked._routed(batch, model.layers[0])
    one_expert = 3 * 1024 * 512 * 2
    assert steps[1] < 64 * one_expert / H200.bandwidth < steps[512] * 1.2  # one token reads four experts, many read all
    assert steps[1] < steps[8] < 8 * steps[1]
    remark = next(asked._remarks({1024: calls}))
    assert "2 layers route each token to 4 of 64 experts" in remark


@pytest.mark.slow
def test_keys_rebuilt_from_latents_are_paid_at_every_step():
    model = meta_model.build("mla", config=build("deepseek_v3").config, dtype=torch.bfloat16)
    found = forecaster(model).forecast([1024, 262144])
    short, long = (row.dense.decode.projections for row in found.rows)
    if not any("latents" in note for note in found.notes):
        pytest.skip("this release of transformers caches keys and values")
    assert found.rows[0].dense.memory.cache < 1024 * 2 * 4 * (24 + 16) * 2 / 2 and long > 1.5 * short


@pytest.mark.slow
def test_rules_show_as_groups_of_layers(llama):
    options = {"rules": [{"layers": "0-3", "method": "sink_window", "window": 1024}]}
    row = forecaster(llama, **options).forecast([32768]).rows[0]
    prefill = {group.choice: group.layers for group in row.chosen.groups if group.phase == "prefill"}
    assert prefill == {"sink_window": (0, 1, 2, 3), "xattention": tuple(range(4, 32))}
    assert report.choices(row.chosen, "prefill") == "sink_window ×4\nxattention ×28"


@pytest.mark.slow
def test_a_bound_on_the_error_shows_by_layer(llama, tmp_path):
    measured = lambda error: [{"method": "xattention", "options": {}, "error": error}]
    sites = [f"model.layers.{i}.self_attn" for i in range(32)]
    decisions = [Decision(name, i, "prefill", {}, "", "xattention", {}, measured=measured(i / 100)) for i, name in enumerate(sites)]
    Plan(decisions).save(tmp_path / "plan.json")
    row = forecaster(llama, plan=str(tmp_path / "plan.json"), max_error=0.105).forecast([65536]).rows[0]
    assert report.choices(row.chosen, "prefill") == "xattention ×11\ndense (hopper) ×21"
    assert row.chosen.prefill.attention > 0.6 * row.dense.prefill.attention


def test_feed_forward_skipping_shows_in_decode(llama):
    row = forecaster(llama, passes=["dense", "ffn_skip"], ffn_skip={"warmup": 0}).forecast([4096]).rows[0]
    assert row.chosen.decode.feed_forward < 0.75 * row.dense.decode.feed_forward
    assert "ffn_skip ×24" in report.choices(row.chosen, "decode")
    assert row.chosen.prefill == row.dense.prefill


@pytest.mark.parametrize(
    ("text", "lengths"),
    [
        ("4K..32K", [4096, 8192, 16384, 32768]),
        ("8192,32K", [8192, 32768]),
        ("1000..3000", [1000, 2000, 3000]),
        ("1M, 2k..4k ,5", [5, 2048, 4096, 1 << 20]),
        (cost_command.DEFAULT_LENGTHS, [4096 << i for i in range(9)]),
    ],
)
def test_lengths(text, lengths):
    assert cost_command.parse_lengths(text) == lengths


@pytest.mark.parametrize(
    ("text", "words"),
    [("", "is not a length"), ("4Q", "'4Q' is not a length"), ("8K..4K", "is empty.*write 4K..8K"), ("1", "outside 2 to 16M"),
     ("17M", "outside"), ("4K...8K", "is not a length"), ("1.5K", "is not a length"), ("-4", "is not a length"),
     (",".join(map(str, range(2, 80))), "78 lengths are too many")],
)  # fmt: skip
def test_lengths_that_are_none(text, words):
    with pytest.raises(ConfigError, match=words):
        cost_command.parse_lengths(text)


def test_budgets():
    assert [cost_command.parse_budget(t) for t in (None, "4096", "4K", "0.1", ".25", "1.0")] == [None, 4096, 4096, 0.1, 0.25, 1.0]
    for text in ("0", "x", "1.5", "-3", "0.0", ""):
        with pytest.raises(ConfigError, match="is no budget"):
            cost_command.parse_budget(text)


def test_devices_by_name(tmp_path, monkeypatch):
    assert forecast_device.named("H200").profile == profile.shipped("sm_90") and not forecast_device.named("h100").measured
    assert forecast_device.context(forecast_device.named("a100"), settings()).family == "triton"
    speeds = [forecast_device.named(name).flops for name in ("a100", "h100", "b200")]
    assert speeds == sorted(speeds)
    (tmp_path / "mine.json").write_text(forecast_device.named("h100").profile.to_json())
    assert forecast_device.named(str(tmp_path / "mine.json")).bandwidth == forecast_device.named("h100").bandwidth
    with pytest.raises(ConfigError, match="did you mean 'h200'"):
        forecast_device.named("h20")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SparsifyError, match="name one: h200"):
        forecast_device.named(None)
    assert forecast_device.context(forecast_device.named("cpu"), settings()).kernels == "reference"


@pytest.fixture
def command(tmp_path):
    build("llama", layers=2).config.save_pretrained(tmp_path / "model")
    return ["cost", str(tmp_path / "model"), "--device", "h100", "--lengths"]


@pytest.mark.slow
def test_the_command(command, tmp_path, capsys, monkeypatch):
    """Of one GPU; that of several, test_ways, is quick."""
    monkeypatch.chdir(tmp_path)
    assert cli.main([*command, "1K,64K", "--budget", "256", "--plot", "cost.png", "--why"]) == 0
    said = capsys.readouterr().out
    assert "estimate" in said and "64K" in said and "kv_evict" in said and "at 65536 tokens" in said
    assert "after a prompt of 64K tokens choosing what to keep takes" in said
    assert (tmp_path / "cost.png").stat().st_size > 10_000
    assert cli.main([*command, "64K", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    (row,) = found["rows"]
    assert row["length"] == 65536 and found["measured"] is False
    assert row["chosen"]["prefill"]["total"] < row["dense"]["prefill"]["total"]
    parts = [value for name, value in row["dense"]["prefill"].items() if name != "total"]
    assert math.isclose(row["dense"]["prefill"]["total"], sum(parts))


def test_what_the_command_refuses(command, capsys):
    command.append("1K")
    for wrong, words in ((["--batch", "0"], "--batch"), (["--budget", "none"], "--budget"), (["--lengths", "9..1"], "--lengths")):
        assert cli.main([*command, *wrong]) == 2
        assert words in capsys.readouterr().err


def test_the_command_asks_for_the_gpu_here_by_default():
    parser = argparse.ArgumentParser()
    cost_command.add(parser.add_subparsers())
    given = parser.parse_args(["cost", "m"])
    assert (given.device, given.lengths, given.budget, given.batch) == (None, "4K..1M", None, 1)


@pytest.mark.slow
def test_tokens_that_go_on_behind_a_layer(llama, of_8b):
    """13 of 32 layers as they are, 19 as for a prompt of the tokens that go on."""
    asked = forecaster(llama, passes=["token_select", "dense"], token_select={"layer": 12, "heads": "all", "keep": 8192})
    (row,) = asked.forecast((131072,)).rows
    few = of_8b.rows[0]  # 4096 tokens
    dense, chosen = row.dense, row.chosen
    for part in ("feed_forward", "projections", "elementwise"):
        whole, short = getattr(dense.prefill, part), getattr(few.dense.prefill, part) * 2
        assert getattr(chosen.prefill, part) == pytest.approx(whole * 13 / 32 + short * 19 / 32, rel=0.05)
    assert dense.prefill.attention * 13 / 32 < chosen.prefill.attention < dense.prefill.attention * 13.2 / 32
    assert chosen.memory.cache == pytest.approx(dense.memory.cache * (13 + 19 / 16) / 32, rel=1e-3)
    assert few.dense.decode.attention < chosen.decode.attention < dense.decode.attention * 16 / 32
    assert [(g.what, g.layers, g.sees) for g in chosen.groups if g.what == "stream"] == [("stream", (12,), "8192 tokens behind it")]
    same = forecaster(llama, passes=["token_select", "dense"], token_select={"layer": 12, "heads": "all", "keep": 1.0})
    assert same.forecast((131072,)).rows[0].chosen.prefill == row.dense.prefill


@pytest.mark.slow
@pytest.mark.parametrize("name, options", [("token_select", {"layer": 12, "heads": "all", "keep": 8192}), ("fastv", {"keep": 0.25})])
def test_rules_that_leave_a_choosing_layer_out(llama, name, options):
    rules = [{"layers": "12" if name == "token_select" else "1", "method": []}]
    for given, narrows in (([], True), (rules, False)):
        asked = dataclasses.replace(forecaster(llama, passes=[name, "dense"], rules=given, **{name: options}), images=60000)
        (row,) = asked.forecast((131072,)).rows
        assert any(group.what == "stream" for group in row.chosen.groups) == narrows


@pytest.mark.slow
def test_layers_that_tokens_bypass(llama, of_8b):
    """A quarter of 30 layers, rounded, is read by no token at the schedule's end; prompts run all of them."""
    asked = forecaster(llama, passes=["skip_layers", "dense"], skip_layers={"first": 1, "last": 1, "most": 0.25})
    (row,) = asked.forecast((131072,)).rows
    dense, chosen = row.dense, row.chosen
    for part in ("attention", "feed_forward", "projections", "elementwise"):
        assert getattr(chosen.decode, part) == pytest.approx(getattr(dense.decode, part) * 24 / 32, rel=1e-3)
    assert chosen.decode.head == dense.decode.head
    assert chosen.prefill == dense.prefill
    assert [(g.phase, g.layers) for g in chosen.groups if g.what == "token"] == [("decode", tuple(range(1, 9)))]
    shared = asked.shared(Sharing(cp=2)).forecast((131072,))
    assert shared.rows[0].chosen.decode == shared.rows[0].dense.decode
    assert any("skip_layers does not serve prompts that processes share" in note for note in shared.notes)


@pytest.mark.slow
def test_image_tokens_that_go_on(llama, of_8b):
    """Before the first layer: a prompt of the tokens that go on, and their choice beside; behind the second one: two layers as they are."""
    few = of_8b.rows[0]  # 4096 tokens
    asked = {name: forecaster(llama, passes=[name, "dense"], **{name: {"keep": 0.25}}) for name in ("divprune", "fastv")}
    images = (7 * 1024 - 4096) * 4 // 3  # a quarter of them and the text are 4096 tokens
    for name, layers in (("divprune", 0), ("fastv", 2)):
        (row,) = dataclasses.replace(asked[name], images=images).forecast((7 * 1024,)).rows
        for part in ("feed_forward", "projections"):
            whole, short = getattr(row.dense.prefill, part), getattr(few.dense.prefill, part)
            assert getattr(row.chosen.prefill, part) == pytest.approx(whole * layers / 32 + short * (32 - layers) / 32, rel=0.02)
        assert row.chosen.memory.cache == pytest.approx(row.dense.memory.cache * (layers + (32 - layers) * 4 / 7) / 32, rel=1e-3)
        (group,) = [group for group in row.chosen.groups if group.what == "stream"]
        assert group.choice == name and "4096 tokens" in group.sees
        none = asked[name].forecast((7 * 1024,))
        assert none.rows[0].chosen.prefill == none.rows[0].dense.prefill and any("--image-tokens" in note for note in none.notes)
