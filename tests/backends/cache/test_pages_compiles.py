"""Kernels over pages of keys compile for a GPU, without one: within shared memory and without spills."""

from __future__ import annotations

import pytest

from sparsify.backends.cache import decode, pages
from sparsify.backends.codegen import source
from tests.support.offline import SHARED_LIMIT, compile_kernel, within_budget

pytest.importorskip("triton")


def pages_spec(dtype="bf16", dim=128, kind="bounds", pieces=64, **clauses):
    return pages.PagesSpec(dtype, dim, 4, 16, pages.choose_tiling(dtype, dim), kind, 256, pieces, **{"single": True, **clauses})


def compiled(spec, kernel):
    module = source.load(pages.pages_source(spec), "pages")
    warps = spec.tiling.warps if kernel == "score" else pages._CHOOSING_WARPS
    return compile_kernel(getattr(module, kernel), pages.arguments(spec, kernel), arch=90, num_warps=warps, num_stages=1)


@pytest.mark.parametrize("clauses", [{}, {"padded": True, "grows": True, "early": True}], ids=str)
def test_score(clauses):
    used = compiled(pages_spec(**clauses), "score")
    within_budget(f"pages score{' padded, full' if clauses else ''} sm_90", used)
    assert used.spilled == 0 and used.mma > 0


@pytest.mark.parametrize("kind", ["groups", "clusters"])
def test_clusters(kind):
    used = compiled(pages_spec(kind=kind, pieces=18, reach=2 if kind == "clusters" else 0), "score")
    assert used.spilled == 0 and used.mma > 0 and used.shared <= SHARED_LIMIT[90]


@pytest.mark.parametrize("clauses", [{}, {"pieces": 36, "early": True}, {"single": False, "counted": True}], ids=str)
def test_choose(clauses):
    used = compiled(pages_spec(**clauses), "choose")
    how = {0: "", 36: " of 36 pieces"}[clauses.get("pieces", 0)] + (" of many" if "single" in clauses else "")
    within_budget(f"pages choose{how} sm_90", used)
    # nothing goes through shared memory but sums of warps: a thread holds whole lanes
    assert used.spilled == 0 and used.shared <= 1024


def test_bounds():
    spec = pages.BoundsSpec("bf16", 128, 16, True)
    kernel = source.load(pages.bounds_source(spec), "bounds").bounds_of
    used = compile_kernel(kernel, pages.bounds_arguments(spec), arch=90, num_warps=4, num_stages=2)
    within_budget("pages bounds sm_90", used)
    assert used.spilled == 0


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(
    "clauses", [{"grows": True}, {"padded": True, "rotate_sinks": True, "softcap": True, "sink_logits": True}], ids=["full", "all"]
)
@pytest.mark.samples(1)
def test_split_over_a_list(fused, clauses):
    spec = decode.DecodeSpec("bf16", 128, 128, 4, decode.choose_tiling("bf16", 128, listed=True), fused=fused, page=16, **clauses)
    module = source.load(decode.decode_source(spec), "decode")
    options = {"arch": 90, "num_warps": spec.tiling.warps, "num_stages": spec.tiling.stages}
    used = compile_kernel(
        module.split, decode.arguments(spec, "split"), constexprs={"SPLITS": 32, "MEMBERS": 4} if fused else {}, **options
    )
    within_budget(f"decode split pages {'full' if 'grows' in clauses else 'all'}{' fused' if fused else ''} sm_90", used)
    assert used.spilled == 0 and used.mma > 0
    assert used.cp_async > 0, "keys that are found along the list run ahead of the arithmetic, too"
    # three tiles of keys and values: the list's own loads take every second stage
    assert used.shared > 3 * 64 * 2 * 128 * 2
    assert used.shared <= SHARED_LIMIT[90] // 2
    if not fused:
        used = compile_kernel(
            module.combine, decode.arguments(spec, "combine"), arch=90, num_warps=4, num_stages=3, constexprs={"SPLITS": 64}
        )
        assert used.spilled == 0


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
@pytest.mark.parametrize("dim", [64, 80, 256])
def test_dims(dtype, dim):
    assert compiled(pages_spec(dtype, dim), "score").spilled == 0
    spec = pages.BoundsSpec(dtype, dim, 16, True)
    kernel = source.load(pages.bounds_source(spec), "bounds").bounds_of
    assert compile_kernel(kernel, pages.bounds_arguments(spec), arch=90, num_warps=4, num_stages=2).spilled == 0
