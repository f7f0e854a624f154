"""The C++ block selection against the definition and the reference: every rule, variant and mask, alone and together."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsify.backends import dispatch
from sparsify.backends.codegen import cpp as compiler
from sparsify.backends.select import cpp, reference
from sparsify.ops import block_lists
from sparsify.ops.estimate import EXAMPLES, Estimate
from sparsify.ops.selection import SelectCall
from tests.support.select_oracle import assert_selection

pytestmark = pytest.mark.skipif(compiler.obstacle() is not None, reason=str(compiler.obstacle()))

LENGTH, BLOCK = 260, 64


def call(query, key, **changes):
    found = SelectCall.bind(query, key, **{"scale": 0.25, "causal": True, "block_size": BLOCK, "threshold": [0.8], **changes})
    found.check()
    return found


def inputs(query_len=LENGTH, key_len=None, *, batch=1, heads=2, kv_heads=1, dim=16, seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    query = 4 * torch.randn(batch, heads, query_len, dim)
    return query.to(dtype), torch.randn(batch, kv_heads, key_len or query_len, dim).to(dtype)


def flags(batch=2, length=LENGTH):
    """Padding left and right, and sinks."""
    found = torch.ones(batch, length, dtype=torch.uint8)
    found[0, :70] = 0
    found[0, 70:72] = 3
    found[-1, 200:] = 0
    found[-1, 0] = 3
    return found


def listed(one: SelectCall) -> torch.Tensor:
    """What the first of two stages lists for each head."""
    found = block_lists.to_dense(*cpp.launch(one.stages[0]), one.key_blocks)
    return reference.for_heads(reference.of_groups(found, one), one)


def compare(one: SelectCall) -> torch.Tensor:
    """Importances are the reference's, and the lists are what they ask for."""
    fine = one.stages[1] if one.refine_stride else one
    possible, forced = reference.candidates(one)
    if one.refine_stride:
        possible = possible & listed(one)
        forced = forced & possible
    wanted = reference.importance(fine)
    own = torch.zeros_like(wanted)
    counts, indices = cpp.launch(one, importances=own)
    block_lists.check(counts, indices, one.query_len, one.key_len, int(one.start), one.block_size, causal=one.causal)
    if one.refine_stride:  # shares of the mass over the list
        wanted = wanted.masked_fill(~possible[..., None, :], 0)
        wanted = wanted / wanted.sum(-1, keepdim=True).clamp(min=1e-30)
    assert torch.equal(own.isnan().any(-1), wanted.isnan().any(-1))
    torch.testing.assert_close(own.nan_to_num(), wanted.nan_to_num(), atol=1e-5, rtol=1e-4)
    got = block_lists.to_dense(counts, indices, one.key_blocks)
    assert torch.equal(got, reference.choose(own, possible, forced, fine))
    return got


