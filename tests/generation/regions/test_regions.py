"""`sparsify.compile`: one region for each kind of decoder layer, made once, for whatever sizes follow; and what is captured whole."""

from __future__ import annotations

import threading

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, StaticCache

import sparsify
from sparsify import SparseCache, api
from sparsify.errors import ConfigError, UnsupportedError
from sparsify.generation.regions.regional import RegionalModel
from sparsify.planning.plan import Plan
from tests.support.cases import every
from tests.support.harness import holding, strict
from tests.support.tiny_models import VOCAB, build

CLOSE = {"rtol": 1e-4, "atol": 2e-5}
GREEDY = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
DENSE = strict(passes=["dense"])

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def prompt(batch: int, length: int, seed: int = 0, padding: int = 0) -> dict[str, torch.Tensor]:
    """Row 0 has `padding` tokens on the left; an attention mask where there is any."""
    ids = torch.randint(3, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))
    if not padding:
        return {"input_ids": ids}
    mask = torch.ones_like(ids)
    mask[0, :padding] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


def cuts(model, cache, ids, *lengths):
    """Logits of calls of so many tokens each, one after the other over a cache."""
    parts = ids.split(list(lengths), 1)
    return torch.cat([model(input_ids=part, **holding(cache)).logits for part in parts], 1)


def answer(model, inputs):
    """Tokens of generate() over a growing cache, which it would replace by a SparseCache."""
    return model.generate(**inputs, **GREEDY, **holding(DynamicCache(config=model.config)))


def rewritten(plans: list[Plan]) -> set[tuple[int, int]]:
    return {(len(plan.rewritten), len(plan.decisions)) for plan in plans}


# --- one region for all layers, whatever the sizes ---


@pytest.mark.parametrize("layers", [pytest.param(12, marks=pytest.mark.slow), 2])
@torch.no_grad()
def test_the_regions_are_the_same_for_few_and_many_layers_and_for_all_lengths(layers):
    model = build("llama", layers=layers)
    inputs = [prompt(1, 33), prompt(1, 20, 1), prompt(2, 25, 2, padding=7), prompt(3, 30, 3, padding=4)]
    want = [answer(model, one) for one in inputs]
    sparsify.compile(model, **DENSE)
    before, made = torch._dynamo.utils.counters["stats"]["unique_graphs"], []
    with api.collect_plans() as plans:
        for one, tokens in zip(inputs, want, strict=True):
            assert torch.equal(answer(model, one), tokens)
            made.append(len(plans))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] - before == 4
    assert made == [2, 2, 4, 4]  # a prompt and a token, without padding and with it
    assert rewritten(plans) == {(layers, layers)}
    assert [d.site for d in plans[0].decisions] == [f"model.layers.{i}.self_attn" for i in range(layers)]
    assert [d.layer for d in plans[0].decisions] == list(range(layers))
    assert {plan.capture for plan in plans} == {f"one region for {layers} layers"}


@torch.no_grad()
def test_sampling_gives_the_tokens_that_it_gives_uncompiled():
    model = build("llama", layers=2)
    how = {"max_new_tokens": 6, "do_sample": True, "top_k": 20, "repetition_penalty": 1.2, "num_return_sequences": 2, "pad_token_id": 0}

    def sampled():
        torch.manual_seed(7)
        return model.generate(**prompt(1, 20), **how)

    want = sampled()
    sparsify.compile(model, **DENSE)
    with api.collect_plans() as plans:
        assert torch.equal(sampled(), want)
    assert {(d.phase, d.method) for plan in plans for d in plan.rewritten} == {("prefill", "dense"), ("decode", "kv_evict")}


CACHES = {
    "dynamic": lambda config: DynamicCache(config=config),
    "lazy": lambda config: DynamicCache(),
    "static": lambda config: StaticCache(config=config, max_cache_len=80),
    "sparse": lambda config: SparseCache(config, sinks=2, window=30),
    "full": lambda config: SparseCache(config, "full", 32),
}


