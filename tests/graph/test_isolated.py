"""Looking at one model leaves what is compiled of every model as it was, and is not influenced by it."""

from __future__ import annotations

import contextlib
import gc
import weakref

import pytest
import torch
import torch.nn.functional as F

import sparsify
from sparsify import pipeline, testing
from sparsify.api import collect_plans
from sparsify.commands.calibrate import errors, feed_forward
from sparsify.commands.cost import meta_model
from sparsify.graph import compat, isolated
from sparsify.planning import registry
from sparsify.planning.config import config
from tests.support.tiny_models import build

OPTIONS = {"lower": "eager", "strict": True, "passes": ["dense"]}
IDS = torch.arange(3, 51)[None]


@pytest.fixture(scope="module")
def llama():
    return build("llama", layers=1)


pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def graphs(model, ids=IDS) -> int:
    """How many graphs a call compiles."""
    with torch.no_grad(), collect_plans() as plans:
        model(ids)
    return len(plans)


def forecast(model):
    with meta_model._capture(model) as (forward, captured), torch.no_grad():
        forward(input_ids=IDS, use_cache=False)
    assert len(captured) == 1


LOOKS = {
    "explain": lambda model: sparsify.explain(model, options=OPTIONS, input_ids=IDS),
    "compare": lambda model: testing.compare(model, IDS, options=OPTIONS),
    "compare_tokens": lambda model: testing.compare_tokens(model, IDS, options=OPTIONS, max_new_tokens=2),
    "errors": lambda model: errors.measure(model, IDS, {"passes": ["sink_window"]}),
    "similarities": lambda model: feed_forward.similarities(model, IDS),
    "forecast": forecast,
}


@pytest.mark.slow
def test_compiled_models_keep_their_code(llama):
    other, same = sparsify.compile(build("qwen2", layers=1), **OPTIONS), sparsify.compile(llama, **OPTIONS)
    assert [graphs(model) for model in (other, same, other, same)] == [1, 1, 0, 0]
    try:
        for name, look in LOOKS.items():
            look(llama)
            assert (graphs(other), graphs(same)) == (0, 0), name
    finally:
        same._compiled_call_impl = None


@pytest.mark.slow
def test_every_look_compiles_anew(llama):
    sparsify.compile(llama, **OPTIONS)
    try:
        graphs(llama)
        with torch._dynamo.config.patch(recompile_limit=1):
            plans = [sparsify.explain(llama, options=OPTIONS, input_ids=IDS) for _ in range(3)]
    finally:
        llama._compiled_call_impl = None
    assert len(plans[0].rewritten) == 1
    assert all(plan == plans[0] for plan in plans)


def test_sizes_do_not_become_dynamic():
    def attend(x):
        return F.scaled_dot_product_attention(x, x, x, is_causal=True, scale=-0.5)

    def sizes(backend_of, *lengths):
        with collect_plans() as plans, torch.no_grad():
            for length in lengths:
                with backend_of() as call:
                    call(torch.ones(1, 1, length, 8))
        return [plan.decisions[0].sizes["key_len"] for plan in plans]

    settings = config.load(OPTIONS, method_models=registry.discover())
    looks = lambda: isolated.compiled(attend, lambda gm, inputs: pipeline.compile_graph(gm, inputs, settings))
    served = torch.compile(attend, backend="sparsify", options=OPTIONS)
    serves = lambda: contextlib.nullcontext(served)
    assert sizes(looks, 16, 24) == ["16", "24"]
    assert sizes(serves, 32) == ["32"]
    assert sizes(looks, 40) == ["40"]
    assert "s" in sizes(serves, 48)[0]  # it has seen two lengths itself


class Broken(torch.nn.Module):
    """A graph break in a method that the model calls twice."""

    def half(self, x):
        x = F.scaled_dot_product_attention(x, x, x, is_causal=True, scale=-0.5)
        torch._dynamo.graph_break()
        return F.scaled_dot_product_attention(x, x, x, is_causal=True, scale=-0.25)

    def forward(self, x):
        return self.half(self.half(x) + 1)


@torch.no_grad()
def test_graph_breaks_leave_nothing_behind():
    model, x = Broken(), torch.randn(1, 2, 8, 8)
    compiled = torch.compile(model, backend="sparsify", options=OPTIONS)

    def run():
        with collect_plans() as plans:
            compiled(x)
        return len(plans)

    entries = lambda: len(torch._dynamo.eval_frame._debug_get_cache_entry_list(Broken.half.__code__))
    assert entries() == 0
    first = sparsify.explain(model, options=OPTIONS, x=x)
    assert len(first.rewritten) >= 2 and entries() == 0
    assert run() > 0
    before = entries()
    # before torch 2.12 what was compiled in isolation in an inner frame still counts towards the limit after a graph break
    with torch._dynamo.config.patch(recompile_limit=before + (1 if compat.ISOLATED else 4)):
        assert all(sparsify.explain(model, options=OPTIONS, x=x) == first for _ in range(3))
    assert run() == 0
    alive = [e for e in torch._dynamo.eval_frame._debug_get_cache_entry_list(Broken.half.__code__) if e.code is not None]
    assert len(alive) == before


def test_what_was_compiled_goes_away():
    gone = []

    def backend(gm, example_inputs):
        gone.append(weakref.ref(gm))
        return gm.forward

    with isolated.compiled(lambda x: x.sin() + 1, backend) as function:
        assert torch.equal(function(torch.ones(3)), torch.ones(3).sin() + 1)
    del function
    gc.collect()
    assert len(gone) == 1 and gone[0]() is None


def test_functions_of_every_sort():
    class Callable:
        def __call__(self, x, *, by=2):
            return x * by

    def scaled(x, by=3, *, plus=1):
        return x * by + plus

    seen = []
    backend = lambda gm, inputs: seen.append(gm) or gm.forward
    for function, want in ((scaled, 4), (Callable().__call__, 2), (Callable(), 2), (torch.compile(scaled, backend="eager"), 4)):
        with isolated.compiled(function, backend) as call:
            assert call(torch.ones(1)).item() == want
    assert len(seen) == 4
