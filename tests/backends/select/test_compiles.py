"""Generated block selection kernels compile for real GPUs, without one: within shared memory, and without spills on Hopper."""

from __future__ import annotations

import pytest
import torch

from sparsify.backends.codegen import source
from sparsify.backends.select import streamed, triton
from sparsify.backends.select.source import INT8_TILING, POINTER_TILING, TMA_TILING, SelectSpec, SelectTiling, arguments, generate
from sparsify.ops.estimate import DEFAULT, EXACT, EXAMPLES, Estimate
from sparsify.ops.selection import SelectCall
from sparsify.releases import triton_release
from tests.support.offline import SHARED_LIMIT, Resources, compile_kernel, within_budget

pytest.importorskip("triton")

CLAUSES = {
    "causal": {},
    "density": {"rule": "density", "reduce": "sum"},
    "padding": {"key_flags": True, "rule": "taus"},
    "window": {"window": "one"},
    "not causal": {"causal": False},
    "everything": {"key_flags": True, "segments": True, "window": "per_head", "has_start": True, "rule": "taus"},
    "row": {"reduce": "row"},
    "row everything": {"reduce": "row", "key_flags": True, "segments": True, "window": "per_head", "has_start": True, "rule": "taus"},
    "row share": {"reduce": "row", "min_share": True},
    "shared": {"estimate": Estimate(half=True, group=True)},
    "int8 half": {"estimate": Estimate(half=True, int8=True), "key_flags": True},
    **{str(one): {"estimate": one} for one in EXAMPLES if one != EXACT},
}
CLAUSES["int8 everything"] = CLAUSES["everything"] | {"estimate": Estimate(int8=True)}


def spec(clause="causal", arch=90, **changes):
    tiling = POINTER_TILING if arch < 90 else INT8_TILING if CLAUSES[clause].get("estimate", EXACT).int8 else TMA_TILING
    base = {"dtype": "bf16", "head_dim": 128, "group": 4, "stride": 8, "block": 128, "tiling": tiling}
    return SelectSpec(**{**base, **CLAUSES[clause], **changes})


def compiled(chosen: SelectSpec, kernel: str, arch: int, warps: int, **constexprs: int) -> Resources:
    return compile_kernel(
        getattr(source.load(generate(chosen), "select"), kernel),
        arguments(chosen, kernel),
        arch=arch,
        num_warps=warps,
        num_stages=chosen.tiling.stages,
        constexprs=constexprs,
    )


# Bytes a thread: Triton 3.7 alone keeps eight registers of a tile in memory where flags, documents, windows and a start come together.
SPILLED = {(3, 7): {"everything": 32, "int8 everything": 32}}


# other estimates have the text of one of these, but for how queries are strided; pools differ in what chooses
QUICK = [clause for clause in CLAUSES if clause not in map(str, EXAMPLES) and not clause.startswith("row")] + [
    "int8",
    "pair",
    "pair+int8",
    "quad+int8",
]


@pytest.mark.parametrize("clause", [clause if clause in QUICK else pytest.param(clause, marks=pytest.mark.slow) for clause in CLAUSES])
@pytest.mark.samples(4)
def test_hopper_scores_without_spills(clause):
    chosen = spec(clause)
    used = compiled(chosen, "score", 90, chosen.tiling.warps)
    if clause in QUICK:
        within_budget(f"select score {clause} sm_90", used)
    assert used.spilled <= SPILLED.get(triton_release(), {}).get(clause, 0)
    assert used.shared <= SHARED_LIMIT[90]
    assert used.wgmma > 0
    # no more than the stages of both operands: reshaped descriptors are multiplied where they lie
    assert used.shared < 4 * (128 + 256) * 64 * 2 + 1024


@pytest.mark.parametrize("clause", ["int8", "pair+int8", "pair", "quad+int8", "int8+peak", "pair+int8+peak"])
@pytest.mark.parametrize("stride, head_dim", [(16, 128), (8, 64), (4, 40), (16, 256)])
def test_hopper_prepares_without_spills(stride, head_dim, clause):
    chosen = spec(clause, stride=stride, head_dim=head_dim)
    used = compiled(chosen, "prepare_cells", 90, 8, APART=stride, SHIFTED=chosen.estimate.int8, SHARING=chosen.sharing)
    assert used.spilled == 0 and used.registers <= (128 if chosen.sharing == 1 else 192)


