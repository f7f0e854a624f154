"""dense: which form each mask becomes, that nothing changes in value, and that `passes = []` is Inductor's own graph."""

from __future__ import annotations

import pytest
import sympy
import torch
from torch._dynamo.utils import counters

from sparsify import api, pipeline
from sparsify.costs import profile
from sparsify.costs import seconds as costs
from sparsify.costs.device import Device
from sparsify.costs.sizes import AttentionSizes
from sparsify.masks.predicate import MaskKind, MaskPredicate, QueryStart
from sparsify.passes.dense import Dense
from sparsify.planning.method import Context, Proposal
from tests.planning.test_plan import site
from tests.support import attention_functions as attention
from tests.support.ir import changed_region, check_golden, rewritten_graph

OPTIONS = {"passes": ["dense"], "strict": True}


def run(function, inputs):
    before, after, plan = rewritten_graph(function, inputs, OPTIONS)
    return before, after, plan.decisions[0]


def check_equal(function, inputs, tolerance=1e-5):
    _, after, decision = run(function, inputs)
    assert decision.method == "dense"
    torch._dynamo.reset()
    with torch.no_grad():
        compiled = torch.compile(function, backend="sparsify", options={**OPTIONS, "lower": "eager"}, fullgraph=True)
        torch.testing.assert_close(compiled(*inputs), function(*inputs), atol=tolerance, rtol=tolerance)
    return after


def targets(gm):
    return [str(n.target) for n in gm.graph.nodes if n.op == "call_function"]


def test_causal_prefill_becomes_sdpa_without_mask_or_repeat():
    before, after, decision = run(attention.causal, attention.operands())
    assert decision.mask == "causal"
    check_golden("dense_causal", changed_region(before, after))
    check_equal(attention.causal, attention.operands())


def test_the_attention_op_serves_plain_prefill_when_asked():
    options = {**OPTIONS, "dense": {"kernel": "attention"}, "lower": "eager"}
    inputs = attention.operands()
    _, after, _ = rewritten_graph(attention.causal, inputs, options)
    assert "sparsify.attention.default" in targets(after)
    torch._dynamo.reset()
    with torch.no_grad():
        got = torch.compile(attention.causal, backend="sparsify", options=options, fullgraph=True)(*inputs)
    torch.testing.assert_close(got, attention.causal(*inputs), atol=1e-5, rtol=1e-5)


def test_a_chunk_becomes_the_op_since_sdpa_aligns_top_left():
    after = check_equal(attention.causal, attention.operands(query_len=5, key_len=13))
    assert "sparsify.attention.default" in targets(after)


def test_decode_needs_no_mask():
    after = check_equal(attention.causal, attention.operands(query_len=1, key_len=13))
    sdpa = next(n for n in after.graph.nodes if "scaled_dot_product" in str(n.target))
    assert sdpa.kwargs["is_causal"] is False
    assert sdpa.kwargs.get("attn_mask") is None


def test_padding_becomes_key_flags():
    inputs = (*attention.operands(), torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1], [1] * 8]))
    before, after, decision = run(attention.padded, inputs)
    assert decision.mask == "causal, padding"
    check_golden("dense_padded", changed_region(before, after))
    check_equal(attention.padded, inputs)


def test_a_mask_that_no_clause_says_is_refused():
    _, after, decision = run(attention.prefix, attention.operands())
    assert after is None
    assert decision.method is None
    check_golden("dense_refusal", "\n".join(decision.refusals) + "\n")


def test_no_mask_is_no_mask():
    after = check_equal(attention.full, attention.operands(query_len=5, key_len=9))
    assert "sparsify.attention.default" not in targets(after)


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 2e-2), (torch.float16, 2e-3)])
def test_half_precision(dtype, tolerance):
    check_equal(attention.causal, attention.operands(query_len=5, key_len=13, dtype=dtype), tolerance)


def test_dynamic_sizes_stay_symbolic():
    """One graph serves every length, and its mask's start is computed from the sizes."""

    def function(query, key, value):
        return attention.causal(query, key, value)

    torch._dynamo.reset()
    with torch.no_grad(), api.collect_plans() as plans:
        compiled = torch.compile(function, backend="sparsify", options={**OPTIONS, "lower": "eager"}, fullgraph=True)
        for query_len, key_len in ((5, 13), (7, 19), (6, 40)):
            inputs = attention.operands(query_len=query_len, key_len=key_len)
            for operand in inputs:
                torch._dynamo.mark_dynamic(operand, 2)
            torch.testing.assert_close(compiled(*inputs), attention.causal(*inputs), atol=1e-5, rtol=1e-5)
    assert len(plans) == 1
    assert len(plans[0].rewritten) == 1


