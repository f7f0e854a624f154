"""kv_evict: a SparseCache's decode step becomes one op, its prompt stays open to other methods, ordinary caches are refused."""

from __future__ import annotations

import contextlib
import functools
import operator
from types import SimpleNamespace

import pytest
import torch
from torch import fx
from transformers import StaticCache

import tests.support.cache_reference as reference
from sparsify import Pages, SparseCache, pipeline
from sparsify.api import collect_plans
from sparsify.errors import UnsupportedError, VerifyError
from sparsify.generation.caches.full import full_cache
from sparsify.matching.cache import find_cache
from sparsify.ops import cache as cache_ops
from sparsify.ops.selection import SelectCall
from sparsify.passes.kv_evict import KvEvict
from sparsify.planning.config import config
from sparsify.planning.registry import discover
from sparsify.rewriting import verify
from sparsify.rewriting.editor import Editor
from sparsify.rewriting.trace import Trace
from tests.support.harness import holding
from tests.support.tiny_models import VOCAB, build

PROMPT, TOKENS = 40, 12


@pytest.fixture(scope="module")
def llama():
    return build("llama")


@pytest.fixture(scope="module")
def ids():
    return torch.randint(3, VOCAB, (2, PROMPT), generator=torch.Generator().manual_seed(0))


def make(model, policy="snapkv", **options):
    options = {"budget": 48, **({"window": 8} if policy == "snapkv" else {}), **options}
    return SparseCache(model.config, policy=policy, **options)


@torch.no_grad()
def generate(model, ids, cache, inputs=(), **options):
    """Tokens and plans of a compiled generate(); options are the backend's."""
    torch._dynamo.reset()
    model.compile(backend="sparsify", fullgraph=True, options={"strict": True, "lower": "eager", **options})
    try:
        with collect_plans() as plans:
            return model.generate(ids, max_new_tokens=TOKENS, do_sample=False, **holding(cache), **dict(inputs)), plans
    finally:
        model._compiled_call_impl = None
        torch._dynamo.reset()


@torch.no_grad()
def graphs(model, calls, **options):
    """The rewritten graph (or the captured one) of each compiled call; `calls` are keyword arguments of the model."""
    found = []

    def backend(gm, inputs):
        settings = config.load(options, method_models=discover())
        plan, rewritten, _ = pipeline.rewrite_graph(gm, settings, Trace(None))
        found.append((rewritten or gm, plan))
        return gm.forward

    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    for call in calls:
        compiled(**call)
    torch._dynamo.reset()
    return found


def count(gm, target):
    return sum(node.target is target for node in gm.graph.nodes)


@pytest.mark.parametrize("policy", ["streaming_llm", "snapkv"])
@pytest.mark.samples(1)
def test_decode_is_one_op_and_the_prompt_stays_open(llama, ids, policy):
    cache = make(llama, policy)
    (prompt, first), (decode, second) = graphs(
        llama, [{"input_ids": ids, **holding(cache)}, {"input_ids": ids[:, :1], **holding(cache)}], min_length=0
    )
    assert count(decode, cache_ops.decode) == 2 and not count(decode, cache_ops.store) and not count(decode, cache_ops.attention)
    assert count(prompt, cache_ops.store) == 2 and not count(prompt, cache_ops.decode)
    if policy == "snapkv":  # StreamingLLM's prompt has a mask of its own, which is sparse already
        assert count(prompt, SelectCall.op()) == 2, "a sparse method chose for the prompt's attention"
    assert [d.method for d in second.decisions] == ["kv_evict"] * 2
    assert {d.phase for d in first.decisions if d.site.endswith(".cache")} == {"prefill"}
    state = next(n for n in decode.graph.nodes if n.target is cache_ops.decode).args[3:9]
    assert [tuple(n.meta["example_value"].shape) for n in state] == [(2, 2, 48, 16)] * 2 + [(2, 2, 48), (2, 2), (2,), ()]


@pytest.mark.parametrize("passes, ops", [(["xattention", "dense"], 2), (["kv_evict"], 2), (["xattention"], 0), ([], 0)])
def test_dense_brings_it_along(llama, ids, passes, ops):
    cache = make(llama)
    call = {"input_ids": ids[:, :1], **holding(cache)}
    (_, _), (decode, plan) = graphs(llama, [{"input_ids": ids, **holding(cache)}, call], passes=passes, min_length=0)
    assert count(decode, cache_ops.decode) == ops and count(decode, cache_ops.attention) == 2 - ops
    assert [d.method for d in plan.decisions if d.method] == ["kv_evict"] * ops


@pytest.mark.parametrize(
    "policy, lower",
    [
        ("streaming_llm", "eager"),
        ("snapkv", "eager"),
        pytest.param("snapkv", "inductor", marks=pytest.mark.slow),
        pytest.param("streaming_llm", "inductor", marks=pytest.mark.slow),
    ],
)
def test_tokens_are_those_of_the_uncompiled_cache(llama, ids, policy, lower):
    with torch.no_grad():
        want = llama.generate(ids, max_new_tokens=TOKENS, do_sample=False, **holding(make(llama, policy)))
    got, plans = generate(llama, ids, make(llama, policy), verify=True, lower=lower)
    assert torch.equal(got, want)
    assert len(plans) == 2 and not any(p.fallback for p in plans)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.samples(1)
