"""minference: columns and diagonals of key blocks, from what the last queries look at, equal the mask that they stand for."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsify import api, testing
from sparsify.api import record_density
from sparsify.backends import divided_lists
from sparsify.backends.pattern_attention import pattern_attention
from sparsify.backends.select.patterns import select_pattern
from sparsify.errors import UnsupportedError
from sparsify.ops import block_lists
from sparsify.ops.pattern_attention import PatternAttentionCall
from sparsify.ops.patterns import ALWAYS, SelectPatternCall
from sparsify.passes.minference import MInference
from tests.support import attention_functions as attention
from tests.support.ir import changed_region, check_golden, rewritten_graph
from tests.support.patterns import BLOCK, chosen_blocks, masked


def options(columns: int | list[int] = 64, diagonals: int | list[int] = 64, queries: int = 8, mass: float | None = None, **more) -> dict:
    chosen = {"columns": columns, "diagonals": diagonals, "queries": queries, "block": BLOCK, "mass": mass}
    chosen |= {name: more.pop(name) for name in ("blocks", "divergence") if name in more}
    return {"passes": ["minference"], "strict": True, "min_length": 0, "lower": "eager", "minference": chosen, **more}


def run(function, inputs, given):
    torch._dynamo.reset()
    with torch.no_grad(), api.collect_plans() as plans:
        output = torch.compile(function, backend="sparsify", options=given, fullgraph=True)(*inputs)
    assert [d.method for plan in plans for d in plan.rewritten] == ["minference"]
    return output


@settings(max_examples=10, deadline=None)
@given(
    st.integers(1, 300),
    st.integers(0, 200),
    st.integers(0, 3),
    st.integers(0, 3),
    st.integers(1, 9),
    st.integers(0, 99),
    st.sampled_from([None, 0.3, 0.6, 0.9]),
    st.sampled_from([0, 0, 2]),
    st.sampled_from([None, 0.2]),
)
def test_lists_are_those_of_the_definition(query_len, before, columns, diagonals, queries, seed, mass, blocks, divergence):
    """Of chunks at any place too, for heads that share keys, in parts or at once."""
    query, key, _ = attention.operands(query_len=query_len, key_len=query_len + before, seed=seed)
    heads = query.shape[1]
    numbers = [columns + (h % 2) for h in range(heads)], [diagonals] * heads
    divergence = divergence if blocks else None
    own = [blocks * (h % 2) for h in range(heads)]
    want = chosen_blocks(query, key, *numbers, queries, mass=mass, blocks=own, divergence=divergence)
    chosen = {"columns": tuple(numbers[0]), "diagonals": (diagonals,), "mass": mass or 0.0}
    chosen |= {"blocks": tuple(own), "divergence": divergence or 0.0}
    call = SelectPatternCall(query, key, scale=query.shape[-1] ** -0.5, **chosen, queries=queries, block_size=BLOCK)
    call.check()
    for limit in (1, 1 << 30):
        counts, indices = select_pattern(call, limit=limit)
        assert indices.shape[-1] == min(call.key_blocks, columns + (heads > 1) + diagonals + max(own) + ALWAYS)
        found = block_lists.to_dense(counts, indices, call.key_blocks)
        assert torch.equal(found, want)
        listed = torch.arange(indices.shape[-1]) < counts[..., None]
        assert not ((indices[..., 1:] <= indices[..., :-1]) & listed[..., 1:]).any()


@pytest.mark.parametrize("left", [True, False])
def test_padded_rows_choose_by_their_own_last_tokens(left):
    query, key, value = attention.operands(query_len=300)
    visible = torch.ones(2, 300, dtype=torch.long)
    visible[0, slice(0, 150) if left else slice(150, None)] = 0
    got = run(attention.padded, (query, key, value, visible), options())
    heads = query.shape[1]
    keep = chosen_blocks(query, key, [1] * heads, [1] * heads, 8, visible)
    rows = visible[:, None, :, None].bool().expand_as(got)
    torch.testing.assert_close(got[rows], masked(query, key, value, keep, visible)[rows], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(got[rows], attention.padded(query, key, value, visible)[rows], atol=1e-2)


@pytest.mark.parametrize("hidden", [0, 100])
def test_choosing_and_attending_in_one_call(hidden):
    query, key, value = attention.operands(query_len=300)
    visible = None if not hidden else torch.arange(300).expand(query.shape[0], 300) >= hidden
    numbers = {"columns": (1,), "diagonals": (2,), "queries": 8, "block_size": BLOCK}
    flags = None if visible is None else visible.to(torch.uint8)
    call = PatternAttentionCall(query, key, value, key_flags=flags, scale=query.shape[-1] ** -0.5, **numbers)
    with record_density() as densities:
        output, lse = call.run()
    keep = chosen_blocks(query, key, [1] * query.shape[1], [2] * query.shape[1], 8, visible)
    torch.testing.assert_close(output[:, :, hidden:], masked(query, key, value, keep, visible)[:, :, hidden:], atol=1e-5, rtol=1e-5)
    assert lse[:, :, hidden:].isfinite().all() and len(densities) == 1 and densities[0] < 1


@pytest.mark.parametrize(
    "columns, diagonals, blocks",
    [([1, 0, 2, 0], [0, 2, 1, 0], [0] * 4), ([1 << 15, 0, 1, 0], [0, 0, 1, 3], [0] * 4), ([1, 0, 0, 2], [0, 1, 0, 0], [0, 0, 3, 1])],
)
def test_numbers_as_operands_are_those_of_constants(columns, diagonals, blocks):
    """Heads that see everything among them; and in parts, whose lists differ in width."""
    query, key, value = attention.operands(query_len=500)
    count = query.shape[1]
    numbers = {"columns": tuple(columns[:count]), "diagonals": tuple(diagonals[:count]), "blocks": tuple(blocks[:count])}
    shared = {"scale": query.shape[-1] ** -0.5, "queries": 8, "block_size": BLOCK}
    constant = PatternAttentionCall(query, key, value, **shared, **numbers)
    operands = {f"head_{name}": torch.tensor(values) for name, values in numbers.items()}
    given = PatternAttentionCall(query, key, value, **shared, **operands, most=constant.room)
    want = constant.selection().run()
    got = given.selection().run()
    assert got[1].shape == want[1].shape and torch.equal(got[0], want[0])
    keep = chosen_blocks(query, key, numbers["columns"], numbers["diagonals"], 8, blocks=numbers["blocks"])
    assert torch.equal(block_lists.to_dense(*got, given.key_blocks), keep)
    output = masked(query, key, value, keep)
    for call in (constant, given):
        for limit in (1, 1 << 30):
            with record_density() as densities:
                found, lse = pattern_attention(call, limit=limit)
            torch.testing.assert_close(found, output, atol=1e-5, rtol=1e-5)
            assert lse.isfinite().all() and densities == pytest.approx([block_lists.call_density(call, want[0])])


@pytest.mark.parametrize("left", [True, False])
def test_as_few_as_hold_a_share_of_what_the_last_queries_look_at(left):
    """Fewer where heads are sharp, and no more than the numbers given; of padded rows too."""
    query, key, value = attention.operands(query_len=600)
    visible = torch.ones(2, 600, dtype=torch.long)
    visible[0, slice(0, 150) if left else slice(450, None)] = 0
    heads, densities = query.shape[1], []
    for sharper, mass, most in ((1, 0.9, 640), (4, 0.9, 640), (4, 0.5, 640), (4, 0.9, 64)):
        inputs = sharper * query, key, value, visible
        with record_density() as found:
            got = run(attention.padded, inputs, options(columns=most, diagonals=most, mass=mass))
        keep = chosen_blocks(sharper * query, key, [most // BLOCK] * heads, [most // BLOCK] * heads, 8, visible, mass)
        rows = visible[:, None, :, None].bool().expand_as(got)
        torch.testing.assert_close(got[rows], masked(sharper * query, key, value, keep, visible)[rows], atol=1e-5, rtol=1e-5)
        densities += found
    assert 1 >= densities[0] > densities[1] > densities[2] and densities[1] > densities[3]


@pytest.mark.parametrize("left", [True, False])
def test_heads_choose_between_blocks_and_patterns_by_prompt(left):
    """A head whose last rows look at what means say visits blocks of their own choice, another one columns and diagonals."""
    query, key, value = attention.operands(query_len=500)
    heads = query.shape[1]
    key = key + 0.5 * torch.randn(2, key.shape[1], 1, key.shape[3], generator=torch.Generator().manual_seed(1))
    query[:, 0] *= 6  # sharp: means know little of it
    visible = torch.ones(2, 500, dtype=torch.long)
    visible[0, slice(0, 150) if left else slice(350, None)] = 0
    got = run(attention.padded, (query, key, value, visible), options(columns=64, diagonals=64, blocks=128, divergence=0.25))
    keep, alone, never = (
        chosen_blocks(query, key, [1] * heads, [1] * heads, 8, visible, blocks=[2] * heads, divergence=limit) for limit in (0.25, 9.0, 1e-9)
    )
    rows = visible[:, None, :, None].bool().expand_as(got)
    torch.testing.assert_close(got[rows], masked(query, key, value, keep, visible)[rows], atol=1e-5, rtol=1e-5)
    same = lambda table: {(b, h) for b in range(2) for h in range(heads) if torch.equal(keep[b, h], table[b, h])}
    assert same(alone) - same(never) and same(never) - same(alone) and len(same(alone) | same(never)) == 2 * heads


def test_blocks_of_a_divided_prompt_are_refused():
    call = PatternAttentionCall(*attention.operands(query_len=300), scale=1.0, columns=(1,), diagonals=(1,), blocks=(1,), sequence="group")
    with pytest.raises(UnsupportedError, match="divided text"):
        divided_lists.pattern_attention(call)


def test_operands_come_together():
    query, key, _ = attention.operands(query_len=300)
    call = SelectPatternCall(query, key, scale=1.0, head_columns=torch.ones(query.shape[1], dtype=torch.int64), most=1)
    with pytest.raises(UnsupportedError, match="both or none"):
        call.check()


def test_lists_of_heads_that_see_everything_are_made_in_parts():
    """Where the length is unknown they may not exist at once; short lists do."""
    for columns, op in (([1 << 20, 0, 0, 0], PatternAttentionCall.op()), ([64, 0, 0, 0], SelectPatternCall.op())):
        inputs = attention.operands(query_len=300)
        for operand in inputs:
            torch._dynamo.mark_dynamic(operand, 2)
        _, after, plan = rewritten_graph(attention.causal, inputs, options(columns=columns[: inputs[0].shape[1]]))
        assert [d.method for d in plan.rewritten] == ["minference"]
        assert op in {node.target for node in after.graph.nodes}


def test_expected_times_follow_the_mean_over_heads():
    """A head that sees everything costs its own part, not all heads'."""
    one = MInference(columns=(1 << 22, 0, 0, 0), diagonals=(0, 256, 256, 0))
    shares = [1, *(2 * 128 * (blocks + ALWAYS) / 65536 for blocks in (2, 2, 0))]
    assert float(one.share(65536)) == pytest.approx(sum(shares) / 4)
    assert float(MInference(columns=256, diagonals=256).share(4096)) == pytest.approx(2 * 128 * (4 + ALWAYS) / 4096)
    start = one._pays_from()
    assert float(one.share(start)) <= 0.5 < float(one.share(start - 128))
    assert MInference(columns=(1 << 22, 1 << 22, 0, 0))._pays_from() is None


