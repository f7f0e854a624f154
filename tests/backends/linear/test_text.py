"""The text of the generated kernels of linear layers: goldens, only the parts that are needed, and what is refused. No Triton, no GPU."""

from __future__ import annotations

import ast
import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsify.backends.linear.source import TENSOR_ROWS, LinearSpec, LinearTiling, arguments, choose_tiling, linear_source
from sparsify.errors import UnsupportedError
from sparsify.ops.limits import LINEAR_MAX_ROWS
from tests.support.goldens import check_kernel_text

VECTOR, TENSOR = LinearTiling(2, 2048, 4), LinearTiling(16, 64, 8, 3)
SPECS = {
    "qkv": LinearSpec("bf16", 1, 4096, (4096, 1024, 1024), VECTOR, norm="rms", eps=1e-5, early=True),
    "gate": LinearSpec("bf16", 1, 4096, (14336, 14336), VECTOR, norm="rms", eps=1e-5, activation="silu", early=True),
    "sum": LinearSpec("bf16", 16, 14336, (4096,), TENSOR, residual=True),
    "odd": LinearSpec("fp16", 8, 1000, (77, 19), TENSOR, biased=True),
}


@pytest.mark.parametrize("name", ["qkv", "gate", "sum"])
def test_golden_text(name):
    check_kernel_text(f"linear_{name}", linear_source(SPECS[name]))


@pytest.mark.parametrize("name", SPECS)
def test_text_is_python_with_the_arguments_of_a_launch(name):
    functions = {node.name: node for node in ast.parse(linear_source(SPECS[name])).body if isinstance(node, ast.FunctionDef)}
    assert [a.arg for a in functions["linear"].args.args] == [a.name for a in arguments(SPECS[name])]


@pytest.mark.parametrize(
    ("word", "name", "without"),
    [
        ("EPS", "qkv", "sum"), ("weight_3", "qkv", "gate"), ("activate(", "gate", "qkv"), ("residual", "sum", "qkv"),
        ("tl.dot", "sum", "qkv"), ("gdc_wait", "qkv", "sum"),
        ("mask=(column", "odd", "sum"), ("bias_2", "odd", "qkv"),
    ],
)  # fmt: skip
def test_a_part_is_in_the_text_only_where_it_is_needed(word, name, without):
    assert word in linear_source(SPECS[name]) and word not in linear_source(SPECS[without])


@pytest.mark.parametrize(
    "change, what",
    [
        ({"dtype": "fp8"}, "dtype fp8"), ({"rows": 2}, "2 rows"), ({"outputs": (1,) * 4}, "4 weights"), ({"norm": "layer"}, "norm 'layer'"),
        ({"activation": "silu"}, "1 weights"), ({"rows": 16, "tiling": TENSOR, "norm": "rms"}, "norm on tensor cores"),
    ],
)  # fmt: skip
def test_what_no_kernel_serves_is_refused(change, what):
    plain = LinearSpec("bf16", 1, 64, (64,), VECTOR)
    with pytest.raises(UnsupportedError, match=what):
        dataclasses.replace(plain, **change)


@settings(deadline=None, max_examples=200)
@given(
    st.sampled_from(["bf16", "fp16", "fp32"]),
    st.integers(1, LINEAR_MAX_ROWS),
    st.integers(1, 2048).map(lambda n: 8 * n),
    st.lists(st.integers(1, 65536), min_size=1, max_size=3).map(tuple),
    st.booleans(),
    st.booleans(),
)
def test_tilings_are_of_powers_of_two_and_fit(dtype, rows, inputs, outputs, gated, normed):
    outputs = outputs[:1] * 2 if gated else outputs
    normed = normed and rows == 1
    tiling = choose_tiling(dtype, rows, inputs, gated, normed)
    assert all(n & (n - 1) == 0 for n in (tiling.columns, tiling.step, tiling.warps))
    rows = next(tile for tile in TENSOR_ROWS if tile >= rows) if tiling.tensor else 1
    names = {"activation": "silu" if gated else "none", "norm": "rms" if normed else "none"}
    spec = LinearSpec(dtype, rows, inputs, outputs, tiling, **names)
    assert spec.programs >= 1
    ast.parse(linear_source(spec))
    if tiling.tensor:
        assert tiling.stages * tiling.stride * (tiling.columns * (1 + gated) + rows) * (4 if dtype == "fp32" else 2) <= 227 * 1024