@pytest.mark.parametrize("kind", every(2, CACHES))
@torch.no_grad()
@pytest.mark.samples(1)
def test_turns_over_a_cache(kind):
    """First turn, tokens, a second turn and tokens again; then other lengths over another cache, for which nothing is compiled."""
    model, make = build("llama", layers=3), CACHES[kind]
    ids = prompt(1, 54)["input_ids"]
    one, two = (30, 1, 1, 20, 1, 1), (23, 1, 1, 1, 27, 1)
    want = [cuts(model, make(model.config), ids, *lengths) for lengths in (one, two)]
    sparsify.compile(model, strict=True, lower="eager")
    with api.collect_plans() as plans:
        torch.testing.assert_close(cuts(model, make(model.config), ids, *one), want[0], **CLOSE)
        made = len(plans)
        torch.testing.assert_close(cuts(model, make(model.config), ids, *two), want[1], **CLOSE)
    assert made == len(plans) == 3, [plan.decisions[0] for plan in plans]
    assert all(plan.serves == 3 for plan in plans)
    if kind == "sparse":
        assert {d.method for d in plans[1].decisions} == {"kv_evict"}


@pytest.mark.slow
@torch.no_grad()
def test_hybrid_layers_are_two_kinds():
    model = build("gemma3", layers=6)
    inputs = prompt(1, 30), prompt(1, 21, 1)
    want = [answer(model, one) for one in inputs]
    sparsify.compile(model, **DENSE)
    with api.collect_plans() as plans:
        for one, tokens in zip(inputs, want, strict=True):
            assert torch.equal(answer(model, one), tokens)
    assert {plan.serves for plan in plans} == {3}
    assert [("window" in plan.decisions[0].mask, plan.decisions[0].layer) for plan in plans[:2]] == [(True, 0), (False, 1)]
    assert rewritten(plans) == {(3, 3)}


@torch.no_grad()
def test_gradients_flow_through_regions():
    model = build("llama", layers=2)
    ids = prompt(1, 12)["input_ids"]
    with torch.enable_grad():
        want = torch.autograd.grad(model(ids, use_cache=False).logits.square().mean(), list(model.parameters()))
        sparsify.compile(model, lower="eager")
        with api.collect_plans() as plans:
            found = torch.autograd.grad(model(ids, use_cache=False).logits.square().mean(), list(model.parameters()))
    assert [plan.capture for plan in plans] == ["one region for 2 layers"]
    for one, other in zip(found, want, strict=True):
        torch.testing.assert_close(one, other, **CLOSE)


# --- rules, plans, reports ---


@pytest.mark.slow
@torch.no_grad()
def test_rules_by_layer_number_make_kinds():
    model = build("llama", layers=5)
    rules = [{"layers": "1-2", "method": []}, {"layers": "model.layers.4.self_attn", "method": "sink_window", "sinks": 2, "window": 9}]
    with torch.no_grad():
        whole = sparsify.explain(model, **prompt(1, 20), options=strict(passes=["dense"], rules=rules))
    sparsify.compile(model, **strict(passes=["dense"], rules=rules))
    with api.collect_plans() as plans:
        found = model(**prompt(1, 20)).logits
    assert [(plan.serves, plan.decisions[0].method) for plan in plans] == [(2, "dense"), (2, None), (1, "sink_window")]
    decided = {d.site: (d.method, d.options) for plan in plans for d in plan.decisions}
    assert decided == {d.site: (d.method, d.options) for d in whole.decisions}
    again = build("llama", layers=5)
    again.compile(backend="sparsify", options=strict(passes=["dense"], rules=rules))
    torch.testing.assert_close(found, again(**prompt(1, 20)).logits, **CLOSE)


@torch.no_grad()
@pytest.mark.slow
def test_a_plan_is_followed_layer_by_layer(tmp_path):
    model = build("llama", layers=3)
    rules = [{"layers": "1", "method": "sink_window", "sinks": 2, "window": 9}]
    sparsify.explain(model, **prompt(1, 20), options=strict(passes=["dense"], rules=rules)).save(tmp_path / "plan.json")
    sparsify.compile(model, **strict(plan=str(tmp_path / "plan.json")))
    with api.collect_plans() as plans:
        model(**prompt(1, 20))
    assert {d.layer: d.method for plan in plans for d in plan.decisions} == {0: "dense", 1: "sink_window", 2: "dense"}


