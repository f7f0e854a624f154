"""Rules that match no site are named, once a compilation and only when that is known."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F

import sparsify

X = torch.randn(1, 2, 16, 8, generator=torch.Generator().manual_seed(0))
BASE = {"lower": "eager", "strict": True, "passes": ["dense"], "min_length": 0}


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()


class Attention(torch.nn.Module):
    def forward(self, x):
        return F.scaled_dot_product_attention(x, x, x, is_causal=True, scale=-0.5)


class Layer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.self_attn = Attention()

    def forward(self, x):
        return x + self.self_attn(x)


class Model(torch.nn.Module):
    """breaks: graph breaks after these layers."""

    def __init__(self, layers=3, breaks=()):
        super().__init__()
        self.layers = torch.nn.ModuleList(Layer() for _ in range(layers))
        self.breaks = breaks

    def forward(self, x):
        x = self.layers[0](x)
        if 0 in self.breaks:
            torch._dynamo.graph_break()
        x = self.layers[1](x)
        if 1 in self.breaks:
            torch._dynamo.graph_break()
        return self.layers[2](x)


def rule(*layers, method="dense", **options):
    return {"layers": list(layers), "method": method, **options}


def said(call):
    with torch.no_grad(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return [str(w.message) for w in caught if "sparsify" in str(w.message)]


def told(model, *rules, calls=1, **options):
    """Warnings of calls of a compiled model."""
    compiled = torch.compile(model, backend="sparsify", options={**BASE, "rules": list(rules), **options})
    return said(lambda: [compiled(X) for _ in range(calls)])


@pytest.mark.parametrize("layers", ["1", "0-2", "1-40", "layers.*", "layers.1.self_attn", "*", "layers.2.self_attn#0"])
def test_rules_that_match_say_nothing(layers):
    assert told(Model(), rule(layers), rule(layers, method=[])) == []


@pytest.mark.parametrize(
    "layers, words",
    [
        ("layer.*.self_attn", "the nearest are layers."),
        ("model.layers.*", "the nearest are layers."),
        ("40-47", "the layers here are 0 to 2"),
        ("7", "the layers here are 0 to 2"),
        ("layers.1.self_attn#1", "the nearest are layers.1.self_attn"),
    ],
)
@pytest.mark.parametrize("method", ["dense", []])
def test_rules_that_match_nothing_are_named(layers, words, method):
    (text,) = told(Model(), rule("1"), rule(layers, method=method), calls=2)
    assert f"rules[1] (layers = {layers}; method = {method or 'none'}) matches no site" in text and words in text


def test_one_warning_names_all():
    (text,) = told(Model(), rule("layer.*"), rule("*"), rule("9"))
    assert "rules[0]" in text and "rules[1]" not in text and "rules[2]" in text


@pytest.mark.parametrize("breaks", [(0,), (0, 1)])
def test_a_model_in_several_graphs_is_told_when_all_were_seen(breaks):
    assert told(Model(breaks=breaks), rule("0"), rule("1"), rule("2"), rule("layers.2.*")) == []
    (text,) = told(Model(breaks=breaks), rule("2"), rule("3"), calls=2)
    assert "rules[1]" in text and "rules[0]" not in text and "the layers here are 0 to 2" in text


def test_compiled_layer_by_layer_a_number_means_nothing():
    model = Model()
    options = {**BASE, "rules": [rule("1")]}
    for layer in model.layers:
        layer.compile(backend="sparsify", options=options)
    (text,) = said(lambda: model(X))
    assert "the sites here carry no number (self_attn), as where layers are compiled one by one" in text


def test_each_compilation_is_told():
    rules = [rule("layer.*")]
    for _ in range(2):
        assert len(told(Model(), *rules)) == 1
        torch._dynamo.reset()  # or the second model would run the first one's code
    options = {**BASE, "rules": rules}
    first, second = (torch.compile(Model(), backend="sparsify", options=options) for _ in range(2))
    assert len(said(lambda: (first(X), second(X)))) == 1  # one set of options


def test_a_match_in_one_model_does_not_speak_for_another():
    good, bad = {**BASE, "rules": [rule("2")]}, {**BASE, "rules": [rule("2")]}
    assert said(lambda: torch.compile(Model(), backend="sparsify", options=good)(X)) == []
    assert len(said(lambda: torch.compile(Layer(), backend="sparsify", options=bad)(X))) == 1


def test_rules_of_a_file_are_told_for_each_model(tmp_path, monkeypatch):
    (tmp_path / "rules.toml").write_text('lower = "eager"\n[[rules]]\nlayers = "7"\nmethod = "dense"\n')
    monkeypatch.setenv("SPARSIFY_CONFIG", str(tmp_path / "rules.toml"))
    models = [torch.compile(Model(), backend="sparsify") for _ in range(2)]
    assert len(said(lambda: [(model(X), torch._dynamo.reset()) for model in (*models, *models)])) == 2


def test_methods_of_another_kind_match_nothing():
    (text,) = told(Model(), rule("*.self_attn", method="ffn_skip"))
    assert "matches no site of its methods' kind" in text
    assert told(Model(), rule("*.cache", method="kv_evict")) == []  # another call may bring a SparseCache


def test_a_rule_without_methods_may_name_a_feed_forward_block():
    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.self_attn, self.mlp = Attention(), torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 8))

        def forward(self, x):
            x = self.self_attn(x)
            return x + self.mlp(x)

    assert told(Block(), rule("mlp*", method=[])) == []
    assert len(told(Block(), rule("mpl*", method=[]))) == 1


def test_graphs_without_sites_and_calls_that_fail_say_nothing():
    compiled = torch.compile(lambda x: x + 1, backend="sparsify", options={**BASE, "rules": [rule("7")]})
    assert said(lambda: compiled(X)) == []


def test_explain_tells_too():
    texts = said(lambda: sparsify.explain(Model(), options={**BASE, "rules": [rule("layer.*")]}, x=X))
    assert len(texts) == 1