def test_sparse_prompt_and_eviction_compose(llama, ids, padded):
    """A block selection that keeps everything, then eviction: the tokens are those of dense attention, then eviction."""
    mask = {"attention_mask": torch.tensor([[1] * PROMPT, [0] * 9 + [1] * (PROMPT - 9)])} if padded else {}
    with torch.no_grad():
        want = llama.generate(ids, max_new_tokens=TOKENS, do_sample=False, **holding(make(llama, budget=24)), **mask)
    options = {"passes": ["xattention", "kv_evict"], "min_length": 0, "xattention": {"threshold": 1.0}}
    got, plans = generate(llama, ids, make(llama, budget=24), mask, **options)
    assert torch.equal(got, want)
    assert {d.method for p in plans for d in p.rewritten} == {"xattention", "kv_evict"}


@torch.no_grad()
@pytest.mark.slow
def test_sink_logits_softcap_and_turned_sinks_reach_the_op(ids):
    for family, options, names in (
        ("gpt_oss", {}, ["sink_logits"]),
        ("llama", {"policy": "streaming_llm", "positions": "in_cache", "budget": 16}, ["inverse_frequencies"]),
    ):
        model = build(family, "eager" if family == "gpt_oss" else "sdpa")
        cache = make(model, **options)
        calls = [{"input_ids": ids, **holding(cache)}, {"input_ids": ids[:, :1], **holding(cache)}]
        decode = graphs(model, calls)[1][0]
        nodes = [n for n in decode.graph.nodes if n.target is cache_ops.decode]
        assert nodes and all(isinstance(n.kwargs[name], fx.Node) for name in names for n in nodes)


@torch.no_grad()
@pytest.mark.slow
def test_several_tokens_stay_two_ops(llama, ids):
    cache = make(llama)
    calls = [{"input_ids": ids, **holding(cache)}, {"input_ids": ids[:, :5], **holding(cache)}]
    gm, plan = graphs(llama, calls)[1]
    assert count(gm, cache_ops.store) == 2 and count(gm, cache_ops.attention) == 2
    assert all("several tokens" in d.reason for d in plan.decisions)


@torch.no_grad()
def test_ordinary_caches_are_refused_with_the_hint(llama, ids):
    for kind, cache in (("DynamicCache", None), ("StaticCache", StaticCache(config=llama.config, max_cache_len=64))):
        if cache is None:
            _, cache = llama(ids, use_cache=True, return_dict=False)
        else:
            llama(ids, **holding(cache))
        _, plan = graphs(llama, [{"input_ids": ids[:, :1], **holding(cache)}], passes=["kv_evict"])[0]
        assert plan.decisions and not plan.rewritten
        assert all(kind in d.reason and "sparsify.SparseCache(" in d.reason for d in plan.decisions)


@torch.no_grad()
def test_only_the_token_is_copied_into_a_cuda_graph(llama, ids):
    """Weights and the cache keep their addresses: else each replay copies them, and a changed input rules CUDA graphs out."""
    from torch._dynamo.backends.common import aot_autograd

    static = []

    def look(gm, inputs):
        static.append(len(inputs) - len(torch._guards.TracingContext.get().fw_metadata.static_input_indices))
        return gm.forward

    def backend(gm, inputs):
        _, rewritten, _ = pipeline.rewrite_graph(gm, config.load({}, method_models=discover()), Trace(None))
        assert count(rewritten, cache_ops.decode) == 2
        return aot_autograd(fw_compiler=look)(rewritten, inputs)

    cache = make(llama, batch_size=2, device="cpu", dtype=torch.float32)
    reference.through(llama, cache, ids, [PROMPT])
    torch._dynamo.reset()
    forward = torch.compile(llama, backend=backend, fullgraph=True)
    for again in (cache, make(llama, batch_size=2, device="cpu", dtype=torch.float32)):
        if again is not cache:
            reference.through(llama, again, ids, [PROMPT])
        forward(ids[:, :1], **holding(again))
    torch._dynamo.reset()
    assert static == [1]


@torch.no_grad()
def test_buffers_made_within_cuda_graphs_are_refused(llama, ids, monkeypatch):
    """CUDA graphs take back what a call allocated, and with it a cache that was not given its sizes."""
    options = config.load({"mode": "reduce-overhead"}, method_models=discover())

    def backend(gm, inputs, inside):
        for node in gm.graph.nodes:
            if node.target is cache_ops.store:  # this machine has no such device
                node.args[1].meta["example_value"] = SimpleNamespace(device=torch.device("cuda"))
        with pytest.raises(UnsupportedError, match=r"CUDA graphs take back.*batch_size=") if inside else contextlib.nullcontext():
            pipeline.lower(gm, inputs, options)
        return gm.forward

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", lambda gm, *_, **__: gm.forward)
    for inside, cache in ((True, make(llama)), (False, make(llama, batch_size=2, device="cpu", dtype=torch.float32))):
        torch._dynamo.reset()
        torch.compile(llama, backend=functools.partial(backend, inside=inside), fullgraph=True)(ids, **holding(cache))
    torch._dynamo.reset()


