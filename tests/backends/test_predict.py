"""Launches are foreseen from a graph: those of its first call, and those of other lengths."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

import sparsify.backends.predict as predict
from sparsify import pipeline
from sparsify.backends import dispatch, registration
from sparsify.backends.attention import hopper
from sparsify.backends.codegen import ahead, launch
from sparsify.costs import device as hardware
from sparsify.costs import profile
from sparsify.ops.attention import VERSION
from sparsify.planning.config import config
from sparsify.planning.registry import discover
from sparsify.rewriting.trace import Trace

GPU = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def hopper_device(tmp_path, monkeypatch):
    """An H200 as far as launches are planned for it, on a machine without one."""
    facts = SimpleNamespace(multi_processor_count=132, major=9, minor=0, shared_memory_per_block_optin=232448)
    monkeypatch.setenv("SPARSIFY_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(launch, "properties", lambda device: facts)
    monkeypatch.setattr(dispatch, "_obstacle", lambda *args: None)
    if not hopper.ready(GPU):
        pytest.skip("a Triton that was not tried with Hopper kernels")


def captured(function, *inputs):
    """The graph of a function over operands whose length varies."""
    graphs = []

    def backend(gm, example_inputs):
        graphs.append(gm)
        return lambda *inputs: (torch.zeros(()),)

    torch._dynamo.reset()
    for operand in inputs:
        torch._dynamo.mark_dynamic(operand, 2)
    with torch.no_grad():
        torch.compile(function, backend=backend, fullgraph=True)(*inputs)
    return graphs[0]


def attend(query, key, value):
    return torch.ops.sparsify.attention(query, key, value, scale=0.1, causal=True, version=VERSION)[0]


def operands(length, heads=8, kv_heads=2):
    make = lambda heads: torch.zeros(1, heads, length, 128, dtype=torch.bfloat16)
    return make(heads), make(kv_heads), make(kv_heads)


def test_the_first_call_comes_first_then_other_lengths():
    graph = captured(attend, *operands(4096))
    found = [*predict.foreseen(graph, GPU)]
    # keys of 2 heads outgrow the device's cache at 24K tokens: from then on tiles run in another order
    assert [one.kernel for one in found] == ["attention"] * 5
    assert len(set(found)) == 1
    found = [*predict.foreseen(captured(attend, *operands(16384)), GPU)]
    assert len(set(found)) == 2 and found[0] != found[1]


def test_what_is_foreseen_is_what_a_launch_plans():
    (foreseen, *_) = predict.foreseen(captured(attend, *operands(200)), GPU)
    query, key, value = (torch.empty(tensor.shape, dtype=tensor.dtype, device="meta") for tensor in operands(333))
    with ahead.recording() as launched, launch.meaning(GPU):
        registration.SERVED["attention"](query, key, value, scale=0.3, causal=True)
    assert launched == [foreseen]


def test_equal_calls_are_planned_once(monkeypatch):
    calls = []
    served = registration.SERVED["attention"]
    monkeypatch.setitem(registration.SERVED, "attention", lambda *args, **kwargs: calls.append(args) or served(*args, **kwargs))
    twice = lambda query, key, value: attend(attend(query, key, value), key, value)
    assert [*predict.foreseen(captured(twice, *operands(256)), GPU)]
    assert len(calls) == 5


def test_a_call_that_looks_at_numbers_is_left(monkeypatch):
    def looking(query, *args, **kwargs):
        return query.sum().item()

    monkeypatch.setitem(registration.SERVED, "attention", looking)
    assert [*predict.foreseen(captured(attend, *operands(256)), GPU)] == []


def test_longer_calls_are_rewritten_without_a_guard(monkeypatch):
    """A prompt that SDPA serves: from a length on the Hopper kernel does, and no guard says so before it is asked."""
    found = hardware.Device.from_profile("cuda", profile.shipped("sm_90"))
    monkeypatch.setattr(hardware, "describe", lambda device: found)
    monkeypatch.setattr(hopper, "ready", lambda device: True)

    def plain(packed):
        query, key, value = packed.split([8, 2, 2], 1)
        key, value = (tensor.repeat_interleave(4, 1) for tensor in (key, value))
        return torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)

    settings = config.load({"exact": True}, method_models=discover())
    graph = captured(plain, torch.cat(operands(512), 1))
    env = next(mode.shape_env for n in graph.graph.nodes if (mode := getattr(n.meta.get("example_value"), "fake_mode", None)))
    plan, rewritten, _ = pipeline.rewrite_graph(graph, settings, Trace())
    guards, longer = len(env.guards), []
    again, _, _ = pipeline.rewrite_graph(graph, settings, Trace(), longer)
    assert len(env.guards) == guards
    assert [d.method for d in plan.decisions] == [d.method for d in again.decisions] == ["dense"]
    assert not [*predict.foreseen(rewritten, GPU)], "SDPA launches nothing of ours"
    assert {one.kernel for graph in longer for one in predict.foreseen(graph, GPU)} == {"attention"}


@pytest.mark.parametrize(
    "rows, options", [(1, {"num_warps": 4, "num_stages": 1, "launch_pdl": True}), (3, {"num_warps": 4, "num_stages": 1})]
)
def test_linear_layers_are_foreseen(rows, options):
    empty = lambda *shape: torch.empty(*shape, dtype=torch.bfloat16, device="meta")
    (launch,) = predict.launches("linear", (empty(rows, 512), empty(64, 512)), {"early": True}, GPU)
    assert launch.kernel == "linear" and dict(launch.options) == options


def test_nothing_is_started_without_a_gpu(monkeypatch):
    monkeypatch.setattr(ahead, "compiler", lambda target: pytest.fail("a process for a CPU"))
    predict.start(torch.device("cpu"))
    predict.compile_ahead(captured(attend, *operands(128)))
