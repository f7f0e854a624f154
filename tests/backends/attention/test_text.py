"""The text of generated attention kernels: goldens, only the clauses that are needed, and what is refused. No Triton, no GPU."""

from __future__ import annotations

import ast
import dataclasses

import pytest

from sparsify.backends.attention.triton_source import AttentionSpec, AttentionTiling, arguments, attention_source, choose_tiling, programs
from sparsify.backends.codegen.arguments import ITEM_BYTES
from sparsify.errors import UnsupportedError
from tests.support.goldens import check_kernel_text
from tests.support.kernel_specs import CLAUSES, spec


@pytest.mark.parametrize("clause", ["causal", "window_sinks", "block_lists", "padded_window_per_head", "decode"])
def test_golden_text(clause):
    check_kernel_text(f"attention_{clause}", attention_source(spec(clause)))


@pytest.mark.parametrize("clause", CLAUSES)
def test_text_is_python_whose_parameters_are_the_arguments(clause):
    chosen = spec(clause)
    functions = {node.name: node for node in ast.parse(attention_source(chosen)).body if isinstance(node, ast.FunctionDef)}
    assert set(functions) == {"fold_tile", "attention"}
    assert [parameter.arg for parameter in functions["attention"].args.args] == [argument.name for argument in arguments(chosen)]


@pytest.mark.parametrize(
    ("word", "clause"),
    {
        "position[:, None]": "causal",
        "window": "window",
        "sinks": "window_sinks",
        "segment": "segments",
        "entries": "block_lists",
        "flags_row": "padding",
        "slope": "logits",
        "cap_log2": "logits",
        "query_start": "static_cache",
        "row // GROUP": "decode",
    }.items(),
)
def test_a_clause_is_in_the_text_only_where_it_is_asked_for(word, clause):
    assert word in attention_source(spec(clause))
    assert word not in attention_source(spec("everything_visible"))


def test_only_newer_compilers_get_whole_tiles_without_a_bound_on_their_flags():
    unbounded = "flags = tl.load(flags_row + keys).to(tl.int32)"
    for clause in CLAUSES:
        assert (unbounded in attention_source(spec(clause), (3, 8))) == CLAUSES[clause].get("key_flags", False)
        assert unbounded not in attention_source(spec(clause), (3, 7))


@pytest.mark.parametrize("dims", [(64, 64), (80, 80), (96, 96), (112, 112), (128, 128), (192, 128), (256, 256)])
def test_head_dims_are_padded_and_guarded(dims):
    text = attention_source(spec("causal", dims=dims))
    power_of_two = dims[0] & (dims[0] - 1) == 0
    assert ("qk_dims < " in text) != power_of_two
    assert f"QK_DIM = tl.constexpr({dims[0] if power_of_two else 1 << dims[0].bit_length()})" in text


BASE = spec("causal")


@pytest.mark.parametrize(
    "wrong",
    [
        {"dtype": "fp64"},
        {"qk_head_dim": 512},
        {"window": "some"},
        {"sinks": "count"},
        {"window": "one", "sinks": "flags"},
        {"window": "one", "sinks": "count", "key_flags": True},
        {"block_lists": True, "block_size": 96},
        {"block_lists": True, "block_size": 128, "packed": True, "tiling": AttentionTiling(16, 64, 4, 2)},
    ],
)
def test_impossible_specs_are_refused(wrong):
    with pytest.raises(UnsupportedError, match=r"no (attention )?kernel"):
        dataclasses.replace(BASE, **wrong)


def test_every_row_has_a_program():
    tile = BASE.tiling.queries
    assert programs(BASE, 2, 8, tile) == 2 * 8 * 4
    assert programs(BASE, 2, 8, tile + 1) == 2 * 2 * 8 * 4
    packed = spec("decode")
    assert programs(packed, 2, 8, 1) == 16
    assert programs(packed, 2, 8, 5) == 32  # 20 rows of (query, head) in tiles of 16


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)])
@pytest.mark.parametrize("dtype", ITEM_BYTES)
def test_tiles_divide_blocks_for_every_gpu(capability, dtype):
    for dims in ((64, 64), (128, 128), (192, 128), (256, 256)):
        for block_size in (32, 64, 128):
            tiling = choose_tiling(dtype, *dims, capability, block_size=block_size)
            AttentionSpec(dtype, *dims, 1, tiling, block_lists=True, block_size=block_size)  # raises when they do not
            assert tiling.stages >= 1
