"""Crossovers as guards: one graph for each regime and none for each length, with the kernels chosen on both sides of every length."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import sparsify.backend
from sparsify import pipeline
from sparsify.api import collect_plans, explain
from sparsify.costs import crossovers, profile
from sparsify.costs.device import Device
from sparsify.planning import registry
from sparsify.planning.method import Context

H200 = Device.from_profile("cuda", profile.shipped("sm_90"))
EXACT, SPARSE = 256, 1024


@pytest.fixture
def hopper(monkeypatch):
    """A CPU that plans like an H200, with crossovers that a test can reach; what it plans runs on the reference."""
    monkeypatch.setattr(pipeline, "make_context", lambda device, config: Context(H200, "triton", None, "hopper"))
    monkeypatch.setattr(crossovers, "sparse_from", lambda *_, **__: SPARSE)
    monkeypatch.setattr(crossovers, "kernel_from", lambda *_, **__: EXACT)
    assert registry.discover()
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Attend(torch.nn.Module):
    """Attention over one input, so that query and key length are one symbol, as in a model."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        heads = x.unflatten(-1, (2, 64)).transpose(1, 2)
        return F.scaled_dot_product_attention(heads, heads.roll(1, -1), heads.flip(-1), is_causal=True)


def prompt(length: int) -> torch.Tensor:
    return torch.randn(1, length, 128, generator=torch.Generator().manual_seed(length)).to(torch.bfloat16)


def test_three_regimes_and_no_compilation_inside_one(hopper):
    graphs: list[str] = []

    def backend(gm, inputs):
        with collect_plans() as plans:
            compiled = sparsify.backend.sparsify(gm, inputs, options={"lower": "eager", "strict": True})
        graphs.extend(d.method + ":" + str(d.options.get("kernel", "")) for plan in plans for d in plan.decisions)
        return compiled

    compiled = torch.compile(Attend(), backend=backend, fullgraph=True)
    with torch.no_grad():
        for length in (200, 130, 250, 256, 300, 1000, 777, 1024, 1100, 1500, 140, 600, 1300):
            x = prompt(length)
            torch._dynamo.mark_dynamic(x, 1)
            out = compiled(x)
            if length < SPARSE:
                torch.testing.assert_close(out, Attend()(x), rtol=0.02, atol=0.02)
    assert sorted(graphs) == ["dense:attention", "dense:sdpa", "xattention:"]


@pytest.mark.parametrize("length, chosen", [(EXACT - 1, "sdpa"), (EXACT, "attention"), (SPARSE - 1, "attention"), (SPARSE, None)])
def test_a_crossover_belongs_to_the_regime_above(hopper, length, chosen):
    with torch.no_grad():
        plan = explain(Attend(), prompt(length))
    (decision,) = plan.decisions
    assert decision.options.get("kernel") == chosen
    assert (decision.method == "xattention") == (chosen is None)


class Two(torch.nn.Module):
    """Two attentions whose heads differ, so that their crossovers do."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for heads in (2, 1):
            y = x.unflatten(-1, (heads, 128 // heads)).transpose(1, 2)
            y = F.scaled_dot_product_attention(y, y.roll(1, -1), y.flip(-1), is_causal=True)
            x = y.transpose(1, 2).flatten(-2)
        return x


def test_layers_that_differ_share_three_regimes(hopper, monkeypatch):
    monkeypatch.setattr(crossovers, "sparse_from", lambda device, stride, block, head_dim, *_, **__: {64: 1024, 128: 700}[head_dim])
    monkeypatch.setattr(crossovers, "kernel_from", lambda device, kernel, head_dim, *_: {64: 256, 128: 400}[head_dim])
    graphs = []

    def backend(gm, inputs):
        with collect_plans() as plans:
            compiled = sparsify.backend.sparsify(gm, inputs, options={"lower": "eager", "strict": True})
        graphs.extend(tuple(d.method + ":" + str(d.options.get("kernel", "")) for d in plan.decisions) for plan in plans)
        return compiled

    compiled = torch.compile(Two(), backend=backend, fullgraph=True)
    with torch.no_grad():
        for length in (200, 300, 500, 800, 1100, 260, 399, 401, 699, 701, 1023, 1500):
            x = prompt(length)
            torch._dynamo.mark_dynamic(x, 1)
            compiled(x)
    assert len(graphs) == 3
    assert ("dense:sdpa", "dense:sdpa") in graphs
    assert ("xattention:", "xattention:") in graphs
