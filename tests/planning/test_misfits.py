"""Options by head or layer that fit no layer of a model are errors that say where, what was given and what is wanted."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import sparsify
from sparsify import api
from sparsify.errors import ConfigError, PlanError
from sparsify.planning import misfits, registry
from sparsify.planning.config import config
from sparsify.planning.decision import Decision
from sparsify.planning.plan import Plan
from sparsify.testing import bisect, compare, compare_tokens

pytest.importorskip("transformers")

from tests.support import attention_functions as attention
from tests.support.harness import strict
from tests.support.tiny_models import build

IDS = torch.randint(3, 100, (1, 70), generator=torch.Generator().manual_seed(0))
WANTED = "for 4 query heads: one for each"
WRONG = {  # of a model with two layers of four query and two KV heads
    "threshold": ({"xattention": {"threshold": [0.5] * 8}}, f"xattention.threshold: 8 numbers {WANTED}, or one for all"),
    "as KV heads": ({"xattention": {"threshold": [0.5] * 2}}, f"xattention.threshold: 2 numbers {WANTED}, or one for all"),
    "windows": ({"xattention": {"windows": [64]}}, f"xattention.windows: 1 numbers {WANTED}$"),
    "patterns": ({"xattention": {"patterns": [[64, 64], []]}}, f"xattention.patterns: 2 numbers {WANTED}$"),
    "window": ({"passes": ["sink_window"], "sink_window": {"window": [8, 0, 8]}}, "sink_window.window: 3 numbers"),
    "columns": ({"passes": ["minference"], "minference": {"columns": [64] * 3}}, "minference.columns: 3 numbers"),
    "diagonals": ({"passes": ["minference"], "minference": {"diagonals": [64] * 3}}, "minference.diagonals: 3 numbers"),
    "blocks": ({"passes": ["minference"], "minference": {"blocks": [64] * 3}}, "minference.blocks: 3 numbers"),
    "rule": (
        {"rules": [{"layers": "1", "method": ["xattention", "dense"], "threshold": [0.5] * 3}]},
        r"rules\[0\]: xattention.threshold: 3 numbers",
    ),
    "layer": (
        {"passes": ["token_select", "dense"], "token_select": {"layer": 2}},
        "token_select.layer: layer 2 does not exist: the model has 2",
    ),
    "head": (
        {"passes": ["token_select", "dense"], "token_select": {"layer": 0, "heads": [1, 4], "keep": 9}},
        "token_select.heads: head 4 does not exist: layers have 4",
    ),
    "images": ({"passes": ["fastv", "dense"], "fastv": {"layer": 7}}, "fastv.layer: layer 7 does not exist"),
}


@pytest.fixture(scope="module")
def llama():
    return build("llama", layers=2)


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize("strict", [True, False])
def test_it_is_an_error_at_once(llama, name, strict):
    options, message = WRONG[name]
    options = {"lower": "eager", "min_length": 0, "strict": strict, **options}
    inputs = {"input_ids": IDS, "use_cache": False}
    for ask in (
        lambda: sparsify.compile(llama, **options),
        lambda: sparsify.explain(llama, options=options, **inputs),
        lambda: compare(llama, inputs, options=options, keep_all=True),
        lambda: bisect(llama, inputs, options=options),
        lambda: compare_tokens(llama, IDS, options=options),
    ):
        with pytest.raises(ConfigError, match=message):
            ask()
    assert llama._compiled_call_impl is None


def test_what_does_not_act_is_not_looked_at(llama):
    settings = config.load({"passes": ["dense"], "xattention": {"threshold": [0.5] * 3}}, method_models=registry.discover())
    misfits.check_model(settings, None, llama.config)


def test_a_plan_file_says_which_decision(llama, tmp_path):
    decision = Decision("model.layers.1.self_attn", 1, "", {}, "", "xattention", {"threshold": [0.5] * 3})
    Plan([decision]).save(tmp_path / "plan.json")
    with pytest.raises(PlanError, match=r"plan.json: decisions\[0\].options.threshold: 3 numbers for 4 query heads"):
        sparsify.compile(llama, plan=str(tmp_path / "plan.json"))


class Configuration:
    def __init__(self, sub_configs=None, **fields):
        self.sub_configs = {name: type(part) for name, part in (sub_configs or {}).items()}
        vars(self).update(fields, **(sub_configs or {}))


def test_lists_may_be_for_some_layers_of_a_model_alone():
    """Towers, and layers with a window, may have another number of heads than the others."""
    model_config = Configuration(
        {"vision_config": Configuration(num_heads=6), "text_config": Configuration(num_attention_heads=4, swa_num_attention_heads=8)},
        num_key_value_heads=2,
    )
    for count, fits in ((4, True), (6, True), (8, True), (1, True), (2, False), (5, False)):
        settings = config.load({"xattention": {"threshold": [0.5] * count}}, method_models=registry.discover())
        if fits:
            misfits.check_model(settings, None, model_config)
        else:
            with pytest.raises(ConfigError, match=f"{count} numbers for 4 or 6 or 8 query heads"):
                misfits.check_model(settings, None, model_config)
        misfits.check_model(settings, None, object())  # nothing is known


@pytest.mark.parametrize("name", ["threshold", "windows", "patterns", "window", "columns"])
@pytest.mark.parametrize("strict", [True, False])
def test_a_graph_by_itself(name, strict):
    """`torch.compile(..., backend="sparsify")` knows no model."""
    torch._dynamo.reset()
    options, message = WRONG[name]
    compiled = torch.compile(attention.causal, backend="sparsify", options={"lower": "eager", "min_length": 0, "strict": strict, **options})
    with pytest.raises(Exception, match=message.rstrip("$")), torch.no_grad():
        compiled(*attention.operands(query_len=70))


class Two(nn.Module):
    """Attention of 4 heads, then of 2, as layers of one model may have them."""

    def forward(self, x):
        for heads in (4, 2):
            query = x.unflatten(-1, (heads, -1)).transpose(1, 2)
            x = nn.functional.scaled_dot_product_attention(query, query, query, is_causal=True).transpose(1, 2).flatten(2)
        return x


def test_graphs_whose_sites_differ_refuse_where_a_list_does_not_fit():
    torch._dynamo.reset()
    model, x = Two(), torch.randn(1, 70, 64)
    for count, methods in ((4, ["xattention", "dense"]), (2, ["dense", "xattention"])):
        options = strict(passes=["xattention", "dense"], xattention={"block": 64, "threshold": [0.5] * count})
        with api.collect_plans() as plans, torch.no_grad():
            torch.compile(model, backend="sparsify", options=options)(x)
        assert [d.method for d in plans[0].decisions] == methods
        assert any(f"{count} thresholds for" in refusal for d in plans[0].decisions for refusal in d.refusals)
    with pytest.raises(Exception, match=r"xattention.threshold: 3 numbers for 2 or 4 query heads"), torch.no_grad():
        torch.compile(model, backend="sparsify", options=strict(xattention={"threshold": [0.5] * 3}))(x)