def test_it_equals_its_mask_and_differs_from_dense():
    inputs = attention.operands(query_len=400)
    heads = inputs[0].shape[1]
    got = run(attention.causal, inputs, options(columns=[64, 0, 128, 0], diagonals=[0, 128, 64, 0]))
    keep = chosen_blocks(*inputs[:2], [1, 0, 2, 0][:heads], [0, 2, 1, 0][:heads], 8)
    torch.testing.assert_close(got, masked(*inputs, keep), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(got, attention.causal(*inputs), atol=1e-2)


def test_keep_all_is_dense():
    inputs = attention.operands(query_len=400)
    kept = MInference(block=BLOCK).keep_all()
    got = run(attention.causal, inputs, options(columns=kept.columns, diagonals=kept.diagonals))
    torch.testing.assert_close(got, attention.causal(*inputs), atol=1e-5, rtol=1e-5)


def test_one_graph_serves_all_lengths():
    torch._dynamo.reset()
    compiled = torch.compile(attention.causal, backend="sparsify", options=options(), fullgraph=True)
    with torch.no_grad(), api.collect_plans() as plans:
        for length in (300, 130, 500):
            inputs = attention.operands(query_len=length)
            for operand in inputs:
                torch._dynamo.mark_dynamic(operand, 2)
            heads = inputs[0].shape[1]
            keep = chosen_blocks(*inputs[:2], [1] * heads, [1] * heads, 8)
            torch.testing.assert_close(compiled(*inputs), masked(*inputs, keep), atol=1e-5, rtol=1e-5)
    assert len(plans) == 1


def test_golden():
    before, after, plan = rewritten_graph(attention.causal, attention.operands(query_len=300), options())
    assert plan.decisions[0].method == "minference"
    check_golden("minference", changed_region(before, after))


def test_what_it_refuses():
    for function, inputs, asked, reason in (
        (attention.full, attention.operands(query_len=300), options(), "not causal"),
        (attention.causal, attention.operands(query_len=1, key_len=300), options(), "one query row"),
        (attention.causal, attention.operands(query_len=300), options(min_length="auto"), "min_length|below"),
    ):
        _, after, plan = rewritten_graph(function, inputs, {**asked, "strict": False})
        assert after is None
        assert any(word in plan.decisions[0].refusals[0] for word in reason.split("|")), plan.decisions[0].refusals


@pytest.mark.parametrize(
    "bad", [{"columns": -1}, {"diagonals": ()}, {"queries": 0}, {"block": 32}, {"mass": 0}, {"mass": 1.1}, {"divergence": 0.1}]
)
def test_impossible_values(bad):
    with pytest.raises(ValueError):
        MInference(**bad)


def test_layers_of_a_model_share_a_region():
    pytest.importorskip("transformers")
    import sparsify
    from tests.support.tiny_models import VOCAB, build

    torch._dynamo.reset()
    ids = torch.randint(3, VOCAB, (2, 400), generator=torch.Generator().manual_seed(0))
    model = build("llama", layers=3, max_position_embeddings=1024)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight.mul_(6)
        dense = model(ids, use_cache=False).logits
        kept = MInference(block=BLOCK).keep_all()
        for given, same in ((options(columns=kept.columns, diagonals=kept.diagonals), True), (options(), False)):
            torch._dynamo.reset()
            sparsify.compile(model, **{**given, "passes": ["minference", "dense"]})
            with api.collect_plans() as plans, api.record_density() as densities:
                logits = [model(ids[:, :length], use_cache=False).logits for length in (400, 300)]
            assert [[d.method for d in plan.rewritten] for plan in plans] == [["minference"] * 3]
            assert len(densities) == 6 and all((density == 1) == same for density in densities)
            assert torch.allclose(logits[0], dense, atol=1e-4) == same
            assert torch.allclose(logits[1], dense[:, :300], atol=1e-4) == same


def test_explain_shows_what_was_visited():
    pytest.importorskip("transformers")
    import sparsify
    from tests.support.tiny_models import VOCAB, build

    torch._dynamo.reset()
    ids = torch.randint(3, VOCAB, (1, 600), generator=torch.Generator().manual_seed(0))
    model = build("llama", layers=2, max_position_embeddings=1024)
    plan = sparsify.explain(model, ids, use_cache=False, options={**options(), "passes": ["minference", "dense"]})
    with testing.record_blocks() as found, torch.no_grad():
        torch.compile(model, backend="sparsify", options={**options(), "passes": ["minference", "dense"]})(ids, use_cache=False)
    for decision, one in zip(plan.rewritten, found, strict=True):
        assert decision.realised_density == pytest.approx(one.density) and 0.3 < one.density < 0.9
        seen = plan.block_maps[decision.site]
        table = one.mask()[0]
        assert table.shape[-2:] == (10, 10) and one.indices.shape[-1] == 5
        assert torch.equal(seen.visited.bool(), table) and int(seen.visited.sum()) == int(one.counts.sum())
