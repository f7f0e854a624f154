"""Plans: choice by configuration and length, JSON round trips, errors with a place."""

from __future__ import annotations

import dataclasses

import pytest
import sympy
import torch

from sparsify import SparseCache, explain
from sparsify.costs import crossovers
from sparsify.costs import device as hardware
from sparsify.costs.device import Device
from sparsify.costs.seconds import attention_seconds, expected_density
from sparsify.distributed.shards import Shard
from sparsify.errors import ConfigError, PlanError
from sparsify.masks.predicate import MaskKind, MaskPredicate
from sparsify.matching.sites import AttentionSite
from sparsify.planning import registry
from sparsify.planning.choose import make_plan
from sparsify.planning.config import config
from sparsify.planning.decision import Decision
from sparsify.planning.method import Context
from sparsify.planning.plan import Plan
from tests.support.harness import holding, run, strict
from tests.support.tiny_models import build

H200 = Device("cuda", "test", (9, 0), 680e12, 4.3e12, 8e-6)
CAUSAL = MaskPredicate(MaskKind.PROVED, causal=True)


def site(query_len: int = 65536, key_len: int | None = None, *, name: str = "model.layers.3.self_attn", **fields) -> AttentionSite:
    """A site outside any real graph; nodes exist to be read for sizes only."""
    key_len = key_len or query_len
    graph = torch.fx.Graph()
    nodes = {}
    for operand, heads, length in (("query", 32, query_len), ("key", 8, key_len), ("value", 8, key_len)):
        nodes[operand] = graph.placeholder(operand)
        nodes[operand].meta["example_value"] = torch.empty(1, heads, length, 128, device="meta")
    made = AttentionSite(
        name=name, layer=3, index=3, output=graph.placeholder("output"), **nodes, mask_node=None, mask=CAUSAL, batch=1, query_heads=32,
        kv_heads=8,
        query_len=query_len, key_len=key_len, qk_head_dim=128, v_head_dim=128, scale=0.088, softcap=0.0, dropout=0.0, dtype=torch.bfloat16,
        device=torch.device("cuda"), needs_grad=False, output_stride_order="bqhd",
    )  # fmt: skip
    return dataclasses.replace(made, **fields)


def plan_for(one: AttentionSite, context: Context | None = None, **options) -> Decision:
    settings = config.load(options, method_models=registry.discover(), environ={})
    plan, choices = make_plan([one], settings, context or Context(H200, "triton"))
    assert len(plan.decisions) == len(choices) == 1
    return plan.decisions[0]


def test_long_prefill_takes_the_sparse_method():
    assert plan_for(site(131072)).method == "xattention"


def test_short_prefill_stays_dense_and_says_from_where_sparse_pays():
    decision = plan_for(site(1024))
    assert decision.method == "dense"
    assert "starts to pay" in decision.refusals[0]


def test_exact_leaves_only_lossless_methods():
    assert plan_for(site(131072), exact=True).method == "dense"


def test_no_passes_leave_the_site_alone():
    decision = plan_for(site(), passes=[])
    assert (decision.method, decision.reason) == (None, "no method is enabled here")


def test_a_token_costs_what_its_widest_head_reads():
    seconds = lambda window: plan_for(site(1, 131072), passes=["sink_window"], sink_window={"window": window}).seconds
    narrow, mixed, wide = (seconds(window) for window in (64, [64] * 31 + [65536], 65536))
    assert narrow < mixed / 2 and mixed == wide < seconds([64] * 31 + [0])


def test_rules_choose_by_layer():
    rules = [{"layers": "3", "method": "sink_window", "window": 64}]
    decision = plan_for(site(), rules=rules)
    assert (decision.method, decision.options["window"]) == ("sink_window", 64)
    assert plan_for(site(), rules=[{"layers": "4-9", "method": "sink_window"}]).method == "xattention"


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"mask": MaskPredicate(MaskKind.OPAQUE, reason="the mask is an input of the graph")}, "input of the graph"),
        ({"needs_grad": True}, "no_grad"),
        ({"dropout": 0.1}, "eval"),
        ({"dtype": torch.float64}, "float64"),
        ({"near_miss": "weights are returned"}, "weights are returned"),
    ],
)
def test_refusals_name_the_reason(fields, words):
    decision = plan_for(site(**fields), passes=["xattention", "sink_window", "dense"])
    assert decision.method is None
    assert len(decision.refusals) == 3
    assert all(words in r for r in decision.refusals)


def test_long_exact_prefill_takes_the_hopper_kernel_where_there_is_one():
    hopper = Context(H200, "triton", family="hopper")
    assert plan_for(site(65536), hopper, exact=True).options == {"kernel": "attention"}
    assert plan_for(site(1024), hopper, exact=True).options == {"kernel": "sdpa"}
    assert plan_for(site(65536), exact=True).options == {"kernel": "sdpa"}
    assert plan_for(site(65536), hopper, exact=True, dense={"kernel": "sdpa"}).options == {"kernel": "sdpa"}
    assert plan_for(site(1, 65536), hopper, exact=True).options == {"kernel": "sdpa"}


