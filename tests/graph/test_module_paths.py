"""A site is called by its module's path in the model that was compiled, whatever wraps the call and whoever makes it."""

from __future__ import annotations

import functools
import types
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sparsify import api
from sparsify.graph.module_paths import module_path
from tests.support.harness import strict
from tests.support.tiny_models import VOCAB, build

# -- sources as Dynamo writes them ---------------------------------------------------------------------------------------------------


def tree() -> nn.Module:
    """A module with the path model.layers.0.attn."""
    root, model, layer = nn.Module(), nn.Module(), nn.Module()
    layer.attn = nn.Identity()
    model.layers = nn.ModuleList([layer])
    root.model = model
    root.plain = [layer]
    root.holder = types.SimpleNamespace(layer=layer)
    root.owner = types.SimpleNamespace(root=root)
    return root


ROOT = tree()
METHOD = types.MethodType(lambda self: None, ROOT)
PATH = "model.layers.0.attn"
LOCALS = {
    "self": ROOT,
    "args": (ROOT, 1),
    "kwargs": {"model": ROOT, "not a name": ROOT},
    "fn": METHOD,
    "partial": functools.partial(print, ROOT, model=ROOT),
    "closure": (lambda inner: lambda: inner)(ROOT),
    "holder": types.SimpleNamespace(inner={"k": [ROOT]}),
    "optimized": torch.compile(ROOT, backend="eager"),
    "parallel": nn.DataParallel(ROOT),
    "list": nn.ModuleList([nn.Identity(), ROOT]),
    "model": ROOT.model,
    "reference": weakref.ref(ROOT),
}

SOURCES = [
    *(
        f"{root}.{PATH}"
        for root in (
            "L['self']",
            "L['args'][0]",
            'L["args"][0]',
            "L['kwargs']['model']",
            "L['kwargs']['not a name']",
            "G['self']",
            "G['reference']()",
            "L['fn'].__self__",
            "L['closure'].__closure__[0].cell_contents",
            "L['self']._orig_mod",
            "L['optimized']._orig_mod",
            "list.__getitem__(L['args'], 0)",
            "dict.__getitem__(L['kwargs'], 'model')",
        )
    ),
    "L['fn'].__self__._modules['model']._modules['layers'].0.attn",
    "dict.__getitem__(L['kwargs'], 'model')._modules['model'].layers.0.attn",
]
SOURCES_THAT_NEED_VALUES = [
    f"L['self'].owner.root.{PATH}",
    "object.__getattribute__(L['self'], 'model').layers.0.attn",
    "getattr(L['self'], 'model').layers.0.attn",
]


@pytest.mark.parametrize("source", [*SOURCES, *SOURCES_THAT_NEED_VALUES])
def test_the_path_starts_at_the_first_module(source):
    assert module_path(source, {"L": LOCALS, "G": LOCALS}) == PATH


@pytest.mark.parametrize("source", SOURCES)
def test_without_values_what_cannot_be_a_submodule_is_left_out(source):
    assert module_path(source) == PATH


@pytest.mark.parametrize(
    "source, path",
    [
        ("L['partial'].args[0].model.layers.0", "model.layers.0"),
        ("L['partial'].keywords['model'].model.layers.0", "model.layers.0"),
        ("L['holder'].inner['k'][0].model.layers.0", "model.layers.0"),
        ("L['parallel'].module.model.layers.0", "model.layers.0"),
        ("L['list'][1].model.layers.0", "1.model.layers.0"),
        ("L['list'].1.model.layers.0", "1.model.layers.0"),
        ("L['self'].plain[0].attn", "plain.0.attn"),
        ("L['self'].holder.layer.attn", "holder.layer.attn"),
        ("L['self'].model.layers.0._checkpoint_wrapped_module.attn", "model.layers.0.attn"),
        ("L['model'].layers.0.attn", "layers.0.attn"),
        ("L['self'].owner.root", ""),
        ("L['self']", ""),
        ("L['unknown'][0].model.layers.0", "model.layers.0"),
        ("SYNTHETIC_LOCAL['x'].model.layers.0", "model.layers.0"),
        ("self.model.layers.0", "model.layers.0"),
        ("L__self__.model.layers.0", "model.layers.0"),
        ("model.layers.0", "model.layers.0"),
        ("", ""),
    ],
)
def test_sources(source, path):
    assert module_path(source, {"L": LOCALS, "G": {}}) == path


# -- compiled calls ------------------------------------------------------------------------------------------------------------------


class Attention(nn.Module):
    def forward(self, x):
        heads = x.unflatten(-1, (2, 8)).transpose(1, 2)
        return F.scaled_dot_product_attention(heads, heads, heads, is_causal=True).transpose(1, 2).flatten(2)


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn = Attention()

    def forward(self, x):
        return x + self.attn(x)