def step(between=None, readers=1):
    """A hand-written decode step with an optional node between store and attention."""
    graph = fx.Graph()
    shapes = {"q": (1, 4, 1, 8), "k": (1, 2, 1, 8), "v": (1, 2, 1, 8), "keys": (1, 2, 6, 8), "values": (1, 2, 6, 8)}
    example = {name: torch.zeros(shape) for name, shape in shapes.items()}
    example |= {"positions": torch.full((1, 2, 6), -1, dtype=torch.int32), "counts": torch.zeros(1, 2, dtype=torch.int32)}
    example |= {"seen": torch.zeros(1, dtype=torch.int32), "length": torch.zeros((), dtype=torch.int64)}
    nodes = {}
    for name, value in example.items():
        nodes[name] = graph.placeholder(name)
        nodes[name].meta["example_value"] = value
    state = [nodes[n] for n in ("keys", "values", "positions", "counts", "seen", "length")]
    options = {"pinned": 0, "recent": 6, "empty": False, "policy": "{}", "scale": 1.0, "softcap": 0.0, "version": cache_ops.VERSION}
    graph.call_function(cache_ops.store, (None, nodes["k"], nodes["v"], *state), {"is_token": None, **options})
    if between:
        graph.call_function(operator.add, (nodes[between], 1)).meta["example_value"] = example[between]
    options = {"scale": 1.0, "softcap": 0.0, "window": 0, "sinks": 0, "version": cache_ops.VERSION}
    found = []
    for _ in range(readers):
        args = (nodes["q"], nodes["keys"], nodes["values"], nodes["positions"], nodes["seen"])
        found.append(graph.call_function(cache_ops.attention, args, options))
        found[-1].meta["example_value"] = torch.zeros(1, 1, 4, 8).transpose(1, 2)
    graph.output(tuple(found))
    return fx.GraphModule({}, graph)


def test_only_a_whole_step_is_fused():
    assert find_cache(step())[0].near_miss == ""
    assert find_cache(step(between="q"))[0].near_miss == ""
    assert "between store and attention" in find_cache(step(between="seen"))[0].near_miss
    assert "2 attentions" in find_cache(step(readers=2))[0].near_miss


def test_the_store_is_accounted_for():
    """Verification misses a store that is erased without a node that has its effect."""
    gm = step()
    mapping = {}
    copy = pipeline.copy_graph(gm, mapping)
    site = find_cache(gm)[0].mapped(mapping)
    editor = Editor(copy.graph)
    KvEvict().rewrite(editor, site)
    editor.erase_orphans([site])
    copy.recompile()
    verify.structure(gm, copy, editor, 1)
    editor.superseded.clear()
    with pytest.raises(VerifyError, match="mutation was lost: cache_store"):
        verify.structure(gm, copy, editor, 1)


def test_dropping_eviction_is_seen(llama, ids):
    """The references of this file tell a cache that evicts from one that does not."""
    small, large = make(llama, budget=16), make(llama, budget=64)
    got = [reference.through(llama, cache, ids, [PROMPT - 4, 1, 1, 1, 1]) for cache in (small, large)]
    assert (got[0] - got[1]).abs().max() > 1e-3


@torch.no_grad()
def test_one_graph_serves_full_caches_of_all_sizes(llama, ids):
    want = llama(ids).logits[:, PROMPT - 3 :]
    torch._dynamo.reset()
    forward = torch.compile(llama, backend="sparsify", fullgraph=True, options={"strict": True, "lower": "eager"})
    with collect_plans() as plans:
        for capacity in (64, 300, 2000):
            cache = full_cache(llama.config, 2, capacity, "cpu")
            llama(ids[:, : PROMPT - 3], **holding(cache))
            got = [forward(ids[:, i : i + 1], **holding(cache)).logits for i in range(PROMPT - 3, PROMPT)]
            torch.testing.assert_close(torch.cat(got, 1), want, atol=1e-5, rtol=1e-4)
    assert [decision.method for plan in plans for decision in plan.decisions] == ["kv_evict"] * len(cache.layers)
    torch._dynamo.reset()


@pytest.mark.slow
def test_plans_say_which_pages_a_token_reads_and_count_what_they_read(llama, ids):
    text, formulas = [], []
    for read in (None, Pages(size=8, share=0.25), Pages(size=16, count=3)):
        cache = full_cache(llama.config, 2, 64, "cpu")
        if read is not None:
            cache = SparseCache(llama.config, "full", 64, batch_size=2, device="cpu", read=read)
        _, plans = generate(llama, ids, cache)
        steps = [d for plan in plans for d in plan.decisions if d.method == "kv_evict"]
        assert len(steps) == 2
        text.append(steps[0].reason)
        formulas.append(steps[0].formula)
    assert "pages" not in text[0]
    assert "reads 25 % of its pages of 8 slots, the first 4 tokens and the last 64" in text[1]
    assert "reads 3 of its pages of 16 slots" in text[2]
    assert len(set(formulas)) == 3