def choosing(chosen: SelectSpec, arch: int, width: int, **constexprs: int) -> Resources:
    """`choose` as it is launched for rows of so many key blocks."""
    warps = triton.choosing_warps(width, triton.LIMITS)
    return compiled(chosen, "choose", arch, warps, TILES=width // chosen.tile_blocks, **constexprs)


@pytest.mark.parametrize(
    "clause, width",
    [
        ("causal", 1024),
        ("density", 8192),
        ("everything", 8192),
        ("everything", 1024),
        ("row", 1024),
        ("row", 4096),
        ("row everything", 8192),
        ("row share", 1024),
        ("row share", 8192),
    ],
)
@pytest.mark.samples(2)
def test_hopper_chooses_without_spills(clause, width):
    chosen = spec(clause)
    used = choosing(chosen, 90, width)
    within_budget(f"select choose {clause} {width} sm_90", used)
    assert used.spilled == 0 and used.shared <= SHARED_LIMIT[90]


@pytest.mark.parametrize("clause", ["density", "everything", "row everything", "row share"])
@pytest.mark.samples(1)
def test_long_rows_without_spills(clause):
    chosen = spec(clause, wide=True)
    assert compiled(chosen, "pool", 90, 4, TILES=1024, PART=2048 // chosen.tile_blocks).spilled == 0
    assert compiled(chosen, "pick", 90, 8, WIDTH=2048).spilled == 0


@pytest.mark.slow
@pytest.mark.parametrize("clause", ["causal", "everything", "int8"])
@pytest.mark.parametrize("arch", [80, 100])
def test_other_architectures(clause, arch):
    chosen = spec(clause, arch)
    used = compiled(chosen, "score", arch, chosen.tiling.warps)
    assert used.mma > 0
    assert used.shared <= (99 * 1024 if arch == 80 else SHARED_LIMIT[arch])
    choosing(chosen, arch, 64 * chosen.tile_blocks)


@pytest.mark.slow
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("stride, block", [(4, 64), (8, 64), (16, 128)])
@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
def test_hopper_head_dims_strides_and_dtypes(head_dim, stride, block, dtype):
    used = compiled(spec(dtype=dtype, head_dim=head_dim, stride=stride, block=block), "score", 90, 8)
    assert used.spilled == 0 and used.shared <= SHARED_LIMIT[90] and used.wgmma > 0


QUAD = Estimate(merge=4, int8=True, peak=True)


def streaming(tile, estimate=DEFAULT, **changes):
    tiling = SelectTiling(*tile, 1, False)
    return spec("row", **{"stride": 4, "tiling": tiling, "streamed": True, "estimate": estimate, **changes})


@pytest.mark.parametrize(
    "name, changes",
    [
        ("every block", {}),
        ("every block, means of four", {"estimate": QUAD, "tile": streamed.TILES[128][0]}),
        ("by head", {"rule": "taus"}),
        ("groups", {"stride": 8, "grouped": True, "tile": streamed.TILES[512][0]}),
        ("groups, means of four", {"stride": 8, "grouped": True, "estimate": QUAD}),
        ("listed", {"listed": True, "finer": 2, "tile": streamed.TILES[256][1]}),
        ("listed, means of four", {"listed": True, "finer": 2, "estimate": QUAD, "tile": streamed.TILES[128][1]}),
        ("listed means", {"listed": True, "estimate": Estimate(merge=2), "head_dim": 80, "group": 7, "tile": streamed.TILES[512][1]}),
        ("listed exact", {"listed": True, "estimate": EXACT, "tile": streamed.PIECES[1]}),
        ("listed, one head", {"listed": True, "head_dim": 256, "group": 1, "tile": (32, *streamed.TILES[512][1][1:])}),
    ],
)
@pytest.mark.samples(3)
def test_hopper_streams_keys_without_spills(name, changes):
    chosen = streaming(**{"tile": streamed.TILES[256][0], **changes})
    used = compiled(chosen, "score", 90, chosen.tiling.warps)
    within_budget(f"select stream {name} sm_90", used)
    assert used.spilled == 0 and used.cp_async > 0
    assert (used.wgmma if chosen.tiling.rows >= 64 else used.mma) > 0
    assert used.shared <= SHARED_LIMIT[90]
    if chosen.tiling == SelectTiling(*streamed.TILES[256][0], 1, False):  # two programs at a time: one multiplies while the other compares
        assert used.shared <= SHARED_LIMIT[90] // 2  # budgets hold its registers: up to 128 of them


@pytest.mark.parametrize(
    "head_dim, stride, block, estimate",
    [
        pytest.param(80, 16, 128, "quad+int8+peak", marks=pytest.mark.slow),
        (128, 16, 128, "quad+int8+peak"),
        (128, 8, 64, "pair+int8+peak"),
        pytest.param(256, 8, 64, "quad+int8", marks=pytest.mark.slow),
        pytest.param(256, 8, 128, "quad+int8", marks=pytest.mark.slow),
        pytest.param(80, 16, 256, "quad+int8+peak", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("stage", ["first", pytest.param("second", marks=pytest.mark.slow)])
def test_hopper_tiles_fit_into_shared_memory(head_dim, stride, block, estimate, stage, monkeypatch):
    """Where a tile has many key blocks, what threads exchange of them takes its place beside cells."""
    monkeypatch.setattr(streamed, "meant", lambda device: torch.device("cuda"))
    monkeypatch.setattr(streamed, "shared_bytes", lambda device: SHARED_LIMIT[90])
    query, key = (torch.empty(1, heads, 1024, head_dim, dtype=torch.bfloat16, device="meta") for heads in (8, 2))
    options = {"estimate": estimate, "stride": stride, "refine_stride": stride // 2, "threshold": [0.8], "block_size": block}
    stages = SelectCall.bind(query, key, causal=True, pool="row", scale=1.0, **options).stages
    chosen = streamed.spec_of(stages[stage == "second"], triton.LIMITS, **{"grouped" if stage == "first" else "listed": True})
    used = compiled(chosen, "score", 90, chosen.tiling.warps)
    assert used.spilled == 0 and used.shared <= SHARED_LIMIT[90]


@pytest.mark.parametrize("places", [64, 256, 1024, 8192])
@pytest.mark.parametrize("stage", ["listed", "grouped", "least share"])
@pytest.mark.samples(2)
def test_hopper_chooses_from_logarithms_with_few_spills(places, stage):
    changes = {"stride": 8, "grouped": True} if stage == "grouped" else {"listed": True, "finer": 2, "min_share": stage == "least share"}
    constants, warps = streamed.choosing(places, 16 if stage == "grouped" else 32)
    used = compiled(streaming(streamed.TILES[256][0], **changes), "choose", 90, warps, PLACES=places, LEAST=-1, **constants)
    # 128 numbers a thread were the fastest on an H200 all the same; long rows hold their places beside them
    assert used.spilled <= (160 if places < 8192 else 304)
