"""The text of generated kernels over a cache: goldens, and only the clauses that are needed. No Triton, no GPU."""

from __future__ import annotations

import ast

import pytest

from sparsify.backends.cache import append, decode, mass, pages
from tests.support.goldens import check_kernel_text


def decode_spec(**clauses):
    tiling = decode.choose_tiling("bf16", 128, listed=clauses.get("page", 0) > 0)
    return decode.DecodeSpec("bf16", 128, 128, 4, tiling, **clauses)


def pages_spec(kind="bounds", pieces=18, **clauses):
    tiling = pages.choose_tiling("bf16", 128)
    return pages.PagesSpec("bf16", 128, 4, 16, tiling, kind, 256, pieces, **{"single": True, **clauses})


def append_spec(rows=4096, **clauses):
    tiling = append.choose_tiling("bf16", 128, rows, rotate_sinks=clauses.get("rotate_sinks", False))
    return append.AppendSpec("bf16", 128, 128, 4, tiling, **clauses)


def mass_spec(dim=128, softcap=False):
    return mass.MassSpec("bf16", dim, 4, mass.choose_tiling("bf16", dim, 4, 32), softcap)


# name -> module, text, spec, kernels
KERNELS = {
    "decode": (decode, decode.decode_source, decode_spec(), ("split", "combine")),
    "decode_fused": (decode, decode.decode_source, decode_spec(fused=True, whole=True), ("split",)),
    "decode_all": (
        decode, decode.decode_source, decode_spec(softcap=True, sink_logits=True, padded=True, rotate_sinks=True), ("split", "combine"),
    ),
    "decode_pages": (decode, decode.decode_source, decode_spec(fused=True, grows=True, page=16), ("split",)),
    "decode_packed": (decode, decode.decode_source, decode_spec(fused=True, grows=True, packed=True), ("split",)),
    "pages": (pages, pages.pages_source, pages_spec(padded=True, early=True), ("score", "choose")),
    "pages_of_many": (pages, pages.pages_source, pages_spec(pieces=64, single=False, counted=True), ("score", "choose")),
    "groups": (pages, pages.pages_source, pages_spec("groups", pieces=2), ("score", "choose")),
    "clusters": (pages, pages.pages_source, pages_spec("clusters", grows=True, reach=2), ("score", "choose")),
    "append": (append, append.append_source, append_spec(), ("split",)),
    "append_split": (append, append.append_source, append_spec(20, single=False, has_new=False), ("split", "combine")),
    "append_all": (
        append, append.append_source, append_spec(windowed=True, padded=True, rotate_sinks=True, softcap=True, sink_logits=True),
        ("split",),
    ),
    "mass": (mass, mass.mass_source, mass_spec(), ("row_sums", "key_sums")),
    "mass_softcap": (mass, mass.mass_source, mass_spec(80, softcap=True), ("row_sums", "key_sums")),
}  # fmt: skip


@pytest.mark.parametrize("name", KERNELS)
def test_golden_text(name):
    _, source, spec, _ = KERNELS[name]
    check_kernel_text(name, source(spec))


@pytest.mark.parametrize("name", KERNELS)
def test_text_is_python_whose_parameters_are_the_arguments(name):
    module, source, spec, kernels = KERNELS[name]
    functions = {node.name: node for node in ast.parse(source(spec)).body if isinstance(node, ast.FunctionDef)}
    for kernel in kernels:
        assert [parameter.arg for parameter in functions[kernel].args.args] == [a.name for a in module.arguments(spec, kernel)]


@pytest.mark.parametrize("word", ["cap_log2", "sink_logits", "q_rotated", "stores = tl.load"])
def test_a_clause_is_in_the_text_only_where_it_is_asked_for(word):
    assert word in decode.decode_source(KERNELS["decode_all"][2]) and word not in decode.decode_source(KERNELS["decode"][2])