@torch.no_grad()
def test_a_rule_that_matches_no_layer_is_told_once_the_call_has_ended():
    model = build("llama", layers=2)
    sparsify.compile(model, **strict(passes=["dense"], rules=[{"layers": "1", "method": []}, {"layers": "7", "method": "dense"}]))
    with pytest.warns(UserWarning, match=r"rules\[1\].*matches no site: the layers here are 0 to 1"):
        model(**prompt(1, 12))


@torch.no_grad()
def test_explain_shows_regions_and_the_density_of_each_layer():
    model = build("llama", layers=4, hidden_size=64)
    rules = [{"layers": "1,3", "method": "xattention", "threshold": 1.0}]
    options = strict(passes=["xattention", "dense"], xattention={"stride": 8, "block": 64, "threshold": 0.3}, rules=rules)
    sparsify.compile(model, **options)
    plan = sparsify.explain(model, **prompt(1, 200), options=options)
    assert [d.layer for d in plan.decisions] == [0, 1, 2, 3]
    assert plan.capture == "one region for 2 layers" and "(one region for 2 layers)" in str(plan)
    densities = [d.realised_density for d in plan.decisions]
    assert densities[1] == densities[3] == 1 and max(densities[0], densities[2]) < 1
    assert Plan.from_json(plan.to_json()).capture == plan.capture
    with api.collect_plans() as plans:  # explaining compiled nothing for the model itself
        model(**prompt(1, 200))
    assert len(plans) == 2


@torch.no_grad()
def test_verify_compares_regions():
    model = build("llama", layers=2)
    want = model.generate(**prompt(1, 20), **GREEDY)
    sparsify.compile(model, verify=True, **DENSE)
    with api.collect_plans() as plans:
        assert torch.equal(model.generate(**prompt(1, 20), **GREEDY), want)
    assert {(d.phase, d.method) for plan in plans for d in plan.rewritten} == {("prefill", "dense"), ("decode", "kv_evict")}


# --- what is captured whole ---


@pytest.mark.parametrize(
    ("family", "given", "reason"),
    [
        ("llama", {"passes": ["dense", "ffn_skip"]}, "ffn_skip acts across layers"),
        ("llama", {"mode": "reduce-overhead"}, "CUDA graphs are recorded over the whole model"),
        ("falcon", {}, "its attention does not go through transformers' AttentionInterface"),
    ],
)
@torch.no_grad()
@pytest.mark.samples(1)
def test_models_and_options_that_are_captured_whole(family, given, reason):
    model = build(family, layers=2)
    want = model(**prompt(1, 12)).logits
    sparsify.compile(model, **{**DENSE, **given})
    with api.collect_plans() as plans:
        torch.testing.assert_close(model(**prompt(1, 12)).logits, want, **CLOSE)
    (plan,) = plans
    assert plan.capture == f"whole: {reason}" and len(plan.decisions) >= 2 and not plan.serves
    assert sparsify.explain(model, **prompt(1, 12), options=given).capture == plan.capture


@torch.no_grad()
def test_whole_is_an_option_and_takes_regions_back():
    model = build("llama", layers=2)
    want = model(**prompt(1, 12)).logits
    sparsify.compile(sparsify.compile(model, **DENSE), whole=True, **DENSE)
    with api.collect_plans() as plans:
        torch.testing.assert_close(model(**prompt(1, 12)).logits, want, **CLOSE)
    assert [(plan.capture, len(plan.decisions)) for plan in plans] == [("", 2)]
    with pytest.raises(ConfigError, match="unknown key"):
        sparsify.compile(model, wohle=True)


