"""The reference of `select_blocks` against the plain definition, its properties, and every pitfall of the published code."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsify.backends.select import cpp, reference
from sparsify.errors import UnsupportedError
from sparsify.ops import block_lists, streaming
from sparsify.ops.estimate import EXAMPLES
from sparsify.ops.selection import SelectCall
from tests.support.select_oracle import assert_selection

BLOCK = 32


def call(query, key, **changes):
    found = SelectCall.bind(query, key, **{"scale": 0.25, "causal": True, "block_size": BLOCK, "threshold": [0.9], **changes})
    found.check()
    return found


def inputs(query_len, key_len=None, *, batch=1, heads=2, kv_heads=1, dim=16, seed=0, peak=3.0, dtype=torch.float32):
    torch.manual_seed(seed)
    query = peak * torch.randn(batch, heads, query_len, dim)
    return query.to(dtype), torch.randn(batch, kv_heads, key_len or query_len, dim).to(dtype)


def select(query, key, **changes):
    counts, indices = reference.select_blocks(call(query, key, **changes))
    return counts, indices


def table(query, key, **changes):
    counts, indices = select(query, key, **changes)
    return block_lists.to_dense(counts, indices, indices.shape[-1])


@st.composite
def problems(draw):
    key_len = draw(st.integers(1, 150))
    query_len = draw(st.integers(1, 150))
    start = draw(st.none() | st.integers(-20, key_len))
    batch = draw(st.integers(1, 2))
    heads = draw(st.sampled_from([(1, 1), (2, 1), (2, 2)]))
    options = {
        "causal": draw(st.booleans()),
        "windows": draw(st.sampled_from([[], [40], [0, 20][: heads[0]]])),
        "pool": draw(st.sampled_from(["sum", "max", "row"])),
        "estimate": draw(st.sampled_from([one for one in EXAMPLES if not (one.group or one.int8)])),
        "stride": draw(st.sampled_from([4, 8, 16])),
        "threshold": draw(st.sampled_from([[0.0], [0.5], [0.9], [1.0], [0.3, 0.97][: heads[0]]])),
        "density": draw(st.sampled_from([0.0, 0.0, 0.25, 0.6])),
        "min_share": draw(st.sampled_from([0.0, 0.1, 0.3])),
    }
    options["density"] *= options["pool"] != "row"
    options["min_share"] *= options["pool"] == "row"
    masks = {}
    if draw(st.booleans()):
        flags = torch.ones(batch, key_len, dtype=torch.uint8)
        for b in range(batch):
            flags[b, : draw(st.integers(0, key_len))] = 0
            if draw(st.booleans()):
                flags[b] = flags[b].flip(0)
            flags[b, int(flags[b].argmax())] |= 2 * int(flags[b].max())
        masks["key_flags"] = flags
    if draw(st.booleans()):
        masks["segments"] = (torch.arange(key_len) // draw(st.integers(5, 60)))[None].int()
    if start is not None:
        masks["query_start"] = torch.tensor([start])
    query, key = inputs(query_len, key_len, batch=batch, heads=heads[0], kv_heads=heads[1], dim=8, seed=draw(st.integers(0, 99)))
    return query, key, {**options, **masks}


@settings(max_examples=40, deadline=None)
@given(problems())
def test_equals_the_definition(problem):
    query, key, options = problem
    counts, indices = select(query, key, **options)
    assert_selection(counts, indices, call(query, key, **options))
    start = options.get("query_start", key.shape[2] - query.shape[2])
    block_lists.check(counts, indices, query.shape[2], key.shape[2], int(start), BLOCK, causal=options["causal"])


@settings(max_examples=25, deadline=None)
@given(problems(), st.floats(0, 1.2), st.floats(0, 1.2))
def test_a_higher_threshold_gives_a_superset(problem, one, other):
    query, key, options = problem
    low, high = (table(query, key, **{**options, "density": 0.0, "threshold": [t]}) for t in sorted((one, other)))
    assert not (low & ~high).any()


@pytest.mark.parametrize("pool", ["sum", "max", "row"])
def test_sparse_differs_from_dense_and_threshold_one_is_dense(pool):
    query, key = inputs(512)
    kept = table(query, key, pool=pool, threshold=[0.6])
    every = table(query, key, pool=pool, threshold=[1.0])
    assert every.sum() == 2 * 16 * 17 / 2
    assert 0 < kept.sum() < every.sum()


@pytest.mark.parametrize("pool", ["sum", "max", "row"])
def test_threshold_zero_keeps_sink_and_diagonal(pool):
    query, key = inputs(256)
    want = torch.eye(8, dtype=torch.bool)
    want[:, 0] = True
    assert torch.equal(table(query, key, pool=pool, threshold=[0.0]), want.expand(1, 2, 8, 8))


@pytest.mark.parametrize("pool", ["sum", "max", "row"])
def test_each_head_has_its_threshold(pool):
    query, key = inputs(512)
    both = table(query, key, pool=pool, threshold=[0.5, 0.99])
    assert torch.equal(both[:, 0], table(query, key, pool=pool, threshold=[0.5])[:, 0])
    assert torch.equal(both[:, 1], table(query, key, pool=pool, threshold=[0.99])[:, 1])
    assert not torch.equal(both[:, 0], both[:, 1])


def test_a_diagonal_off_the_block_grid_forces_two_blocks():
    query, key = inputs(64, 64 + 40)
    kept = table(query, key, threshold=[0.0])[0, 0]
    assert kept.int().tolist() == [[1, 1, 1, 0], [1, 0, 1, 1]]


# The pitfalls of the published code, in the order of its review.


@pytest.mark.parametrize("pool", ["sum", "max", "row"])
@pytest.mark.parametrize("length", [256, 250])
def test_a_chunk_selects_what_the_whole_prompt_selects(pool, length):
    query, key = inputs(length)
    whole = table(query, key, pool=pool)
    for first in (32, 96, 192):
        assert torch.equal(table(query[:, :, first:], key, pool=pool), whole[:, :, first // BLOCK :])
    early = table(query[:, :, 64:128], key[:, :, :128], pool=pool)
    assert torch.equal(early, whole[:, :, 2:4, :4])
    fixed = table(query[:, :, 64:128], key, pool=pool, query_start=torch.tensor(64))
    assert torch.equal(fixed, whole[:, :, 2:4])


def test_without_padding_flags_change_nothing():
    query, key = inputs(200)
    flags = torch.ones(1, 200, dtype=torch.uint8)
    assert torch.equal(table(query, key), table(query, key, key_flags=flags))


def test_missing_tokens_take_no_mass():
    query, key = inputs(8 * BLOCK + 3)
    one = call(query, key, pool="sum")
    mass = reference.importance(one).sum(-1)
    assert torch.allclose(mass[..., :-1], torch.full_like(mass[..., :-1], BLOCK / 8), atol=1e-5)
    assert torch.allclose(mass[..., -1], torch.ones_like(mass[..., -1]), atol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_by_whole_blocks_only_shifts_the_lists(side):
    query, key = inputs(192)
    plain = table(query, key)
    pad = torch.full((1, 2, 64, 16), torch.nan)
    where = (lambda x, n: torch.cat([n, x], 2)) if side == "left" else (lambda x, n: torch.cat([x, n], 2))
    flags = where(torch.ones(1, 1, 192, dtype=torch.uint8), torch.zeros(1, 1, 64, dtype=torch.uint8))[:, 0]
    for options in ({}, {"density": 0.5}, {"threshold": [1.0]}):
        plain = table(query, key, **options)
        padded = table(where(query, pad), where(key, pad[:, :1]), key_flags=flags, **options)
        real = slice(2, 8) if side == "left" else slice(0, 6)
        assert torch.equal(padded[:, :, real, real], plain)
        assert not padded[..., :2].any() if side == "left" else not padded[..., 6:].any()


def test_padding_of_part_of_a_block_equals_the_definition():
    query, key = inputs(150, batch=2)
    flags = torch.ones(2, 150, dtype=torch.uint8)
    flags[0, :45], flags[1, 101:] = 0, 0
    assert_selection(*select(query, key, key_flags=flags), call(query, key, key_flags=flags))


def test_batch_rows_are_selected_apart():
    query, key = inputs(256, batch=3)
    flags = torch.ones(3, 256, dtype=torch.uint8)
    flags[1, :70] = 0
    together = table(query, key, key_flags=flags)
    for b in range(3):
        assert torch.equal(together[b : b + 1], table(query[b : b + 1], key[b : b + 1], key_flags=flags[b : b + 1]))
    assert not torch.equal(together[0], together[2])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_large_sums_neither_overflow_nor_lose_bits(dtype):
    query, key = inputs(200, peak=30.0, dtype=dtype)
    key = key * 30
    sums = (query.float() @ key.float().transpose(-1, -2)).abs().max() * 16
    assert sums > 65504
    options = {"stride": 16, "scale": 0.002}
    assert_selection(*select(query, key, **options), call(query, key, **options), tolerance=1e-3)


def test_a_row_that_sees_nothing_lists_nothing():
    query, key = inputs(128)
    flags = torch.zeros(1, 128, dtype=torch.uint8)
    assert select(query, key, key_flags=flags)[0].eq(0).all()
    assert select(query, key[:, :, :32])[0].tolist() == [[[0, 0, 0, 1]] * 2]
    one = call(query, key, key_flags=flags)
    assert reference.importance(one).eq(0).all()


def test_the_sink_is_a_column():
    query, key = inputs(256)
    kept = table(query, key, threshold=[0.0], causal=False)
    want = torch.eye(8, dtype=torch.bool)
    want[:, 0] = True
    assert torch.equal(kept, want.expand(1, 2, 8, 8))


def test_later_tokens_change_no_earlier_query_block():
    query, key = inputs(256)
    before = table(query, key)
    other_query, other_key = inputs(256, seed=1)
    query[:, :, 160:], key[:, :, 160:] = other_query[:, :, 160:], other_key[:, :, 160:]
    after = table(query, key)
    assert torch.equal(before[:, :, :5], after[:, :, :5])
    assert not torch.equal(before[:, :, 5:], after[:, :, 5:])


def test_the_maximum_keeps_a_block_that_one_query_needs():
    query, key = torch.zeros(1, 1, 1024, 16), torch.zeros(1, 1, 1024, 16)
    key[..., 0] = 1.0
    key[:, :, 320:352, 1] = 1.0
    query[:, :, 992:, 0] = 8.0
    query[:, :, 1008:1016, 1] = 100.0  # one cell of the last block looks for block 10
    key[:, :, 900:992, 0] = 1.5  # what the other cells look at
    query[:, :, 992:1008, 0], query[:, :, 1016:, 0] = 60.0, 60.0
    options = {"scale": 1.0, "threshold": [0.3]}
    assert table(query, key, pool="max", **options)[0, 0, -1, 10]
    assert table(query, key, pool="row", **options)[0, 0, -1, 10]
    assert not table(query, key, pool="sum", **options)[0, 0, -1, 10]


@pytest.mark.parametrize("density", [0.1, 0.3, 0.5, 1.0])
def test_a_density_keeps_that_share_of_the_causal_blocks(density):
    query, key = inputs(10 * BLOCK)
    counts, _indices = select(query, key, density=density)
    want = [max(min(2, n), math.ceil(round(density * n, 9))) for n in range(1, 11)]
    assert counts.tolist() == [[want] * 2]
    _share, mean = block_lists.density(counts, 320, 320, 0, BLOCK)
    assert mean == pytest.approx(sum(want) / 55)


# What is not finite, and equal.


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("pool", ["sum", "max", "row"])
def test_a_row_that_is_not_finite_keeps_what_it_may_see(value, pool):
    query, key = inputs(256)
    plain = table(query, key, pool=pool, threshold=[0.5])
    query[0, 0, 70] = value
    broken = table(query, key, pool=pool, threshold=[0.5])
    assert broken[0, 0, 2].tolist() == [True] * 3 + [False] * 5
    query[0, 0, 70] = 0
    others = [0, 1, 3, 4, 5, 6, 7]
    assert torch.equal(broken[:, :, others], plain[:, :, others])


def test_a_bad_key_opens_only_the_rows_that_see_it():
    query, key = inputs(256)
    plain = table(query, key, threshold=[0.2])
    key[0, 0, 130] = math.nan
    broken = table(query, key, threshold=[0.2])
    assert torch.equal(broken[:, :, :4], plain[:, :, :4])
    assert torch.equal(broken[:, :, 4:], torch.ones(8, 8, dtype=torch.bool).tril()[4:].expand(1, 2, 4, 8))


@pytest.mark.parametrize("estimate", ["peak", "quad+peak", "exact"])
def test_a_logit_of_minus_infinity_opens_a_row_beside_higher_ones_of_its_block(estimate):
    """One number of a key is infinite: some rows' logits are, and of those of one sign a block's highest says nothing."""
    query, key = inputs(256)
    query[..., 0] = -1.0
    key[0, 0, 130, 0] = math.inf
    got = table(query, key, threshold=[0.2], estimate=estimate)
    assert torch.equal(got[:, :, 4:], torch.ones(8, 8, dtype=torch.bool).tril()[4:].expand(1, 2, 4, 8))
    assert_selection(
        *select(query[:, :1], key, threshold=[0.2], estimate=estimate), call(query[:, :1], key, threshold=[0.2], estimate=estimate)
    )


def test_equal_importances_go_by_index():
    importance = torch.tensor([0.1, 0.1, 0.1, 0.1, 0.1, 0.0]).expand(1, 1, 1, 6)
    forced = torch.tensor([True, False, False, False, False, False])
    possible = torch.ones(6, dtype=torch.bool)
    half, every = call(*inputs(32), threshold=[0.5]), call(*inputs(32), density=1.0)
    assert reference.choose(importance, possible, forced, half).int().tolist() == [[[[1, 1, 1, 0, 0, 0]]]]
    assert reference.choose(importance, possible, forced, every).all()


def test_each_cell_keeps_its_smallest_set():
    # two cells of five blocks, the first of which is forced
    importance = torch.tensor([[0.4, 0.3, 0.2, 0.1, 0.0], [0.2, 0.0, 0.1, 0.2, 0.5]]).expand(1, 1, 1, 2, 5)
    forced = torch.tensor([True, False, False, False, False])
    kept = lambda t: reference.choose(importance, torch.ones_like(forced)[None], forced[None], call(*inputs(32), pool="row", threshold=[t]))
    assert [kept(t).int().tolist()[0][0][0] for t in (0.1, 0.3, 0.6, 0.8, 0.95)] == [
        [1, 0, 0, 0, 0],
        [1, 0, 0, 0, 1],
        [1, 1, 0, 0, 1],
        [1, 1, 1, 1, 1],
        [1, 1, 1, 1, 1],
    ]
    flat = torch.tensor([0.2, 0.2, 0.2, 0.2, 0.2]).expand(1, 1, 1, 1, 5)
    half = call(*inputs(32), pool="row", threshold=[0.5])
    assert reference.choose(flat, torch.ones_like(forced)[None], forced[None], half).all(), "equal ones stay together"


@settings(max_examples=20, deadline=None)
@given(problems(), st.floats(0.01, 1), st.floats(0.01, 1))
def test_a_lower_least_share_gives_a_superset(problem, one, other):
    query, key, options = problem
    options |= {"pool": "row", "density": 0.0}
    none, low, high = (table(query, key, **{**options, "min_share": share}) for share in (0.0, max(one, other), min(one, other)))
    assert not (none & ~low).any() and not (low & ~high).any()


def test_a_cell_keeps_what_holds_the_least_share_too():
    # the cells of the test above: 0.4 and 0.2 are forced
    importance = torch.tensor([[0.4, 0.3, 0.2, 0.1, 0.0], [0.2, 0.0, 0.1, 0.2, 0.5]]).expand(1, 1, 1, 2, 5)
    forced = torch.tensor([True, False, False, False, False])

    def kept(threshold, share, mass=importance):
        one = call(*inputs(32), pool="row", threshold=[threshold], min_share=share)
        return reference.choose(mass, torch.ones_like(forced)[None], forced[None], one).int().tolist()[0][0][0]

    assert [kept(0.1, share) for share in (0.6, 0.4, 0.25, 0.15)] == [[1, 0, 0, 0, 0], [1, 0, 0, 0, 1], [1, 1, 0, 0, 1], [1, 1, 1, 1, 1]]
    assert kept(0.75, 0.4) == [1, 1, 1, 1, 1] != kept(0.0, 0.4), "the threshold as before"
    assert kept(0.0, 1e-9) == [1, 1, 1, 1, 1] and kept(0.0, 1e-9, importance[..., :1, :]) == [1, 1, 1, 1, 0], "nothing is no share"
    assert kept(0.1, 0.4, 3 * importance) == kept(0.1, 0.4), "a share of what the cell has"
    assert kept(0.5, 1e-9, 0 * importance) == [1, 0, 0, 0, 0]


def test_spread_cells_keep_to_the_threshold_and_gathered_ones_to_the_share():
    # 1: twelve blocks hold one twelfth each. 2: one holds .7 and two more .1
    spread, gathered = torch.full((1, 12), 1 / 12), torch.tensor([[0.7, 0.1, 0.1] + [0.1 / 9] * 9])
    count = lambda mass, **options: int(
        reference.choose(
            mass.expand(1, 1, 1, 1, 12), torch.ones(1, 12) > 0, torch.zeros(1, 12) > 0, call(*inputs(32), pool="row", **options)
        ).sum()
    )
    assert (count(gathered, threshold=[0.6]), count(gathered, threshold=[0.6], min_share=0.09)) == (1, 3)
    spread = spread + 1e-4 * torch.arange(12)
    assert count(spread, threshold=[0.6]) == count(spread, threshold=[0.6], min_share=0.09) == 8


def test_a_query_block_visits_what_its_cells_visit():
    query, key = inputs(8 * BLOCK, heads=1)
    one = call(query, key, pool="row", threshold=[0.6])
    mass, (possible, forced) = reference.importance(one), reference.candidates(one)
    assert mass.shape == (1, 1, 8, BLOCK // one.stride, 8)
    cells = [reference.choose(mass[:, :, :, i : i + 1], possible, forced, one) for i in range(mass.shape[3])]
    assert torch.equal(torch.stack(cells).any(0), reference.choose(mass, possible, forced, one))
    assert not torch.equal(cells[0], cells[1])


TWO_STAGES = {"pool": "row", "stride": 16, "refine_stride": 4, "coarse_threshold": 0.9}


def test_two_stages_choose_by_the_finer_scores_among_what_the_coarser_list():
    query, key = inputs(16 * BLOCK, heads=4, kv_heads=2)
    # what is listed for a head is listed for its group
    listed = table(query, key, pool="row", stride=16, threshold=[0.6]).view(1, 2, 2, 16, 16).any(2).repeat_interleave(2, 1)
    options = {**TWO_STAGES, "coarse_threshold": 0.6, "threshold": [0.3]}
    kept, fine = table(query, key, **options), table(query, key, pool="row", stride=4, threshold=[0.3])
    assert not (kept & ~listed).any() and kept.sum() < listed.sum()
    assert not torch.equal(kept, listed & fine), "a share of the list's mass is less than the same share of everything's"
    # by hand: masses of what is not listed are taken away, and the rest is divided by its own sum
    one = call(query, key, pool="row", stride=4, threshold=[0.3])
    mass = reference.importance(one) * listed[:, :, :, None]
    mass = mass / mass.sum(-1, keepdim=True)
    possible, forced = reference.candidates(one)
    assert torch.equal(kept, reference.choose(mass, possible, forced, one))


@pytest.mark.parametrize("served_by", ["reference", "cpp"])
def test_of_rows_that_no_first_stage_serves_the_second_chooses_among_all_blocks(served_by, monkeypatch):
    monkeypatch.setattr(cpp, "LEAST_PAIRS", 0 if served_by == "cpp" else math.inf)
    query, key = inputs(16 * BLOCK, heads=4, kv_heads=2)
    two = call(query, key, **{**TWO_STAGES, "coarse_threshold": 0.6}, threshold=[0.3])
    alone = call(query, key, pool="row", stride=4, threshold=[0.3])
    kept = lambda one: block_lists.to_dense(*one.run(), one.key_blocks)
    assert not torch.equal(kept(two), kept(alone))
    monkeypatch.setattr(streaming, "WIDEST_ROW", 15)
    assert torch.equal(kept(two), kept(alone))


@settings(max_examples=20, deadline=None)
@given(problems(), st.floats(0, 0.9), st.floats(0, 0.9))
def test_two_stages_keep_supersets_and_everything_at_one(problem, one, other):
    query, key, options = problem
    options |= {"density": 0.0, **TWO_STAGES}
    low, high = (table(query, key, **{**options, "threshold": [t]}) for t in sorted((one, other)))
    assert not (low & ~high).any()
    plain = {**options, "refine_stride": 0, "threshold": [1.0]}
    assert torch.equal(table(query, key, **{**options, "threshold": [1.0]}), table(query, key, **plain))
    counts, indices = select(query, key, **{**options, "threshold": [one]})
    start = options.get("query_start", key.shape[2] - query.shape[2])
    block_lists.check(counts, indices, query.shape[2], key.shape[2], int(start), BLOCK, causal=options["causal"])


@pytest.mark.parametrize("select_blocks", [reference.select_blocks, cpp.launch], ids=["reference", "cpp"])
@pytest.mark.parametrize("by_tensor", [False, True])
def test_a_head_that_keeps_everything_leaves_the_others_of_its_group_their_list(select_blocks, by_tensor):
    query, key = inputs(16 * BLOCK, heads=4, kv_heads=2)

    def kept(*thresholds):
        given = {"head_thresholds": torch.tensor(thresholds), "threshold": []} if by_tensor else {"threshold": list(thresholds)}
        one = call(query, key, **{**TWO_STAGES, "coarse_threshold": 0.6}, **given)
        return block_lists.to_dense(*select_blocks(one), one.key_blocks), reference.group_lists(one.stages[0])

    (found, listed), (alone, same) = kept(0.3, 1.0, 0.3, 0.3), kept(0.3, 0.3, 0.3, 0.3)
    everything = torch.ones(16, 16).tril().bool()
    assert found[0, 1].equal(everything) and not alone[0, 1].equal(everything)
    assert torch.equal(listed, same) and torch.equal(found[0, [0, 2, 3]], alone[0, [0, 2, 3]])
    assert not (found[0, 0] & ~listed[0, 0]).any() and listed.sum() < 2 * everything.sum()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_two_stages_keep_what_a_row_that_is_not_finite_may_see(value):
    query, key = inputs(256)
    query[0, 0, 70] = value
    assert table(query, key, **TWO_STAGES, threshold=[0.2])[0, 0, 2].tolist() == [True] * 3 + [False] * 5


def test_unused_cache_slots_take_no_part():
    query, key = inputs(64, 256)
    filled = key.clone()
    filled[:, :, 128:] = torch.nan
    start = torch.tensor([64])
    assert torch.equal(table(query, filled, query_start=start), table(query, key, query_start=start))
    assert torch.equal(table(query, key, query_start=start)[..., :4], table(query, key[:, :, :128]))


def test_a_shared_estimate_gives_a_group_one_importance():
    query, key = inputs(256, heads=4, kv_heads=2)
    kept = table(query, key, estimate="group")
    assert torch.equal(kept[:, 0], kept[:, 1]) and torch.equal(kept[:, 2], kept[:, 3]) and not torch.equal(kept[:, 0], kept[:, 2])
    mean = query.view(1, 2, 2, 256, 16).mean(2)
    assert torch.equal(kept[:, ::2], table(mean, key))


@pytest.mark.parametrize(
    "changes, match",
    [
        ({"pool": "mean"}, "unknown pool"),
        ({"stride": 5}, "stride 5"),
        ({"block_size": 48}, "block size 48"),
        ({"windows": [1, 2, 3]}, "3 windows for 2"),
        ({"threshold": [0.1] * 3}, "3 thresholds for 2"),
        ({"threshold": [math.nan]}, "threshold"),
        ({"density": 1.5}, "density 1.5"),
        ({"density": 0.5, "pool": "row"}, "density under the row rule"),
        ({"min_share": 0.1}, "a least share under the rule max"),
        ({"min_share": 1.5, "pool": "row"}, "a least share of 1.5"),
        ({"refine_stride": 4}, "two stages under the rule max"),
        ({"refine_stride": 8, "pool": "row"}, "stride 8, then 8"),
        ({**TWO_STAGES, "threshold": [0.95]}, "coarse threshold of 0.9 for 0.95"),
        ({"key_flags": torch.ones(1, 7)}, "key_flags"),
        ({"query_start": torch.zeros(2, dtype=torch.int64)}, "2 elements, not one"),
        ({"estimate": "third"}, "unknown variant 'third'"),
        ({"estimate": "pair+quad"}, "pair and quad exclude"),
        ({"estimate": "half+half"}, "twice"),
    ],
)
def test_what_does_not_fit_is_refused(changes, match):
    query, key = inputs(64)
    with pytest.raises(UnsupportedError, match=match):
        select(query, key, **changes)


def test_empty_operands_give_empty_lists():
    query, key = inputs(64)
    counts, indices = select(query[:, :, :0], key)
    assert counts.shape == (1, 2, 0) and indices.shape == (1, 2, 0, 2)
    assert select(query, key[:, :, :0])[0].tolist() == [[[0, 0]] * 2]


@pytest.mark.parametrize("estimate", [one for one in EXAMPLES if one.prepared], ids=str)
def test_keys_that_were_prepared_in_parts_choose_alike(estimate):
    """Cells of the first and of the later tokens, prepared apart beside the mean of all keys, as processes that share a text do it."""
    query, key = inputs(150, heads=4, kv_heads=2, peak=2.0)
    flags = torch.ones(1, 150, dtype=torch.uint8)
    flags[0, :13] = 0
    whole = call(query, key, estimate=estimate, key_flags=flags, pool="row", threshold=[0.4])
    mean = (key * flags[:, None, :, None]).sum(2) / flags.sum()
    parts = []
    for some in (slice(0, 2 * BLOCK), slice(2 * BLOCK, None)):
        part = call(query[:, :, some], key[:, :, some], estimate=estimate, key_flags=flags[:, some], key_mean=mean)
        parts.append(reference.prepare_keys(part))
    rows, scales = torch.cat([one for one, _ in parts], 2), None
    if estimate.int8:
        scales = torch.cat([one for _, one in parts], 2)
    assert rows.dtype is (torch.int8 if estimate.int8 else torch.float32)
    unread = key.new_empty(1).expand(key.shape)
    prepared = call(
        query, unread, estimate=estimate, key_flags=flags, pool="row", threshold=[0.4], prepared_keys=rows, prepared_scales=scales
    )
    one, other = (block_lists.to_dense(*reference.select_blocks(each), each.key_blocks) for each in (whole, prepared))
    assert torch.equal(one, other) and one.any() and not one.all()


def test_prepared_keys_that_do_not_fit():
    query, key = inputs(64)
    rows = torch.zeros(1, 1, 32, 16)
    call(query, key, estimate="pair", prepared_keys=rows)
    for options in (
        {"estimate": "exact", "prepared_keys": rows},
        {"estimate": "pair", "prepared_keys": rows[:, :, :31]},
        {"estimate": "pair+int8", "prepared_keys": rows.to(torch.int8)},
        {"estimate": "pair+int8", "prepared_keys": rows.to(torch.int8), "prepared_scales": torch.ones(1, 1, 7)},
    ):
        with pytest.raises(UnsupportedError, match="prepared"):
            call(query, key, **options)
