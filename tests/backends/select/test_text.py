"""Generated block selection: text goldens, what is refused, the choice of variant, chunks and copies. No Triton, no GPU."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from sparsify.backends.select import triton
from sparsify.backends.select.source import INT8_TILING, POINTER_TILING, TMA_TILING, SelectSpec, SelectTiling, generate
from sparsify.errors import UnsupportedError
from sparsify.ops.estimate import EXAMPLES, Estimate
from sparsify.ops.selection import RULES, SelectCall
from tests.support.goldens import check_kernel_text

LISTED = SelectTiling(128, 64, 4, 3, 1, False)
STREAMED = {"reduce": "row", "streamed": True, "estimate": Estimate(merge=2, int8=True, peak=True)}
MASKS = {"key_flags": True, "segments": True, "window": "per_head", "has_start": True, "rule": "density"}


def spec(**changes):
    return SelectSpec(**{"dtype": "bf16", "head_dim": 128, "group": 4, "stride": 16, "block": 128, "tiling": TMA_TILING, **changes})


def describe(query, key, **changes):
    call = SelectCall.bind(query, key, **{"scale": 0.1, "causal": True, "stride": 16, "threshold": [0.9], **changes})
    call.check()
    return call


@pytest.mark.parametrize(
    "name, changes",
    [
        ("causal", {}),
        ("masked_density", MASKS),
        ("int8", {"estimate": Estimate(half=True, int8=True)}),
        ("pair", {"estimate": Estimate(merge=2)}),
        ("peak", {"estimate": Estimate(int8=True, peak=True), "tiling": INT8_TILING}),
        ("pointers_wide", {"tiling": POINTER_TILING, "wide": True, "rule": "taus"}),
        ("row", {"reduce": "row"}),
        ("row_listed", {**STREAMED, "listed": True, "stride": 4, "tiling": LISTED, "finer": 2}),
        ("row_grouped", {**STREAMED, "grouped": True, "rule": "taus"}),
        ("row_wide", {"reduce": "row", "wide": True, "rule": "taus", "window": "one"}),
        ("row_share", {"reduce": "row", "min_share": True}),
        ("row_share_wide", {"reduce": "row", "wide": True, "min_share": True}),
    ],
)
def test_golden_text(name, changes):
    check_kernel_text(f"select_{name}", generate(spec(**changes)))


@given(
    st.sampled_from([TMA_TILING, POINTER_TILING]),
    st.fixed_dictionaries(
        {
            **dict.fromkeys(("causal", "key_flags", "segments", "has_start", "wide", "min_share"), st.booleans()),
            "estimate": st.sampled_from(EXAMPLES),
            "window": st.sampled_from(["none", "one", "per_head"]),
            "rule": st.sampled_from([*RULES]),
            "reduce": st.sampled_from(["sum", "max", "row"]),
            "head_dim": st.sampled_from([64, 96, 128]),
        }
    ),
)
def test_every_spec_is_python_with_only_the_clauses_it_has(tiling, changes):
    assume(changes["reduce"] != "row" or changes["rule"] != "density")
    changes["min_share"] &= changes["reduce"] == "row"
    text = generate(spec(tiling=tiling, **changes))
    compile(text, "generated", "exec")
    assert "${" not in text and "%if" not in text
    assert ("query_last" in text) == changes["key_flags"] and ("row_floor" in text) == (changes["window"] != "none")
    assert ("q.load(" in text) == tiling.tma
    assert ("def prepare_cells" in text) == changes["estimate"].prepared
    assert ("tl.load(query_scales" in text) == changes["estimate"].int8
    assert ("min_share" in text) == changes["min_share"]
    assert all(len(line) <= 400 for line in text.splitlines())


@pytest.mark.parametrize(
    "changes, match",
    [
        ({"dtype": "fp64"}, "fp64"),
        ({"stride": 12}, "stride"),
        ({"rule": "none such"}, "rule"),
        ({"rule": "density", "reduce": "row"}, "a density under the row rule"),
        ({"min_share": True}, "a least share of a block pooled by 'max'"),
        ({"block": 24}, "block"),
    ],
)
def test_impossible_specs_are_refused(changes, match):
    with pytest.raises(UnsupportedError, match=match):
        spec(**changes)


def test_capability_decides_and_never_the_name():
    assert triton.tiling_for((9, 0), 232448) is TMA_TILING
    assert triton.tiling_for((10, 0), 232448) is TMA_TILING
    assert triton.tiling_for((9, 0), 232448, int8=True) is INT8_TILING
    assert triton.tiling_for((8, 0), 166912, int8=True) is POINTER_TILING
    assert triton.tiling_for((8, 0), 166912) is POINTER_TILING
    assert triton.tiling_for((12, 0), 101376) is POINTER_TILING


def test_clauses_that_change_nothing_are_left_out():
    query, key = torch.zeros(1, 4, 256, 64), torch.zeros(1, 2, 256, 64)
    plain = triton.kernel_spec(describe(query, key), TMA_TILING, 8192)
    same = describe(query, key, windows=[0, 0, 0, 0], threshold=[0.9] * 4)
    assert triton.kernel_spec(same, TMA_TILING, 8192) == plain
    assert triton.kernel_spec(describe(query, key, windows=[9, 9, 9, 9]), TMA_TILING, 8192).window == "one"
    with pytest.raises(UnsupportedError, match="float64"):
        triton.kernel_spec(describe(query.double(), key.double()), TMA_TILING, 8192)


@given(
    st.integers(1, 3), st.sampled_from([(1, 1), (8, 2), (32, 8)]), st.integers(1, 1 << 20), st.sampled_from([4, 16]), st.integers(14, 31)
)
def test_chunks_cover_everything_once_within_the_budget(batch, heads, length, stride, log2_bytes):
    query = torch.empty(batch, heads[0], length, 64, device="meta")
    call = describe(query, torch.empty(batch, heads[1], length, 64, device="meta"), stride=stride)
    chosen = triton.kernel_spec(call, TMA_TILING, 8192)
    chunks = list(triton.plan_chunks(call, chosen, 1 << log2_bytes))
    size = lambda c: math.prod(high - low for low, high in (c.batch, c.kv_heads, c.cells))
    assert sum(map(size, chunks)) == batch * heads[1] * call.query_cells and len(set(chunks)) == len(chunks)
    assert size(chunks[0]) == max(map(size, chunks))
    assert all(c.cells[0] % (16 * TMA_TILING.rows) == 0 for c in chunks)
    tiles = -(-call.key_cells // TMA_TILING.cols)
    least = call.group * min(call.query_cells, 16 * TMA_TILING.rows)
    rows = max(size(c) * call.group for c in chunks)
    assert rows == least or rows * tiles * (2 * chosen.tile_blocks + 4) <= 1 << log2_bytes


def test_a_million_tokens_stay_within_the_scratch_budget():
    call = describe(torch.empty(1, 32, 1 << 20, 128, device="meta"), torch.empty(1, 8, 1 << 20, 128, device="meta"))
    chosen = triton.kernel_spec(call, TMA_TILING, triton.LIMITS.fused_width)
    assert not chosen.wide
    chunk = next(triton.plan_chunks(call, chosen, triton.LIMITS.scratch_bytes))
    tiles = -(-call.key_cells // TMA_TILING.cols)
    assert 4 * (chunk.cells[1] - chunk.cells[0]) * tiles * (2 * chosen.tile_blocks + 4) <= 1 << 30


def test_one_launch_serves_a_whole_model_layer_at_128k():
    query, key = torch.empty(1, 32, 131072, 128, device="meta"), torch.empty(1, 8, 131072, 128, device="meta")
    for estimate, stride, launches in (("exact", 16, 1), ("half", 8, 1), ("exact", 8, 2)):
        call = describe(query, key, estimate=estimate, stride=stride)
        chosen = triton.kernel_spec(call, TMA_TILING, triton.LIMITS.fused_width)
        assert len(list(triton.plan_chunks(call, chosen, triton.LIMITS.scratch_bytes))) == launches


@pytest.mark.parametrize("length", [512, 509])
def test_operands_are_copied_only_where_cells_are_not_whole(length):
    query = torch.randn(2, length, 4, 64).transpose(1, 2)
    key = torch.randn(2, 2, length, 64)
    call = describe(query, key)
    chosen = triton.kernel_spec(call, TMA_TILING, 8192)
    (chunk,) = triton.plan_chunks(call, chosen, 1 << 30)
    queries, keys = triton.chunk_operands(call, chosen, chunk)
    assert torch.equal(queries[:, :, :length], query) and torch.equal(keys[:, :, :length], key)
    assert (queries.data_ptr() == query.data_ptr()) == (length == 512) == (keys.data_ptr() == key.data_ptr())
    assert queries.shape[2] == 512 and not queries[:, :, length:].any() and not keys[:, :, length:].any()


def test_padding_is_zero_in_the_copies():
    query, key = torch.full((2, 4, 128, 60), torch.nan), torch.full((2, 2, 128, 60), torch.nan)
    query[1], key[1] = 1.0, 1.0
    flags = torch.ones(2, 128, dtype=torch.uint8)
    flags[0] = 0
    call = describe(query, key, key_flags=flags)
    chosen = triton.kernel_spec(call, TMA_TILING, 8192)
    (chunk,) = triton.plan_chunks(call, chosen, 1 << 30)
    for values in triton.chunk_operands(call, chosen, chunk):
        assert values[0].eq(0).all() and values[1].eq(1).all()
        assert all(step * 4 % 16 == 0 for step in values.stride()[:-1])