@torch.no_grad()
def test_a_layer_that_computes_with_its_number_is_captured_whole(monkeypatch):
    model = build("llama", layers=3)
    kind = type(model.model.layers[0].self_attn)
    forward = kind.forward

    def numbered(self, hidden_states, **kwargs):
        output, weights = forward(self, hidden_states, **kwargs)
        return output * (self.layer_idx + 1), weights

    monkeypatch.setattr(kind, "forward", numbered)
    want = model(**prompt(1, 12)).logits
    sparsify.compile(model, **DENSE)
    with api.collect_plans() as plans:
        for _ in range(2):
            torch.testing.assert_close(model(**prompt(1, 12)).logits, want, **CLOSE)
    assert [len(plan.decisions) for plan in plans] == [3]
    assert plans[0].capture.startswith("whole: a layer cannot be captured as one graph")


@torch.no_grad()
def test_a_model_of_which_every_layer_has_its_own_scale():
    """gpt2 divides by the layer's number, when it is made: layers are of a kind each."""
    model = build("gpt2", layers=2, scale_attn_by_inverse_layer_idx=True)
    want = model(**prompt(1, 12)).logits
    sparsify.compile(model, **DENSE)
    with api.collect_plans() as plans:
        torch.testing.assert_close(model(**prompt(1, 12)).logits, want, **CLOSE)
    assert [plan.capture for plan in plans] == ["one region for 1 layer"] * 2
    many = sparsify.compile(build("gpt2", layers=9, scale_attn_by_inverse_layer_idx=True), **DENSE)
    assert many._compiled_call_impl.reason == "its 9 layers are of 9 kinds"


@pytest.mark.slow
@torch.no_grad()
def test_calls_that_are_captured_whole_leave_the_others_to_regions():
    model = build("llama", attn_implementation="eager", layers=2)
    inputs = prompt(1, 12)
    want = model(**inputs, output_attentions=True)
    states = model(**inputs, output_hidden_states=True).hidden_states
    sparsify.compile(model, lower="eager")
    with api.collect_plans() as plans:
        found = model(**inputs, output_attentions=True)
        torch.testing.assert_close(found.attentions, want.attentions, **CLOSE)
        found = model(**inputs, output_hidden_states=True)
        torch.testing.assert_close(found.hidden_states, states, **CLOSE)
        torch.testing.assert_close(model(**inputs).logits, want.logits, **CLOSE)
    assert [plan.capture for plan in plans][:2] == [
        "whole: output_attentions asks for what a layer computes inside",
        "one region for 2 layers",
    ]


@torch.no_grad()
@pytest.mark.slow
def test_a_cache_of_an_unknown_kind_is_captured_whole():
    class Other(DynamicCache):
        def __init__(self, config):
            super().__init__(config=config)
            self.layers = [type("OtherLayer", (type(layer),), {})() for layer in self.layers]

    model = build("llama", layers=2)
    ids = prompt(1, 14)["input_ids"]
    want = cuts(model, Other(model.config), ids, 12, 1, 1)
    sparsify.compile(model, **DENSE)
    with api.collect_plans() as plans:
        torch.testing.assert_close(cuts(model, Other(model.config), ids, 12, 1, 1), want, **CLOSE)
    assert {plan.capture for plan in plans} == {"whole: a cache with a OtherLayer"}


# --- what users do to layers ---


@torch.no_grad()
def test_hooks_of_layers_and_hooks_inside_of_them():
    model = build("llama", layers=3)
    inputs, layer = prompt(1, 12), model.model.layers[1]
    seen = []

    def before(module, args, kwargs):
        seen.append((module, tuple(args[0].shape)))
        return (args[0] * 2, *args[1:]), kwargs

    def run():
        hooks = [layer.register_forward_pre_hook(before, with_kwargs=True), layer.register_forward_hook(lambda m, a, out: out + 1)]
        one = model(**inputs).logits
        [hook.remove() for hook in hooks]
        inner = layer.mlp.register_forward_hook(lambda module, args, out: out * 3)
        two = model(**inputs).logits
        inner.remove()
        return one, two, model(**inputs).logits

    want = run()
    sparsify.compile(model, **DENSE)
    with api.collect_plans() as plans:
        torch.testing.assert_close(run(), want, **CLOSE)
    assert [plan.capture for plan in plans] == ["one region for 3 layers", "whole: model.layers.1.mlp has hooks"]
    assert seen == [(layer, (1, 12, 64))] * 2


