"""Kernels over pages of keys compile for a GPU, without one: within shared memory and without spills."""

from __future__ import annotations

import pytest

from sparsify.backends.cache import decode, pages
from sparsify.backends.codegen import source
from tests.support.offline import SHARED_LIMIT, compile_kernel, within_budget

pytest.importorskip("triton")


def pages_spec(dtype="bf16", dim=128, lanes=16384, **clauses):
    return pages.PagesSpec(dtype, dim, 4, 16, lanes, **{"single": True, **clauses})


@pytest.mark.parametrize("clauses", [{}, {"padded": True, "grows": True}], ids=str)
def test_score(clauses):
    spec = pages_spec(**clauses)
    kernel = source.load(pages.pages_source(spec), "pages").score
    used = compile_kernel(kernel, pages.arguments(spec, "score"), arch=90, num_warps=4, num_stages=1)
    within_budget(f"pages score{' padded, full' if clauses else ''} sm_90", used)
    assert used.spilled == 0 and used.mma > 0


@pytest.mark.parametrize("name", ["score_groups", "score_clusters"])
def test_clusters(name):
    spec = pages_spec(clusters=True, reach=True)
    kernel = getattr(source.load(pages.pages_source(spec), "pages"), name)
    used = compile_kernel(kernel, pages.arguments(spec, name), arch=90, num_warps=4, num_stages=1)
    assert used.spilled == 0 and used.mma > 0 and used.shared <= SHARED_LIMIT[90]


@pytest.mark.parametrize("clauses", [{}, {"single": False, "counted": True}], ids=str)
def test_choose(clauses):
    spec = pages_spec(**clauses)
    kernel = source.load(pages.pages_source(spec), "pages").choose
    used = compile_kernel(kernel, pages.arguments(spec, "choose"), arch=90, num_warps=16, num_stages=1)
    within_budget(f"pages choose{' of many' if clauses else ''} sm_90", used)
    assert used.spilled == 0 and used.shared <= SHARED_LIMIT[90]


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
    spec = decode.DecodeSpec("bf16", 128, 128, 4, decode.choose_tiling("bf16", 128), fused=fused, page=16, **clauses)
    module = source.load(decode.decode_source(spec), "decode")
    options = {"arch": 90, "num_warps": spec.tiling.warps, "num_stages": spec.tiling.stages}
    used = compile_kernel(
        module.split, decode.arguments(spec, "split"), constexprs={"SPLITS": 32, "MEMBERS": 4} if fused else {}, **options
    )
    within_budget(f"decode split pages {'full' if 'grows' in clauses else 'all'}{' fused' if fused else ''} sm_90", used)
    assert used.spilled == 0 and used.mma > 0
    assert used.cp_async > 0, "keys that are found along the list run ahead of the arithmetic, too"
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
    spec = pages_spec(dtype, dim)
    kernel = source.load(pages.pages_source(spec), "pages").score
    assert compile_kernel(kernel, pages.arguments(spec, "score"), arch=90, num_warps=4, num_stages=1).spilled == 0
    spec = pages.BoundsSpec(dtype, dim, 16, True)
    kernel = source.load(pages.bounds_source(spec), "bounds").bounds_of
    assert compile_kernel(kernel, pages.bounds_arguments(spec), arch=90, num_warps=4, num_stages=2).spilled == 0
