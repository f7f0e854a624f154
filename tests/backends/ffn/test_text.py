"""The text of generated feed-forward kernels: goldens, only the parts that are needed, and what is refused. No Triton, no GPU."""

from __future__ import annotations

import ast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsify.backends.ffn.source import MANY, FfnSpec, activation_source, choose_rows_tiling, choose_tiling, ffn_source, rows_source
from sparsify.errors import UnsupportedError
from tests.support.goldens import check_kernel_text

FAMILIES = {
    "llama": {"hidden": 4096, "intermediate": 14336},
    "gpt2": {"hidden": 768, "intermediate": 3072, "gated": False, "transposed": True, "activation": "gelu_tanh", "norm": "layer",
             "norm_bias": True, "up_bias": True, "down_bias": True},
    "gemma": {"hidden": 2304, "intermediate": 9216, "activation": "gelu_tanh", "norm": "rms_offset", "post_norm": "rms_offset"},
    "olmo2": {"hidden": 2048, "intermediate": 8192, "norm": "none", "post_norm": "rms_fp32", "scale": 0.5},
}  # fmt: skip


def spec(family: str, rows: int = 16) -> FfnSpec:
    fields = {"gated": True, **FAMILIES[family]}
    few = choose_tiling("bf16", rows, fields["hidden"], fields["intermediate"], fields["gated"], 132)
    return FfnSpec("bf16", rows, tiling=choose_rows_tiling("bf16", fields["gated"]) if rows == MANY else few, **fields)


def text_of(family: str, rows: int = 16) -> str:
    return rows_source(spec(family, rows)) if rows == MANY else ffn_source(spec(family, rows))


@pytest.mark.parametrize("family, rows", [("llama", 16), ("gpt2", MANY)])
def test_golden_text(family, rows):
    check_kernel_text(f"ffn_{family}{'' if rows else '_rows'}", text_of(family, rows))


@pytest.mark.parametrize("rows", [16, 32, MANY])
@pytest.mark.parametrize("family", FAMILIES)
def test_text_is_python_with_the_kernels_that_are_launched(family, rows):
    names = {node.name for node in ast.parse(text_of(family, rows)).body if isinstance(node, ast.FunctionDef)}
    few = {"activate", "project_up", "project_down", "finish"} | ({"normalise"} if family == "gpt2" else set())
    assert names == ({"activate", "compact", "normalise", "place", "project_up", "project_down", "finish"} if rows == MANY else few)


@pytest.mark.parametrize("rows", [16, MANY])
@pytest.mark.parametrize(
    ("word", "family", "without"),
    [("gate_acc", "llama", "gpt2"), ("up_bias + ", "gpt2", "llama"), ("POST_EPS)", "gemma", "llama"), ("* SCALE", "olmo2", "llama")],
)
def test_a_part_is_in_the_text_only_where_it_is_needed(word, family, without, rows):
    assert word in text_of(family, rows) and word not in text_of(without, rows)


@pytest.mark.parametrize(
    "change", [{"dtype": "fp8"}, {"rows": 64}, {"hidden": 1 << 15}, {"activation": "mish"}, {"norm": "batch"}, {"post_norm": "batch"}]
)
def test_what_no_kernel_serves_is_refused(change):
    fields = {"dtype": "bf16", "rows": 16, "hidden": 64, "intermediate": 128, "tiling": spec("llama").tiling} | change
    with pytest.raises(UnsupportedError, match=str(next(iter(change.values())))):
        FfnSpec(**fields)


@settings(deadline=None, max_examples=200)
@given(
    st.sampled_from(["bf16", "fp32"]),
    st.sampled_from([16, 32]),
    st.integers(16, 16384),
    st.integers(16, 65536),
    st.booleans(),
    st.sampled_from([46, 108, 132, 148]),
)
def test_two_programs_fit_a_processor_and_parts_cover_the_sum(dtype, rows, hidden, intermediate, gated, processors):
    tiling = choose_tiling(dtype, rows, hidden, intermediate, gated, processors)
    one = FfnSpec(dtype, rows, hidden, intermediate, tiling, gated)
    element = 4 if dtype == "fp32" else 2
    wide = tiling.up_stages * tiling.up_step * (tiling.up_tile * (1 + gated) + rows) * element
    project_down = tiling.down_stages * tiling.down_step * (tiling.down_tile + rows) * element
    assert max(wide, project_down) <= 112 * 1024
    assert min(tiling.up_tile, tiling.up_step, tiling.down_tile, tiling.down_step) >= 16 and tiling.parts >= 1
    assert one.part * tiling.parts >= intermediate and one.part % tiling.down_step == 0
    assert one.up_programs * tiling.up_tile >= intermediate


def test_the_activation_of_parts_is_in_the_text():
    plain, gated = (activation_source("bf16", "relu", gated) for gated in (False, True))
    assert "* factor" not in plain and "factor_row + column" not in plain and "factor_row + column" in gated
    ast.parse(plain), ast.parse(gated)
    with pytest.raises(UnsupportedError, match="no feed-forward kernel"):
        activation_source("bf16", "tanh", True)