@torch.no_grad()
@pytest.mark.parametrize("whole", [pytest.param(False, marks=pytest.mark.slow), True])
def test_hooks_that_come_and_go_are_seen_by_whole_graphs(whole):
    """torch's guards ask for no hooks where there were none; regions are captured whole for hooks inside of a layer."""
    model, inputs = build("llama", layers=2), prompt(1, 12)

    def results():
        handles = []
        for name, factor in (
            ("layers.1.mlp", 2),
            ("layers.1.mlp", 3),
            ("layers.0.self_attn.q_proj", -1),
            ("layers.1.mlp", 0.5),
            ("norm", 2),
        ):
            handles.append(model.model.get_submodule(name).register_forward_hook(lambda module, args, out, factor=factor: out * factor))
            yield model(**inputs).logits
        while handles:
            handles.pop(0).remove()
            yield model(**inputs).logits

    want = [*results()]
    sparsify.compile(model, whole=whole, **DENSE)
    torch.testing.assert_close(model(**inputs).logits, want[-1], **CLOSE)
    for one, other in zip(results(), want, strict=True):
        torch.testing.assert_close(one, other, **CLOSE)
    assert not any(torch.allclose(one, want[-1], **CLOSE) for one in want[:-1])


class Halved(TorchDispatchMode):
    """Someone's, that changes what a model computes."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        return result * 0.5 if func is torch.ops.aten.silu.default else result


@pytest.mark.parametrize("whole", [pytest.param(False, marks=pytest.mark.slow), True])
@pytest.mark.parametrize("within", [Halved, lambda: torch._dynamo.config.patch(disable=True)], ids=["mode", "disabled"])
@torch.no_grad()
def test_where_nothing_is_captured_the_model_runs_as_it_is_and_later_calls_compile(whole, within, caplog):
    model, inputs = build("llama", layers=2), prompt(1, 12)
    sparsify.compile(model, whole=whole, **{**DENSE, "strict": False})
    with caplog.at_level("INFO", logger="sparsify"), api.collect_plans() as plans:
        for scaling in (0.25, 0.5):  # before anything is compiled, and where that does not serve any more
            model.model.layers[0].self_attn.scaling, before = scaling, len(plans)
            with within():
                assert torch.equal(model(**inputs).logits, model._call_impl(**inputs).logits)
            assert len(plans) == before
            torch.testing.assert_close(model(**inputs).logits, model._call_impl(**inputs).logits, **CLOSE)
            assert len(plans) > before
    assert sum("runs uncompiled" in one.message for one in caplog.records) == 2


@torch.no_grad()
@pytest.mark.parametrize("whole", [False, True])
def test_where_nothing_is_captured_strict_raises(whole):
    model, inputs = build("llama", layers=2), prompt(1, 12)
    sparsify.compile(model, whole=whole, **DENSE)
    with (
        torch._dynamo.config.patch(disable=True),
        pytest.raises(UnsupportedError, match=r"nothing is compiled: .*disable is set"),
    ):
        model(**inputs)


@torch.no_grad()
@pytest.mark.parametrize("compiled", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_more_forms_of_a_layer_than_torch_keeps(compiled):
    """At a call's first layer, which starts again as a whole, and behind it."""
    model, inputs = build("llama", layers=3), prompt(1, 12)
    sparsify.compile(model, **DENSE)
    with torch._dynamo.config.patch(recompile_limit=compiled), api.collect_plans() as plans:
        for number in range(3):
            model.model.layers[number].self_attn.scaling = 2.0 + number
            torch.testing.assert_close(model(**inputs).logits, model._call_impl(**inputs).logits, **CLOSE)
    assert model._compiled_call_impl.reason.startswith("a layer was compiled in as many forms as torch keeps")
    assert "one region for 3 layers" in {plan.capture for plan in plans}