def test_gradients_are_refused():
    query, key, value = attention.operands()
    torch._dynamo.reset()
    with api.collect_plans() as plans:
        out = torch.compile(attention.causal, backend="sparsify", options={**OPTIONS, "lower": "eager"})(query.requires_grad_(), key, value)
    out.sum().backward()
    assert query.grad is not None
    assert "gradients" in plans[0].decisions[0].refusals[0]


@pytest.mark.slow
def test_without_passes_inductor_gets_its_own_graph():
    """The artefact that plain Inductor cached serves the sparsify backend: nothing else gets slower."""
    inputs = attention.operands(dim=8)
    with torch.no_grad(), torch._inductor.utils.fresh_cache():
        torch._dynamo.reset()
        want = torch.compile(attention.causal, backend="inductor", fullgraph=True)(*inputs)
        torch._dynamo.reset()
        counters.clear()
        got = torch.compile(attention.causal, backend="sparsify", options={"passes": []}, fullgraph=True)(*inputs)
        assert counters["aot_autograd"]["autograd_cache_hit"] == 1
        assert torch.equal(got, want)


def test_a_rewritten_graph_can_be_cached():
    inputs = attention.operands(query_len=5, key_len=13, dim=8)
    with torch.no_grad(), torch._inductor.utils.fresh_cache():
        for expected in ("autograd_cache_miss", "autograd_cache_hit"):
            torch._dynamo.reset()
            counters.clear()
            got = torch.compile(attention.causal, backend="sparsify", options=OPTIONS, fullgraph=True)(*inputs)
            assert counters["aot_autograd"][expected] == 1
            assert counters["aot_autograd"]["autograd_cache_bypass"] == 0
            torch.testing.assert_close(got, attention.causal(*inputs))


def test_a_failing_pass_leaves_the_graph_with_one_warning(monkeypatch):
    monkeypatch.setattr(pipeline, "find_attention", lambda gm: 1 / 0)
    inputs = attention.operands()
    torch._dynamo.reset()
    with torch.no_grad(), pytest.warns(UserWarning, match="ZeroDivisionError") as caught:
        got = torch.compile(attention.causal, backend="sparsify", options={"lower": "eager"})(*inputs)
    assert len([w for w in caught if "sparsify" in str(w.message)]) == 1
    torch.testing.assert_close(got, attention.causal(*inputs))
    torch._dynamo.reset()
    with torch.no_grad(), pytest.raises(Exception, match="ZeroDivisionError"):
        torch.compile(attention.causal, backend="sparsify", options=OPTIONS)(*inputs)


def test_verify_compares_numbers_on_the_first_call(monkeypatch):
    from sparsify.errors import VerifyError
    from sparsify.passes.dense import Dense

    inputs = attention.operands()
    options = {**OPTIONS, "verify": True, "lower": "eager", "validation": False}
    torch._dynamo.reset()
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(attention.causal, backend="sparsify", options=options)(*inputs), attention.causal(*inputs))
    original = Dense.rewrite

    def broken(self, editor, site):
        original(self, editor, site)
        value = editor.replaced[site.output]
        value.kwargs = {**value.kwargs, "is_causal": False}

    monkeypatch.setattr(Dense, "rewrite", broken)
    torch._dynamo.reset()
    with torch.no_grad(), pytest.raises(VerifyError, match="differs"):
        torch.compile(attention.causal, backend="sparsify", options=options)(*inputs)


def test_a_masked_decode_step_is_the_ops():
    """SDPA with a mask tensor reads keys repeated for the query heads, and all of a static cache: at no length is it as fast."""
    context = Context(Device.from_profile("cuda", profile.shipped("sm_90")), "triton", family="hopper")
    masked = MaskPredicate(MaskKind.PROVED, causal=True, query_start=QueryStart(constant=sympy.Integer(77)))
    for length in (256, 131072):
        found = Dense().propose(site(1, length, mask=masked), context)
        assert isinstance(found, Proposal)
        split, sdpa = (costs.decode_seconds(AttentionSizes(key_len=length), context.device, kernel=k) for k in ("split", "masked"))
        assert split < sdpa