def test_decode_is_never_estimated():
    decision = plan_for(site(1, 65536))
    assert decision.method == "dense"
    assert "decode" in decision.refusals[0]


def test_the_reference_never_pays_unless_forced():
    cpu = hardware.describe(torch.device("cpu"))
    assert plan_for(site(131072), Context(cpu, "reference", family="reference")).method == "dense"
    assert plan_for(site(131072), Context(cpu, "reference", min_length=0, family="reference")).method == "xattention"
    assert plan_for(site(131072), Context(cpu, "reference", family="cpp")).method == "xattention"


def test_thresholds_per_head_must_fit_the_heads():
    assert plan_for(site(131072), xattention={"threshold": [0.9] * 32}).method == "xattention"
    with pytest.raises(ConfigError, match=r"xattention.threshold: 3 numbers for 32 query heads"):
        plan_for(site(131072), xattention={"threshold": [0.9] * 3})


def test_layers_that_processes_divide_otherwise_than_by_heads_have_all_thresholds():
    """Where others have a part of them; what fits neither is an error."""
    part = Context(H200, "triton", heads=Shard(1, 2, ""))
    for numbers in (64, 32):
        assert plan_for(site(131072), part, xattention={"threshold": [0.9] * numbers}).method == "xattention"
    with pytest.raises(ConfigError, match=r"xattention.threshold: 3 numbers for 32 or 64 query heads"):
        plan_for(site(131072), part, xattention={"threshold": [0.9] * 3})


def test_json_round_trip(tmp_path):
    settings = config.load({}, method_models=registry.discover(), environ={})
    plan, _ = make_plan([site(), site(1024, name="model.layers.4.self_attn")], settings, Context(H200, "triton"))
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan


def test_a_saved_plan_decides(tmp_path):
    plan = Plan([Decision("model.layers.3.self_attn", 3, "prefill", {}, "", "sink_window", {"sinks": 1, "window": 7})])
    plan.save(tmp_path / "plan.json")
    decision = plan_for(site(), plan=str(tmp_path / "plan.json"))
    assert (decision.method, decision.options) == ("sink_window", {"last_rows": 0, "sinks": 1, "window": 7, "decode": True})


def test_a_plan_made_without_a_sparse_cache_serves_with_one(tmp_path):
    model, ids = build("llama", layers=1), torch.ones(1, 40, dtype=torch.int64)
    explain(model, input_ids=ids, use_cache=False, options={"passes": ["dense"]}).save(tmp_path / "plan.json")

    def prompt_and_token(model):
        cache = SparseCache(model.config, "snapkv", 16, window=4)
        model(input_ids=ids, **holding(cache))
        return model(input_ids=ids[:, :1], **holding(cache)).logits

    got = run(model, prompt_and_token, strict(plan=str(tmp_path / "plan.json")))
    assert [d.method for plan in got.plans for d in plan.decisions] == ["dense", None, "kv_evict"]


def test_a_plan_for_another_model_is_refused(tmp_path):
    Plan([]).save(tmp_path / "plan.json")
    with pytest.raises(PlanError, match=r"no entry for site model.layers.3"):
        plan_for(site(), plan=str(tmp_path / "plan.json"))


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 99}', '{"format": 1, "decisions": [{"nonsense": 1}]}'])
def test_what_is_not_a_plan_is_refused(text):
    with pytest.raises(PlanError):
        Plan.from_json(text)


def test_the_table_shows_every_site():
    settings = config.load({}, method_models=registry.discover(), environ={})
    plan, _ = make_plan([site(name=f"model.layers.{i}.self_attn") for i in (3, 5)], settings, Context(H200, "triton"))
    assert "2 of 2 attention sites rewritten" in str(plan)
    dense, chosen = (sum(getattr(d, name) for d in plan.decisions) for name in ("dense_seconds", "seconds"))
    assert f"{dense * 1e3:.2f} ms expected dense, {chosen * 1e3:.2f} ms as chosen" in str(plan)
    assert "xattention" in str(plan)


def test_crossover_falls_with_stride_and_density():
    """A coarser estimate and fewer blocks pay from shorter prompts on."""
    by_stride = [crossovers.sparse_from(H200, s, 128, 128, None, "triton") for s in (4, 8, 16)]
    assert by_stride == sorted(by_stride, reverse=True)
    sparse, denser = (crossovers.sparse_from(H200, 8, 128, 128, density, "triton") for density in (0.05, 0.5))
    assert sparse <= denser


def test_expected_density_follows_the_published_table():
    n = sympy.Symbol("n")
    for length, published in ((8192, 0.438), (16384, 0.275), (65536, 0.110), (131072, 0.069)):
        assert abs(float(expected_density(n).subs(n, length)) - published) < 0.03


def test_dense_seconds_match_the_counted_flops():
    flops = 4 * 32 * 128 * 65536**2 / 2
    seconds = float(attention_seconds(site().sizes, H200, kernel="sdpa"))
    assert flops / 800e12 < seconds < flops / 450e12, "no H200 is faster, and cuDNN is not slower"