@torch.no_grad()
@pytest.mark.slow
def test_adapters_and_new_weights_are_seen():
    class Adapter(torch.nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base, self.low = base, torch.nn.Linear(base.in_features, base.out_features, bias=False)

        def forward(self, x):
            return self.base(x) + self.low(x)

    model = build("llama", layers=3)
    inputs = prompt(1, 12)
    sparsify.compile(model, **DENSE)
    model(**inputs)
    torch.manual_seed(1)
    attention, mlp = model.model.layers[1].self_attn, model.model.layers[2].mlp
    attention.q_proj, mlp.up_proj = Adapter(attention.q_proj), Adapter(mlp.up_proj)
    model.model.layers[0].self_attn.o_proj.weight = torch.nn.Parameter(torch.randn(64, 64))
    found = model(**inputs).logits
    model.double()
    doubled = model(**inputs).logits
    assert not model._compiled_call_impl.reason
    sparsify.compile(model, whole=True, passes=[], lower="eager")
    torch.testing.assert_close(doubled, model(**inputs).logits, **CLOSE)
    torch.testing.assert_close(found, model.float()(**inputs).logits, **CLOSE)


@torch.no_grad()
def test_layers_are_called_past_dynamo_once_they_are_compiled(monkeypatch):
    """And whatever guards ask for is seen: in a layer's modules, in code that a layer calls."""
    from transformers.models.llama import modeling_llama

    model, one = build("llama", layers=3), prompt(1, 20)["input_ids"]
    sparsify.compile(model, **DENSE)
    for _ in range(2):
        model(one, use_cache=False)
    through: list[int] = []
    for region in model._compiled_call_impl.shared._regions.values():
        slow = region.run._through_dynamo
        region.run._through_dynamo = lambda *given, slow=slow: (through.append(1), slow(*given))[1]

    def differs_from_eager() -> int:
        before = len(through)
        found, want = model(one, use_cache=False).logits, model._call_impl(one, use_cache=False).logits
        torch.testing.assert_close(found, want, **CLOSE)
        return len(through) - before

    assert differs_from_eager() == 0
    model.model.layers[1].input_layernorm.variance_epsilon = 0.5
    assert [differs_from_eager(), differs_from_eager()] == [1, 0]
    swapped = modeling_llama.apply_rotary_pos_emb
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", lambda q, k, cos, sin: swapped(q, k, cos, -sin))
    assert differs_from_eager() > 0 and differs_from_eager() == 0
    monkeypatch.undo()
    assert differs_from_eager() == 0
    torch._dynamo.reset()
    assert differs_from_eager() > 0


def test_transforms_of_torch_func_leave_other_calls_to_regions():
    """And the weights of a call's own are those that it computes with."""
    model, ids = build("llama", layers=2), prompt(1, 12)["input_ids"]
    weights = {name: weight.detach() * 1.5 for name, weight in model.named_parameters()}

    def logits(weights):
        return torch.func.functional_call(model, weights, (ids,), {"use_cache": False}).logits

    def results():
        with torch.no_grad():
            known = logits(weights), model(ids, use_cache=False).logits
        return *known, *torch.func.grad(lambda weights: logits(weights).square().mean())(weights).values()

    want = results()
    sparsify.compile(model, **DENSE)
    with api.collect_plans() as plans:
        for _ in range(2):
            for one, other in zip(results(), want, strict=True):
                torch.testing.assert_close(one, other, **CLOSE)
    assert not torch.equal(want[0], want[1]) and not model._compiled_call_impl.reason
    assert any(plan.capture == "one region for 2 layers" and len(plan.rewritten) == 2 for plan in plans)


@torch.no_grad()
def test_a_budget_that_is_a_share_of_the_prompt_leaves_regions_as_they_are():
    """A layer has its budget once it has run, which the next ones do not have yet."""
    model, ids = build("llama", layers=3), prompt(1, 40)["input_ids"]
    caches = [SparseCache(model.config, budget=0.5) for _ in range(2)]
    want = cuts(model, caches[0], ids, 36, 1, 3)
    sparsify.compile(model, **DENSE)
    with api.collect_plans() as plans:
        torch.testing.assert_close(cuts(model, caches[1], ids, 36, 1, 3), want, **CLOSE)
    assert not model._compiled_call_impl.reason and {plan.capture for plan in plans} == {"one region for 3 layers"}


@torch.no_grad()
def test_a_prompt_of_which_a_share_stays_is_rewritten():
    """Fewer tokens than the policy needs cannot be tried: the graph's guards bound one of several sizes that are equal."""
    model, ids = build("llama", layers=2), prompt(1, 90)["input_ids"]
    caches = [SparseCache(model.config, "snapkv", budget=0.5) for _ in range(2)]
    want = cuts(model, caches[0], ids, 86, 1, 3)
    sparsify.compile(model, **DENSE)
    with api.collect_plans() as plans:
        torch.testing.assert_close(cuts(model, caches[1], ids, 86, 1, 3), want, **CLOSE)
    assert [one.method for one in plans[0].decisions if not one.refusals] == ["dense"] * 2


@torch.no_grad()
def test_threads_share_regions():
    model = build("llama", layers=3)
    works = [prompt(1, 20, 0), prompt(1, 27, 1), prompt(1, 23, 2), prompt(1, 31, 3)]
    want = [model.generate(**one, **GREEDY) for one in works]
    sparsify.compile(model, **DENSE)
    found = [None] * len(works)
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]

    def work(i):
        found[i] = model.generate(**works[i], **GREEDY)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(works))]
    [thread.start() for thread in threads]
    [thread.join(120) for thread in threads]
    for one, other in zip(found, want, strict=True):
        assert torch.equal(one, other)
    assert isinstance(model._compiled_call_impl, RegionalModel)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] - before == 2