MASKS = {
    "none": {},
    "no causality": {"causal": False, "windows": [100]},
    "windows": {"windows": [0, 70, 0, 40], "threshold": [0.5, 0.9, 0.2, 0.7]},
    "padding": {"key_flags": flags()},
    "padding and windows": {"key_flags": flags(), "windows": [50]},
    "documents": {"segments": (torch.arange(LENGTH) // 90)[None].int()},
    "documents by row": {"segments": torch.stack([torch.arange(LENGTH) // 90, torch.arange(LENGTH) // 50]).int(), "key_flags": flags()},
    "start": {"query_start": torch.tensor([-30])},
}


@pytest.mark.parametrize("pool", ["sum", "max", "row"])
@pytest.mark.parametrize("mask", MASKS)
def test_masks(mask, pool):
    got = compare(call(*inputs(batch=2, heads=4, kv_heads=2), pool=pool, **MASKS[mask]))
    assert 0 < got.sum() < got.numel()


@pytest.mark.parametrize("pool", ["max", "row"])
@pytest.mark.parametrize("estimate", EXAMPLES, ids=str)
def test_variants(estimate, pool):
    query, key = inputs(heads=4, kv_heads=2, dtype=torch.bfloat16)
    compare(call(query, key, pool=pool, estimate=str(estimate), stride=8, windows=[0, 70, 0, 40], threshold=[0.5]))


RULES = {"density": {"stride": 16, "density": 0.4, "threshold": []}, "heads": {"threshold": [1.0, 0.3]}, "forced": {"threshold": [0.0]}}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("pool", ["sum", "max"])
def test_rules(pool, rule):
    compare(call(*inputs(), pool=pool, **RULES[rule]))


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("threshold", [0.0, 0.4, 1.0])
def test_a_least_share(mask, threshold):
    given = inputs(batch=2, heads=4, kv_heads=2)
    tables = [
        compare(call(*given, pool="row", **{**MASKS[mask], "threshold": [threshold], "min_share": share})) for share in (0.0, 0.3, 0.1)
    ]
    assert all(not (less & ~more).any() for less, more in itertools.pairwise(tables))
    assert torch.equal(tables[0], tables[-1]) == (threshold == 1)


@pytest.mark.parametrize("mask", ["none", "padding", "windows"])
@pytest.mark.parametrize("share", [0.0, 0.3])
def test_a_second_stage_scores_what_the_first_lists(mask, share):
    options = {"pool": "row", "stride": 16, "refine_stride": 4, "threshold": [0.2], "estimate": "int8+peak", **MASKS[mask]}
    one = call(*inputs(batch=2, heads=4, kv_heads=2), **{**options, "coarse_threshold": 0.9, "min_share": share})
    assert compare(one).sum() < listed(one).sum()


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 300), st.integers(1, 300), st.sampled_from([(1, 1), (6, 2), (5, 1)]), st.sampled_from([4, 8, 16]),
    st.sampled_from(["sum", "max", "row"]), st.sampled_from(EXAMPLES), st.sampled_from([32, 64, 128]), st.booleans(), st.integers(0, 9),
)  # fmt: skip
def test_sizes(query_len, key_len, heads, stride, pool, estimate, block, causal, seed):
    query, key = inputs(query_len, key_len, heads=heads[0], kv_heads=heads[1], dim=8, seed=seed)
    block = max(block, estimate.span(stride))
    compare(call(query, key, pool=pool, estimate=str(estimate), stride=stride, block_size=block, causal=causal, threshold=[0.6]))


def test_against_the_definition():
    for pool in ("sum", "max", "row"):
        one = call(*inputs(150, heads=2), pool=pool, block_size=32, windows=[0, 60], key_flags=flags(1, 150))
        assert_selection(*cpp.launch(one), one)


def test_a_row_that_is_not_finite_keeps_every_block_it_may_see():
    for value in (math.nan, math.inf, -math.inf):
        for pool in ("max", "row"):
            query, key = inputs()
            query[0, 0, 70] = value
            got = compare(call(query, key, pool=pool, threshold=[0.2]))
            assert got[0, 0, 1].tolist() == [True, True, False, False, False] and not got[0, 1, 3:].all()
    query, key = inputs()
    key[0, 0, 100] = math.inf  # seen by rows from 100 on
    got = compare(call(query, key, pool="row", threshold=[0.2]))
    assert got[0, 0, 3, :4].all() and not got[0, 0, 0, 1:].any()
    padded = torch.ones(1, LENGTH, dtype=torch.uint8)
    padded[:, 100] = 0
    assert compare(call(query, key, pool="row", threshold=[0.2], key_flags=padded)).sum() < got.sum()


def test_heads_threads_and_strides_do_not_change_the_answer():
    query, key = inputs(700, heads=12, kv_heads=2)
    one, before = call(query, key, pool="row", stride=4, threshold=[0.3]), torch.get_num_threads()
    wanted = cpp.launch(one)
    try:
        torch.set_num_threads(3)
        assert all(map(torch.equal, cpp.launch(one), wanted))
    finally:
        torch.set_num_threads(before)
    views = {name: getattr(one, name).transpose(1, 2).contiguous().transpose(1, 2) for name in ("query", "key")}
    assert all(map(torch.equal, cpp.launch(dataclasses.replace(one, **views)), wanted))
    part = dataclasses.replace(one, query=query[:, 7:9], key=key[:, 1:])
    assert all(torch.equal(got, whole[:, 7:9]) for got, whole in zip(cpp.launch(part), wanted, strict=True))


def test_thresholds_in_a_tensor():
    options = {"pool": "row", "stride": 4}
    one = call(*inputs(), **options, threshold=[0.2, 0.9])
    other = call(*inputs(), **options, threshold=[], head_thresholds=torch.tensor([0.2, 0.9]))
    assert all(map(torch.equal, cpp.launch(one), cpp.launch(other)))


def test_it_serves_large_calls_on_a_cpu_and_the_reference_small_ones(monkeypatch):
    used = []
    monkeypatch.setattr(cpp.cpp, "call", lambda *args, real=compiler.call: used.append(args[1]) or real(*args))
    query, key = inputs(1024, heads=1, dim=8)
    one = call(query, key, pool="row", estimate=str(Estimate(peak=True)))
    assert all(map(torch.equal, one.run(), cpp.launch(one))) and len(used) == 2
    assert torch.equal(block_lists.to_dense(*one.run(), 16), block_lists.to_dense(*reference.select_blocks(one), 16))
    call(*inputs(), pool="row").run()
    with dispatch.serving("reference"):
        one.run()
    assert used == ["sparsify_select_blocks"] * 3
    assert dispatch.first_families(torch.device("cpu"))["select_blocks"] == "cpp"