class Stack(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([Layer(), Layer()])

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def decorated(function):
    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        return function(*args, **kwargs)

    return wrapper


class Decorated(Stack):
    forward = decorated(decorated(Stack.forward))


class Holding(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x)


def hooked():
    """As accelerate does it: the module's forward is replaced by a function that calls the old one."""
    model = Stack()
    model._old_forward = model.forward
    model.forward = functools.partial(lambda self, x: self._old_forward(x), model)
    return model


def with_hooks():
    model = Stack()
    model.register_forward_pre_hook(lambda module, inputs: None)
    model.layers[0].register_forward_hook(lambda module, inputs, output: None)
    return model


STACK = Stack()


def through(key):
    holder = {"list": [STACK], "dict": {"a": STACK}, "object": types.SimpleNamespace(a=STACK)}[key]
    read = {"list": lambda h: h[0], "dict": lambda h: h["a"], "object": lambda h: h.a}[key]
    return lambda x: read(holder)(x)


CALLS = {
    "model": (lambda: STACK, ""),
    "decorated": (Decorated, ""),
    "method": (lambda: STACK.forward, ""),
    "decorated_method": (lambda: Decorated().forward, ""),
    "call": (lambda: STACK.__call__, ""),
    "global": (lambda: lambda x: STACK(x), ""),
    "closure": (lambda: (lambda inner: lambda x: inner(x))(Stack()), ""),
    "closure_over_method": (lambda: (lambda inner: lambda x: inner(x))(Decorated().forward), ""),
    "partial": (lambda: functools.partial(lambda model, x: model(x), Stack()), ""),
    "list": (lambda: through("list"), ""),
    "dict": (lambda: through("dict"), ""),
    "object": (lambda: through("object"), ""),
    "hooked": (hooked, ""),
    "with_hooks": (with_hooks, ""),
    "sequential": (lambda: nn.Sequential(nn.Identity(), Stack()), "1."),
    "holding": (lambda: Holding(Decorated()), "inner."),
    "holding_compiled": (lambda: Holding(torch.compile(Stack(), backend="eager")), "inner."),
}


@torch.no_grad()
@pytest.mark.parametrize("call", CALLS)
def test_names_of_compiled_calls(call):
    make, prefix = CALLS[call]
    torch._dynamo.reset()
    with api.collect_plans() as plans:
        torch.compile(make(), backend="sparsify", options=strict(passes=["dense"]))(torch.randn(1, 4, 16))
    found = [(d.site, d.layer) for plan in plans for d in plan.decisions]
    assert found == [(f"{prefix}layers.{i}.attn", i) for i in range(2)]


@torch.no_grad()
def test_names_of_calls_in_place():
    for model in (Stack(), Decorated(), with_hooks()):
        torch._dynamo.reset()
        model.compile(backend="sparsify", options=strict(passes=["dense"]))
        with api.collect_plans() as plans:
            model(torch.randn(1, 4, 16))
        assert [d.site for plan in plans for d in plan.decisions] == ["layers.0.attn", "layers.1.attn"]


# -- transformers --------------------------------------------------------------------------------------------------------------------


def llama_calls(model):
    """What is compiled -> the function that is called, its inputs, what its sites' names start with, and how many layers it runs."""
    ids = torch.randint(3, VOCAB, (1, 8), generator=torch.Generator().manual_seed(0))
    hidden = model.model.embed_tokens(ids)
    turned = {"position_embeddings": model.model.rotary_emb(hidden, torch.arange(8)[None])}
    return {
        "model": (model, {"input_ids": ids}, "model.layers.{}."),
        "body": (model.model, {"input_ids": ids}, "layers.{}."),
        "layer": (model.model.layers[1], {"hidden_states": hidden, **turned}, ""),
        "model_forward": (model.forward, {"input_ids": ids}, "model.layers.{}."),
        "body_forward": (model.model.forward, {"input_ids": ids}, "layers.{}."),
        "function": (lambda input_ids: model(input_ids=input_ids).logits, {"input_ids": ids}, "model.layers.{}."),
    }


@torch.no_grad()
@pytest.mark.parametrize("what", ["model", "body", "layer", "model_forward", "body_forward", "function"])
@pytest.mark.samples(2)
def test_names_of_a_decoder(what):
    model = build("llama", layers=2)
    call, inputs, start = llama_calls(model)[what]
    torch._dynamo.reset()
    with api.collect_plans() as plans:
        torch.compile(call, backend="sparsify", options=strict(passes=["dense"]), fullgraph=True)(**inputs)
    layers = 2 if start else 1
    assert [d.site for plan in plans for d in plan.decisions] == [f"{start.format(i)}self_attn" for i in range(layers)]


@torch.no_grad()
def test_explain_compile_and_generate_agree_on_names():
    model = build("llama", layers=2)
    ids = torch.randint(3, VOCAB, (1, 8))
    names = ["model.layers.0.self_attn", "model.layers.1.self_attn"]
    options = strict(passes=["dense"])
    assert [d.site for d in api.explain(model, input_ids=ids, options=options).decisions] == names
    try:
        api.compile(model, **options)
        with api.collect_plans() as plans:
            model.generate(ids, max_new_tokens=2, do_sample=False)
        # the cache that generate() brings is a site of its own beside each layer's attention
        assert plans and all({d.site.removesuffix(".cache") for d in plan.decisions} == set(names) for plan in plans)
    finally:
        model._compiled_call_impl = None
        torch._dynamo.reset()