@torch.no_grad()
def test_what_another_thread_compiles_makes_no_text_packed(monkeypatch):
    """torch's flag that something is compiled is the process's: transformers then leaves in masks what tells packed texts apart."""
    options = strict(passes=["xattention"], xattention={"block": 64, "threshold": 0.1})
    inputs = {name: value for name, value in prompt(2, 200).items() if name == "input_ids"} | {"use_cache": False}
    found = []
    for compiling in (False, True):
        if compiling:
            monkeypatch.setattr("transformers.masking_utils.is_tracing", lambda *given: True)
        model = sparsify.compile(build("llama"), **options)
        with api.collect_plans() as plans, torch.no_grad():
            found.append(model(**inputs).logits)
        assert {(d.method, d.mask) for plan in plans for d in plan.decisions} == {("xattention", "causal")}
    assert torch.equal(*found)


@torch.no_grad()
def test_a_call_that_stops_between_layers_is_noticed():
    model, ids = build("llama", layers=2), prompt(1, 20)["input_ids"]
    cache = SparseCache(model.config, sinks=2, window=40)
    sparsify.compile(model, strict=True, lower="eager")
    cuts(model, cache, ids[:, :11], 10, 1)

    def stop(*unused):
        raise MemoryError

    hook = model.model.layers[1].register_forward_pre_hook(stop)
    with pytest.raises(MemoryError):
        cuts(model, cache, ids[:, 11:12], 1)
    hook.remove()
    with pytest.raises(sparsify.errors.CacheError, match="failed halfway"):
        cuts(model, cache, ids[:, 12:13], 1)


@torch.no_grad()
def test_generating_over_a_static_cache():
    model = build("llama", layers=2)
    how = {**GREEDY, "cache_implementation": "static"}
    inputs = prompt(1, 20), prompt(1, 27, 1)
    want = [model.generate(**one, **how) for one in inputs]
    sparsify.compile(model, **DENSE)
    with api.collect_plans() as plans:
        for one, tokens in zip(inputs, want, strict=True):
            assert torch.equal(model.generate(**one, **how), tokens)
    assert rewritten(plans) == {(2, 2)} and not model._compiled_call_impl.reason


