"""Generated block selection kernels, run by Triton's interpreter, against the reference."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
import torch

import sparsify.backends
from sparsify.backends.select import reference as reference_select
from sparsify.backends.select import stages, streamed
from sparsify.backends.select import triton as triton_select
from sparsify.backends.select.source import SelectTiling
from sparsify.errors import UnsupportedError
from sparsify.ops import block_lists, streaming
from sparsify.ops.estimate import EXAMPLES
from sparsify.ops.selection import SelectCall
from tests.support.select_oracle import assert_selection

pytestmark = pytest.mark.interpreter

TMA = SelectTiling(32, 64, 4, 2, 1, True)
POINTERS = SelectTiling(32, 64, 4, 2, 1, False)
BANDS = SelectTiling(32, 64, 4, 2, 2, True, band=2)
LENGTH = 260


def call(query, key, **changes):
    found = SelectCall.bind(query, key, **{"scale": 0.25, "causal": True, "block_size": 64, "threshold": [0.8], **changes})
    found.check()
    return found


def inputs(query_len=LENGTH, key_len=None, *, batch=1, heads=2, kv_heads=1, dim=32, dtype=torch.bfloat16):
    torch.manual_seed(0)
    query = 4 * torch.randn(batch, heads, query_len, dim)
    return query.to(dtype), torch.randn(batch, kv_heads, key_len or query_len, dim).to(dtype)


def compare(query, key, *, tiling=TMA, limits=triton_select.LIMITS, **changes):
    """Importances are close to the reference's, and the lists are those that the kernel's own importances ask for."""
    one = call(query, key, **changes)
    counts, indices = triton_select.select_blocks(one, tiling=tiling, limits=limits)
    block_lists.check(counts, indices, one.query_len, one.key_len, int(one.start), one.block_size, causal=one.causal)
    got = block_lists.to_dense(counts, indices, one.key_blocks)
    own = triton_select.importance(one, tiling=tiling)
    wanted = reference_select.importance(one)
    assert torch.equal(own.isnan().any(-1), wanted.isnan().any(-1))
    # means are rounded to 16 bits: a group's in another order than the reference's, pairs' towards zero by the interpreter
    rounded = one.estimate.group or (one.estimate.merge > 1 and not one.estimate.int8)
    # a tie of 8 bits may fall the other way: the reference scales queries before it rounds them
    assert (own - wanted).nan_to_num().abs().max() < (5e-3 if rounded else 2e-3 if one.estimate.int8 else 5e-4)
    possible, forced = reference_select.candidates(one)
    chosen = reference_select.choose(own, possible, forced, one)
    assert torch.equal(got, chosen)
    reference = block_lists.to_dense(*reference_select.select_blocks(one), one.key_blocks)
    assert (got ^ reference).sum() <= 1
    return got


@pytest.mark.parametrize("tiling", [TMA, BANDS, POINTERS], ids=["tma", "bands", "pointers"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"scale": -0.25},
        {"pool": "sum", "stride": 16, "density": 0.4},
        {"causal": False, "windows": [100]},
        {"windows": [0, 70], "threshold": [0.5, 0.9]},
        {"pool": "sum", "estimate": "half", "threshold": [0.0]},
        {"pool": "row", "threshold": [0.3]},
        {"pool": "row", "threshold": [0.3], "min_share": 0.2},
        {"pool": "row", "stride": 4, "windows": [0, 70], "threshold": [0.2, 0.6], "estimate": "half"},
        {"pool": "row", "stride": 4, "windows": [0, 70], "threshold": [0.2, 0.6], "estimate": "half", "min_share": 0.1},
        *({"estimate": one} for one in EXAMPLES if one.merge > 1 and not (one.int8 or one.half)),
    ],
    ids=str,
)
@pytest.mark.samples(8)
def test_equals_the_reference(tiling, changes):
    kept = compare(*inputs(), tiling=tiling, **changes)
    assert kept.any() and not kept.all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_dtypes_and_odd_head_dims(dtype):
    compare(*inputs(200, dim=40, dtype=dtype))


@pytest.mark.parametrize("changes", [{"scale": 0.0}, {"estimate": "int8", "scale": 0.0}])
def test_a_scale_of_zero_sees_all_alike(changes):
    compare(*inputs(140), tiling=BANDS, **changes)


@pytest.mark.slow
def test_small_bands_of_several_heads_and_chunks():
    query, key = inputs(700, 700, batch=2, heads=4, kv_heads=2)
    one = call(query, key)
    expected = triton_select.select_blocks(one, tiling=TMA)
    limits = triton_select.Limits(scratch_bytes=2000)
    found = triton_select.select_blocks(one, tiling=BANDS, limits=limits)
    assert block_lists.to_dense(*found, 11).equal(block_lists.to_dense(*expected, 11))
    assert any(
        chunk.cells[0] for chunk in triton_select.plan_chunks(one, triton_select.kernel_spec(one, BANDS, 4096), limits.scratch_bytes)
    )


def test_real_tile_sizes():
    compare(*inputs(1100, heads=1), tiling=triton_select.select_source.TMA_TILING, stride=4, block_size=128)


def flags(length=LENGTH):
    result = torch.ones(2, length, dtype=torch.uint8)
    result[0, :130], result[1, length - 70 :] = 0, 0
    result[0, 130:134], result[1, :4] = 3, 3
    return result


@pytest.mark.parametrize(
    "extra", [{}, {"windows": [80]}, {"segments": (torch.arange(LENGTH) // 90)[None]}], ids=["flags", "sinks", "segments"]
)
def test_padding_per_batch_row(extra):
    query, key = inputs(batch=2)
    key[0, :, :130], query[0, :, :130] = math.nan, math.nan
    compare(query, key, tiling=POINTERS if extra else TMA, key_flags=flags(), **extra)


@pytest.mark.parametrize("estimate", ["exact", "peak", "quad+peak"])
def test_segments_alone(estimate):
    compare(*inputs(), segments=(torch.arange(LENGTH) // 90)[None], estimate=estimate)


def test_a_chunk_and_a_start_from_a_tensor():
    query, key = inputs(batch=2, heads=1)
    whole = compare(query[:, :, :256], key[:, :, :256])
    assert torch.equal(compare(query[:, :, 128:256], key[:, :, :256]), whole[:, :, 2:])
    key[:, :, 256:] = math.nan
    assert torch.equal(compare(query[:, :, 128:256], key, query_start=torch.tensor([128]))[..., :4], whole[:, :, 2:])
    compare(query[:, :, :100], key[:, :, :37])


def test_a_start_of_any_kind_of_integers_lies_beside_the_query():
    query, key = inputs(64, 130)
    one = call(query, key, query_start=torch.tensor([40], dtype=torch.int16))
    start = triton_select.mask_operands(one, triton_select.kernel_spec(one, TMA, 4096))["start_at"]
    assert start.dtype == torch.int64 and start.device == query.device
    moved = dataclasses.replace(one, query=query.to("meta"), key=key.to("meta"))  # stands for a device that reads none of the host's memory
    assert triton_select.mask_operands(moved, triton_select.kernel_spec(moved, TMA, 4096))["start_at"].device.type == "meta"


@pytest.mark.parametrize(
    "tiling, changes, shape",
    [
        *((TMA, {"estimate": one}, {"query_len": 250, "heads": 4, "kv_heads": 2}) for one in EXAMPLES if one.int8),
        (POINTERS, {"estimate": "half+int8", "windows": [100]}, {"query_len": 230, "dim": 40, "dtype": torch.float32}),
        (TMA, {"estimate": "group+int8", "density": 0.4}, {"heads": 4, "kv_heads": 2}),
        (TMA, {"estimate": "pair+int8+peak", "pool": "row", "scale": -0.25}, {"query_len": 250, "heads": 4, "kv_heads": 2}),
        (POINTERS, {"estimate": "pair+int8+peak", "pool": "row", "windows": [100]}, {"query_len": 230}),
        (POINTERS, {"estimate": "int8+peak", "key_flags": True}, {"batch": 2, "kv_heads": 2}),
        (TMA, {"estimate": "int8", "key_flags": True}, {"batch": 2, "kv_heads": 2}),
        (POINTERS, {"estimate": "half+pair+int8", "key_flags": True}, {"batch": 2, "kv_heads": 2}),
    ],
    ids=str,
)
@pytest.mark.samples(4)
def test_eight_bits(tiling, changes, shape):
    """Against the reference, which rounds in the same way; the mean that is taken from keys is far larger than what differs."""
    query, key = inputs(**shape)
    key = key + torch.linspace(-8, 8, key.shape[3]).to(key.dtype)
    if "key_flags" in changes:
        changes["key_flags"] = flags()
        key[0, :, :130], query[0, :, :130] = math.nan, math.nan
    kept = compare(query, key, tiling=tiling, **changes)
    assert kept.any() and not kept.all()
    one = call(query, key, **changes)
    exact = reference_select.importance(dataclasses.replace(one, estimate=dataclasses.replace(one.estimate, int8=False)))
    own = triton_select.importance(one, tiling=tiling)
    assert 0 < (own - exact).norm() / exact.norm() < 0.05


def test_a_group_shares_one_estimate():
    query, key = inputs(heads=4, kv_heads=2)
    kept = compare(query, key, estimate="group", threshold=[0.5, 0.5, 0.5, 0.9], windows=[0, 0, 0, 120])
    assert torch.equal(kept[:, 0], kept[:, 1]) and not torch.equal(kept[:, 2], kept[:, 3])


@pytest.mark.parametrize(
    "changes",
    [
        {"key_flags": flags(), "threshold": [0.5, 0.9]},
        {"density": 0.5, "pool": "sum"},
        pytest.param({"key_flags": flags(), "threshold": [0.2, 0.5], "pool": "row"}, marks=pytest.mark.slow),
        {"key_flags": flags(), "threshold": [0.2, 0.5], "pool": "row", "min_share": 0.2},
    ],
    ids=["taus", "density", "row", "least share"],
)
def test_long_rows_in_parts(changes):
    query, key = inputs(batch=2 if "key_flags" in changes else 1, heads=2 if "threshold" in changes else 1)
    compare(query, key, limits=triton_select.Limits(fused_width=4, part=8), **changes)


@pytest.mark.slow
def test_chunks_of_rows_and_heads_give_the_same_lists():
    query, key = inputs(1100, batch=2, kv_heads=2, dim=16)
    one = call(query, key, stride=4, key_flags=flags(1100), windows=[0, 200], threshold=[0.5, 0.7])
    tiling = SelectTiling(16, 64, 4, 2, 1, True)  # bands of 256 cells
    counts, indices = triton_select.select_blocks(one, tiling=TMA)
    whole = block_lists.to_dense(counts, indices, one.key_blocks)
    limits = triton_select.Limits(scratch_bytes=11_000)
    chunks = list(triton_select.plan_chunks(one, triton_select.kernel_spec(one, tiling, 4096), limits.scratch_bytes))
    assert len(chunks) == 8 and chunks[1].cells == (256, 275)
    counts, indices = triton_select.select_blocks(one, tiling=tiling, limits=limits)
    assert torch.equal(block_lists.to_dense(counts, indices, one.key_blocks), whole)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"estimate": "int8"},
        {"pool": "row"},
        {"pool": "row", "wide": True},
        {"pool": "row", "min_share": 0.9},
        {"pool": "row", "min_share": 0.9, "wide": True},
        {"estimate": "peak"},
        {"estimate": "int8+peak"},
    ],
    ids=str,
)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.samples(3)
def test_rows_that_are_not_finite_keep_everything(value, changes):
    changes = dict(changes)
    limits = triton_select.Limits(fused_width=2, part=4) if changes.pop("wide", False) else triton_select.LIMITS
    query, key = inputs(256)
    query[0, 0, 70] = value
    assert compare(query, key, threshold=[0.2], limits=limits, **changes)[0, 0, 1].tolist() == [True, True, False, False]
    query, key = inputs(256)
    key[0, 0, 200] = value
    kept = compare(query, key, threshold=[0.0], limits=limits, **changes)
    assert kept[0, 0].sum(-1).tolist() == [1, 2, 2, 4]


def test_the_row_rule_keeps_equal_ones_together_and_everything_at_one():
    query, key = inputs(256)
    assert compare(query * 0, key, pool="row", threshold=[0.75])[0, 0].equal(torch.ones(4, 4).tril().bool())
    assert compare(query, key, pool="row", threshold=[1.0])[0, 0].equal(torch.ones(4, 4).tril().bool())
    some, more = (compare(query, key, pool="row", threshold=[tau]) for tau in (0.2, 0.4))
    assert not (some & ~more).any() and not torch.equal(some, more)


@pytest.mark.parametrize("wide", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_least_share_adds_to_what_the_threshold_keeps(wide):
    limits = triton_select.Limits(fused_width=4, part=8) if wide else triton_select.LIMITS
    query, key = inputs(380, heads=1, dim=16)
    keep = lambda tau, share: compare(query, key, pool="row", threshold=[tau], min_share=share, limits=limits)
    tables = [keep(0.3, share) for share in (0.0, 0.3, 0.1)]
    assert all(not (less & ~more).any() and not torch.equal(less, more) for less, more in itertools.pairwise(tables))
    assert keep(1.0, 0.5).sum() == 6 * 7 / 2


def test_rows_that_see_part_of_the_columns_are_served_apart(monkeypatch):
    monkeypatch.setattr(triton_select, "_LEAST_WIDTH", 8)
    query, key = inputs(1100, heads=1, kv_heads=1, dim=16)
    one = call(query, key, pool="row", threshold=[0.3])
    spec = triton_select.kernel_spec(one, TMA, 8192)
    assert list(triton_select._widths(one, spec, 0, 18, 4)) == [(0, 8, 1), (8, 16, 2), (16, 18, 4)]
    assert list(triton_select._widths(dataclasses.replace(one, query=query[:, :, 192:]), spec, 0, 15, 4)) == [
        (0, 5, 1),
        (5, 13, 2),
        (13, 15, 4),
    ]
    compare(query, key, pool="row", threshold=[0.3])


def test_strides_of_any_layout():
    query, key = inputs(200, heads=2, kv_heads=2)
    want = compare(query, key)
    rows = lambda x: x.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(compare(rows(query), rows(key)), want)
    odd = torch.nn.functional.pad(query, (1, 2))[..., 1:-2]
    assert odd.stride(2) * 2 % 16 and torch.equal(compare(odd, key), want)
    assert torch.equal(compare(odd, key, tiling=POINTERS), want)


def test_equal_logits_go_by_index_and_large_ones_do_not_overflow():
    query, key = inputs(256)
    kept = compare(query * 0, key, density=0.75)[0, 0]
    assert kept.tolist() == [[True, False, False, False], [True, True, False, False], [True, True, True, False], [True, True, False, True]]
    query, key = inputs(256, dtype=torch.float16)
    compare(query * 500, key * 500, stride=16, scale=1e-6)


def test_equals_the_definition():
    query, key = inputs(150, dim=16, dtype=torch.float16)
    one = call(query, key, block_size=32, key_flags=flags(150)[:1])
    counts, indices = triton_select.select_blocks(one, tiling=TMA)
    assert_selection(counts, indices, one, tolerance=2e-3)


@pytest.mark.parametrize(
    "changes, shape",
    [
        ({"estimate": "pair+int8+peak", "stride": 4}, {"query_len": 250, "key_len": 510, "heads": 3}),
        ({"estimate": "int8", "threshold": [0.2, 0.6]}, {"query_len": 260}),
        ({"estimate": "pair+int8+peak", "threshold": [0.3], "min_share": 0.15}, {"query_len": 260}),
        ({"estimate": "quad+int8", "causal": False, "scale": -0.25}, {"query_len": 130, "key_len": 300}),
        (
            {"estimate": "half+int8", "stride": 4, "query_start": torch.tensor([200])},
            {"query_len": 130, "key_len": 400, "batch": 2, "dim": 40},
        ),
    ],
    ids=["a chunk", "thresholds", "a least share", "not causal", "start"],
)
@pytest.mark.samples(2)
def test_keys_pass_by_a_tile_of_queries(changes, shape, monkeypatch):
    monkeypatch.setattr(streamed, "PLACES", (2, 4))
    monkeypatch.setattr(streamed, "NUMBERS", 2)  # some cells at a time
    query, key = inputs(**shape)
    one = call(query, key, **{"pool": "row", "threshold": [0.4], **changes})
    for limits in (triton_select.LIMITS, triton_select.Limits(scratch_bytes=6_000)):
        spec = stages.streaming(one, limits, SelectTiling(32, 64, 4, 2, 1, False))
        assert spec is not None
        lists = one.empty_lists()
        own = torch.zeros(one.batch, one.heads, one.query_blocks, one.block_size // one.span, one.key_blocks)
        stages.one_stage(one, spec, lists, own, limits)
        assert (own - reference_select.importance(one)).abs().max() < 5e-3  # steps of a 64th of an octave, 8 bits
        block_lists.check(*lists, one.query_len, one.key_len, int(one.start), one.block_size, causal=one.causal)
        got = block_lists.to_dense(*lists, one.key_blocks)
        chosen = reference_select.choose(own, *reference_select.candidates(one), one)
        assert torch.equal(got, chosen) and got.any() and not got.all()


@pytest.mark.interpreter
@pytest.mark.parametrize("operand", [False, True])
def test_heads_that_keep_everything_are_not_scored(operand, monkeypatch):
    """Nothing is written where their masses would lie, and the others' lists are what they are with them."""
    thresholds, written, launch = (0.4, 1.0, 1.0, 0.6), [], streamed.launch
    query, key = inputs(query_len=300, heads=4, kv_heads=2)
    given = {"threshold": [], "head_thresholds": torch.tensor(thresholds)} if operand else {"threshold": thresholds}
    one = call(query, key, **{"pool": "row", "estimate": "pair+int8+peak", "stride": 4, **given})
    spec = stages.streaming(one, triton_select.LIMITS, SelectTiling(32, 64, 4, 2, 1, False))
    assert spec is not None and spec.skips

    def watched(kernel, grid, arguments, values, **options):
        if "logs" in values and "counts" not in values:
            values["logs"].fill_(-7.0)
            launch(kernel, grid, arguments, values, **options)
            written.append((values["logs"].view(query.shape[0], query.shape[1], -1) != -7.0).any(-1))
            return
        launch(kernel, grid, arguments, values, **options)

    monkeypatch.setattr(streamed, "launch", watched)
    lists = one.empty_lists()
    stages.one_stage(one, spec, lists, None, triton_select.LIMITS)
    (seen,) = written
    assert torch.equal(seen, torch.tensor(thresholds).expand(query.shape[0], -1) < 1)
    monkeypatch.undo()
    scored, own = one.empty_lists(), torch.zeros(one.batch, one.heads, one.query_blocks, one.block_size // one.span, one.key_blocks)
    stages.one_stage(one, spec, scored, own, triton_select.LIMITS)  # what is shown is scored for all heads
    want, got = (block_lists.to_dense(*found, one.key_blocks) for found in (scored, lists))
    assert torch.equal(want, got) and not got.all()


def kept_by_cells(own, possible, forced, tau, min_share=0.0):
    """bool [batch, heads, query_blocks, key_blocks]: the row rule on masses [..., cells, key_blocks] in which ties are kept together."""
    free = own.double() * (possible & ~forced)[:, :, :, None]
    need = tau * own.double().sum(-1) - (own.double() * forced[:, :, :, None]).sum(-1)
    at_least = (free[..., None, :] * (free[..., None, :] >= free[..., :, None])).sum(-1)
    line = torch.where((at_least >= need[..., None]) & (free > 0), free, 0.0).amax(-1, keepdim=True)
    line = torch.where(need[..., None] > 0, line, torch.inf)
    wanted = (free >= line) & (free > 0)
    if min_share:
        wanted |= free >= min_share * own.double().sum(-1, keepdim=True)
    return (wanted & (own.sum(-1, keepdim=True) > 0)).any(3) | forced


@pytest.mark.parametrize("min_share", [0.0, 0.04])
@pytest.mark.parametrize("numbers, warps, vector, word", [(128, 8, 2, 16), (1, 2, 4, 4), (1, 1, 1, 16)])
def test_cutoffs_of_long_rows(numbers, warps, vector, word, min_share, monkeypatch):
    """However cells, places and marks are spread over threads."""
    for name, value in (("NUMBERS", numbers), ("WARPS", warps), ("VECTOR", vector), ("WORD", word), ("PLACES", (4, 16))):
        monkeypatch.setattr(streamed, name, value)
    query, key = inputs(700, dim=16)
    one = call(query, key, pool="row", stride=4, block_size=32, estimate="int8+peak", threshold=[0.6], min_share=min_share)
    lists, own = one.empty_lists(), torch.zeros(1, 2, one.query_blocks, 8, one.key_blocks)
    stages.one_stage(one, stages.streaming(one, triton_select.LIMITS), lists, own, triton_select.LIMITS)
    possible, forced = reference_select.candidates(one)
    assert torch.equal(block_lists.to_dense(*lists, one.key_blocks), kept_by_cells(own, possible, forced, 0.6, min_share))


@pytest.mark.parametrize("estimate", ["int8+peak", "int8"])
@pytest.mark.parametrize("stride, block_size, cols", [(4, 64, 16), (4, 64, 32), (4, 64, 128), (16, 64, 64), (16, 32, 32), (8, 32, 16)])
def test_a_blocks_cells_meet_wherever_tensor_cores_put_them(stride, block_size, cols, estimate):
    """Tiles of a part of a block's columns in a thread, a whole block's and several blocks'."""
    query, key = inputs(200, dim=16)
    one = call(query, key, pool="row", stride=stride, block_size=block_size, estimate=estimate, threshold=[0.4])
    spec = stages.streaming(one, triton_select.LIMITS, SelectTiling(max(32, block_size // stride), cols, 4, 2, 1, False))
    lists, own = one.empty_lists(), torch.zeros(1, 2, one.query_blocks, block_size // stride, one.key_blocks)
    stages.one_stage(one, spec, lists, own, triton_select.LIMITS)
    assert (own - reference_select.importance(one)).abs().max() < 5e-3


@pytest.mark.parametrize(
    "changes", [{"stride": 16}, {"estimate": "peak"}, {"pool": "max"}, {"windows": [70]}, {"estimate": "group+int8"}], ids=str
)
def test_keys_pass_by_where_that_is_known_to_be_faster(changes):
    """Large cells, 16 bits, other rules and masks keep the kernels of tiles in any order."""
    query, key = inputs(64, dim=32)
    base = {"pool": "row", "estimate": "int8"}
    assert stages.streaming(call(query, key, **base), triton_select.LIMITS) is not None
    assert stages.streaming(call(query, key, **{**base, **changes}), triton_select.LIMITS) is None


@pytest.mark.interpreter
@pytest.mark.parametrize("min_share", [0.0, 0.3])
def test_what_lies_where_no_query_cell_is_chooses_nothing(min_share, monkeypatch):
    """A last block of one query cell and seven that there are not, whose scratch is whatever lay in memory: here any 16 bits."""
    query, key = inputs(100, 137, dim=16, heads=2, kv_heads=1)
    one = call(query, key, pool="row", stride=4, block_size=32, estimate="pair+int8", threshold=[0.3], min_share=min_share)
    spec, launch = stages.streaming(one, triton_select.LIMITS, SelectTiling(32, 32, 4, 2, 1, False)), streamed.launch
    draw, found = torch.Generator().manual_seed(0), []

    def scribbled(kernel, grid, arguments, values, **options):
        if "counts" not in values:
            logs = values["logs"]
            logs.copy_(torch.randint(-(1 << 15), 1 << 15, logs.shape, dtype=torch.int16, generator=draw).view(torch.float16))
        launch(kernel, grid, arguments, values, **options)

    monkeypatch.setattr(streamed, "launch", scribbled)
    for _ in range(12):
        lists = one.empty_lists()
        stages.one_stage(one, spec, lists, None, triton_select.LIMITS)
        found.append(block_lists.to_dense(*lists, one.key_blocks))
    assert all(torch.equal(other, found[0]) for other in found) and not found[0].all()


@pytest.mark.parametrize(
    "stages_of", [{"stride": 4, "estimate": "int8"}, {"stride": 16, "refine_stride": 4}], ids=["one stage", "two stages"]
)
def test_query_blocks_before_all_keys_have_empty_lists(stages_of):
    """More rows than keys: what is not written would be numbers that lay in memory."""
    query, key = inputs(300, 37, dim=16)
    one = call(query, key, pool="row", threshold=[0.4], **stages_of)
    lists = tuple(part.fill_(-1) for part in one.empty_lists())
    if one.refine_stride:
        first = stages.two_stages(one, lists, None, triton_select.LIMITS)
        assert first[0].tolist() == [[[0, 0, 0, 0, 1]]]
    else:
        stages.one_stage(one, stages.streaming(one, triton_select.LIMITS), lists, None, triton_select.LIMITS)
    assert lists[0].tolist() == [[[0, 0, 0, 0, 1]] * 2] and torch.equal(lists[0], reference_select.select_blocks(one)[0])


def test_keys_that_pass_by_keep_everything_at_one_and_where_a_row_is_not_finite():
    query, key = inputs(256)
    query[0, 0, 70] = math.nan
    kept = block_lists.to_dense(*stages.select_blocks(call(query, key, pool="row", estimate="int8+peak", threshold=[0.2, 1.0])), 4)
    assert kept[0, 0, 1].tolist() == [True, True, False, False] and kept[0, 1].equal(torch.ones(4, 4).tril().bool())


@pytest.mark.parametrize(
    "changes, shape",
    [
        ({}, {"query_len": 520, "heads": 2}),
        ({"estimate": "pair+int8", "threshold": [0.2, 0.5]}, {"query_len": 250, "key_len": 510}),
        ({"estimate": "pair+int8+peak", "threshold": [0.2, 0.5]}, {"query_len": 250, "key_len": 510}),
        ({"causal": False, "scale": -0.25, "estimate": "peak"}, {"query_len": 130, "key_len": 300}),
        ({"query_start": torch.tensor([200])}, {"query_len": 130, "key_len": 400, "batch": 2}),
        ({"min_share": 0.2, "threshold": [0.2, 0.3]}, {"query_len": 520, "heads": 2}),
    ],
    ids=["exact", "8 bits of a chunk", "highest of 8 bits", "not causal, highest", "start", "least share"],
)
def test_a_second_stage_chooses_among_what_is_listed(changes, shape, monkeypatch):
    monkeypatch.setattr(streamed, "PLACES", (2, 4))
    monkeypatch.setattr(streamed, "NUMBERS", 2)  # some cells at a time
    query, key = inputs(**shape)
    options = {"pool": "row", "stride": 16, "refine_stride": 4, "coarse_threshold": 0.7, "threshold": [0.4], **changes}
    one = call(query, key, **options)
    coarse, fine = one.stages
    cells = one.block_size // fine.span
    own = torch.zeros(one.batch, one.heads, one.query_blocks, cells, one.key_blocks)
    listed = block_lists.to_dense(*stages.two_stages(one, one.empty_lists(), own, triton_select.LIMITS), one.key_blocks)
    least = reference_select.group_lists(coarse)  # cutoffs are rounded down
    assert (least & ~listed).sum() <= 1 and listed.sum() <= 1.3 * least.sum()
    among = reference_select.for_heads(listed, one)
    wanted = reference_select.importance(fine) * among[:, :, :, None]
    wanted = wanted / wanted.sum(-1, keepdim=True).clamp(min=1e-30)
    assert (own - wanted).abs().max() < 3e-3  # steps of a 64th of an octave
    _, forced = reference_select.candidates(fine)
    chosen = reference_select.choose(own, among, forced & among, fine)
    for limits in (triton_select.LIMITS, triton_select.Limits(scratch_bytes=6_000)):
        counts, indices = stages.select_blocks(one, limits=limits)
        block_lists.check(counts, indices, one.query_len, one.key_len, int(one.start), one.block_size, causal=one.causal)
        assert torch.equal(block_lists.to_dense(counts, indices, one.key_blocks), chosen)
    assert chosen.sum() < among.sum()


def test_a_second_stage_keeps_everything_at_one_and_where_a_row_is_not_finite():
    query, key = inputs(256)
    query[0, 0, 70] = math.nan
    options = {"pool": "row", "stride": 16, "refine_stride": 4, "threshold": [0.2, 1.0]}
    kept = block_lists.to_dense(*stages.select_blocks(call(query, key, **options)), 4)
    assert kept[0, 0, 1].tolist() == [True, True, False, False] and kept[0, 1].equal(torch.ones(4, 4).tril().bool())


def test_rows_too_long_for_two_stages_have_the_second_alone(monkeypatch):
    """The op asks, before any kernel is chosen: none of them is handed two stages that it does not serve."""
    options = {"pool": "row", "stride": 16, "refine_stride": 4, "coarse_threshold": 0.3, "threshold": [0.2]}
    query, key = inputs(256)
    one = call(query, key, **options)
    with sparsify.backends.serving("triton", strict=True):
        alone = block_lists.to_dense(*call(query, key, pool="row", stride=4, threshold=[0.2]).run(), 4)
        assert not torch.equal(block_lists.to_dense(*one.run(), 4), alone)
        monkeypatch.setattr(streaming, "WIDEST_ROW", 3)
        assert torch.equal(block_lists.to_dense(*one.run(), 4), alone)
    with pytest.raises(UnsupportedError, match="rows of 4 blocks"):
        stages.select_blocks(one, limits=triton_select.Limits(fused_width=3))


@pytest.mark.parametrize(
    "changes, shape",
    [
        ({"threshold": [0.3, 1.0, 1.0, 1.0]}, {"query_len": 250, "key_len": 510}),
        ({"threshold": [], "head_thresholds": torch.tensor([0.3, 1.0, 0.3, 0.2])}, {"query_len": 300, "key_len": 200, "batch": 2}),
        (
            {"threshold": [], "head_thresholds": torch.tensor([0.3, 1.0, 0.3, 0.2]), "query_start": torch.tensor([200])},
            {"query_len": 130, "key_len": 400},
        ),
        ({"threshold": [0.3, 1.0, 0.2, 0.2], "causal": False}, {"query_len": 130, "key_len": 300}),
        ({"threshold": [1.0]}, {"query_len": 250}),
    ],
    ids=["a chunk", "rows before all keys", "start", "not causal", "all heads"],
)
def test_heads_that_keep_everything_change_nothing_for_their_group(changes, shape):
    query, key = inputs(**shape, heads=4, kv_heads=2)
    one = call(query, key, pool="row", stride=16, refine_stride=4, coarse_threshold=0.7, **changes)
    lists = tuple(part.fill_(-1) for part in one.empty_lists())
    first = block_lists.to_dense(*stages.two_stages(one, lists, None, triton_select.LIMITS), one.key_blocks)
    least = reference_select.group_lists(one.stages[0])  # cutoffs are rounded down
    assert (least & ~first).sum() <= 1 and first.sum() <= 1.3 * least.sum()
    block_lists.check(*lists, one.query_len, one.key_len, int(one.start), one.block_size, causal=one.causal)
    kept, whole = block_lists.to_dense(*lists, one.key_blocks), torch.as_tensor(one.thresholds).expand(4) >= 1
    possible, _ = reference_select.candidates(one)
    assert torch.equal(kept[:, whole], possible.expand_as(kept)[:, whole])
    assert not (kept & ~reference_select.among_lists(possible, first, one)).any()
    assert whole.all() or kept[:, ~whole].sum() < possible.expand_as(kept)[:, ~whole].sum()


def test_a_second_stage_refuses_what_it_does_not_know():
    options = {"pool": "row", "stride": 16, "refine_stride": 4, "threshold": [0.2]}
    for changes, match in (({"key_flags": flags()[:1]}, "padding"), ({"windows": [70]}, "a window"), ({"estimate": "group"}, "a group")):
        with pytest.raises(UnsupportedError, match=match):
            stages.select_blocks(call(*inputs(), **options, **changes))


@pytest.mark.parametrize("estimate, dim", [("pair+int8+peak", 32), pytest.param("quad", 40, marks=pytest.mark.slow), ("int8", 40)])
@pytest.mark.parametrize("tiling", [TMA, POINTERS], ids=["tma", "pointers"])
def test_keys_that_were_prepared(tiling, estimate, dim):
    query, key = inputs(260, heads=4, kv_heads=2, dim=dim)
    padding = torch.ones(1, 260, dtype=torch.uint8)
    padding[0, :70] = 0
    for given in ({}, {"key_flags": padding}):
        one = call(query, key, estimate=estimate, **given)
        rows, scales = triton_select.prepare_keys(one)
        assert rows.shape[2] == one.key_cells * one.steps
        own_rows, own_scales = reference_select.prepare_keys(one)
        if scales is None:
            assert (rows.float() - own_rows.float()).abs().max() < 0.02
        else:
            assert (rows.int() - own_rows.int()).abs().max() <= 1 and torch.allclose(scales, own_scales, rtol=1e-5)
        unread = key.new_empty(1).expand(key.shape)
        prepared = call(query, unread, estimate=estimate, **given, prepared_keys=rows.contiguous(), prepared_scales=scales)
        lists = [block_lists.to_dense(*triton_select.select_blocks(each, tiling=tiling), 5) for each in (one, prepared)]
        assert torch.equal(*lists) and lists[0].any() and not lists[0].all()