@pytest.mark.slow
@torch.no_grad()
def test_layers_that_are_put_in_another_order():
    model, inputs = build("llama", layers=3), prompt(1, 20)
    sparsify.compile(model, **DENSE)
    answer(model, inputs)
    model.model.layers = torch.nn.ModuleList(reversed(model.model.layers))
    for number, layer in enumerate(model.model.layers):
        layer.self_attn.layer_idx = number
    with api.collect_plans() as plans:
        found, reason = answer(model, inputs), model._compiled_call_impl.reason
    assert not plans and not reason, "the regions that there are serve them"
    sparsify.compile(model, whole=True, **DENSE)
    assert torch.equal(found, answer(model, inputs))


@pytest.mark.slow
@torch.no_grad()
def test_a_wrong_call_is_the_callers_error_and_changes_nothing_for_others():
    model, ids = build("llama", layers=2), prompt(1, 20)["input_ids"]
    sparsify.compile(model, strict=True, lower="eager")
    cache = SparseCache(model.config, sinks=2, window=40)
    want = cuts(model, SparseCache(model.config, sinks=2, window=40), ids[:, :11], 10, 1)
    cuts(model, cache, ids[:, :10], 10)
    with pytest.raises(Exception, match="batch of 1, the call has 2"):
        cuts(model, cache, prompt(2, 1)["input_ids"], 1)
    assert not model._compiled_call_impl.reason
    cache = SparseCache(model.config, sinks=2, window=40)
    torch.testing.assert_close(cuts(model, cache, ids[:, :11], 10, 1), want, **CLOSE)


@torch.no_grad()
def test_a_mask_is_made_only_where_something_works_on_it():
    from sparsify.generation.regions import masks

    made = []
    call = {
        "batch_size": 2,
        "q_length": 3,
        "kv_length": 5,
        "q_offset": 2,
        "attention_mask": torch.tensor([[0, 1, 1, 1, 1], [1] * 5]).bool(),
    }

    def function(**given):
        made.append(given)
        return torch.ones(2, 1, 3, 5, dtype=torch.bool)

    mask = masks.postpone("sdpa", function, call)
    assert (mask.shape, mask.dtype, made) == ((2, 1, 3, 5), torch.bool, [])
    assert bool((~mask).any()) is False and mask[:, :, :, :4].shape == (2, 1, 3, 4) and len(made) == 1
    plain = {**call, "attention_mask": torch.ones(2, 5).bool()}
    assert masks.postpone("sdpa", function, {**plain, "q_length": 1}) is None
    assert masks.postpone("sdpa", function, {**plain, "q_length": 5, "q_offset": 0}) is None
    windowed = masks.postpone("sdpa", function, {**plain, "q_length": 1, "local_size": 4})
    assert windowed.recipe.call["attention_mask"] is None
    assert type(masks.postpone("eager", function, {**plain, "q_length": 1, "dtype": torch.float16})) is masks.PostponedMask
    assert masks.postpone("sdpa", function, {**call, "use_vmap": True}).sum() == 30 and len(made) == 2


@pytest.mark.slow
@torch.no_grad()
def test_regions_that_inductor_compiles():
    model = build("llama", layers=3)
    inputs = prompt(1, 33), prompt(1, 20, 1), prompt(2, 25, 2, padding=7)
    want = [answer(model, one) for one in inputs]
    sparsify.compile(model, passes=["dense"], strict=True)
    with api.collect_plans() as plans:
        for one, tokens in zip(inputs, want, strict=True):
            assert torch.equal(answer(model, one), tokens)
    assert rewritten(plans) == {(3, 3)}


@torch.no_grad()
def test_a_padded_prompt_without_a_cache_is_rewritten():
    """Its mask has sizes of its own, which guards hold equal to the hidden states'."""
    model, ids = build("llama"), torch.randint(3, VOCAB, (2, 200), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, :61] = 0
    want = model(ids, attention_mask=mask, use_cache=False).logits
    sparsify.compile(model, **strict(passes=["dense"]))
    with api.collect_plans() as plans:
        got = model(ids, attention_mask=mask, use_cache=False).logits
    assert [decision.method for plan in plans for decision in plan.decisions] == ["dense", "dense"]
    torch.testing.assert_close(got[mask.bool()], want[mask.bool()], atol=1e-5, rtol=1e-4)
    torch._dynamo.reset()
