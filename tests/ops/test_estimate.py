"""The table of the estimate's variants, and the value made from it."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import get_args

import pytest

from sparsify.errors import UnsupportedError
from sparsify.ops.estimate import DEFAULT, EXACT, EXAMPLES, VARIANTS, Estimate, VariantName, as_markdown, label, parse_label


def test_names_go_there_and_back():
    for names in itertools.chain.from_iterable(itertools.combinations(VARIANTS, n) for n in range(4)):
        if {"pair", "quad"} <= set(names):
            continue
        found = Estimate.from_names(reversed(names))
        assert found.variants == names and Estimate.parse(str(found)) == found
        assert parse_label(label("sum", found)) == {"pool": "sum", "estimate": found}
        stages = {"refine_stride": 4, "coarse_threshold": 0.95}
        assert parse_label(label("row", found, **stages)) == {"pool": "row", "estimate": found, **stages}
        share = {"min_share": 0.03}
        assert parse_label(label("row", found, **share, **stages)) == {"pool": "row", "estimate": found, **share, **stages}
    assert (str(EXACT), str(DEFAULT), label("max", EXACT)) == ("exact", "pair+int8+peak", "max")


@pytest.mark.parametrize(
    ("names", "match"), [(("third",), "unknown variant 'third'"), (("int8", "int8"), "twice"), (("quad", "pair"), "quad and pair exclude")]
)
def test_what_is_no_estimate(names, match):
    with pytest.raises(UnsupportedError, match=match):
        Estimate.from_names(names)


def test_every_variant_changes_something_and_has_examples():
    assert tuple(VARIANTS) == get_args(VariantName)
    assert len(set(EXAMPLES)) == len(EXAMPLES) and EXAMPLES[0] == EXACT and DEFAULT in EXAMPLES
    for name, one in VARIANTS.items():
        assert Estimate.from_names([name]) != EXACT and min(Estimate.from_names([name]).share(4), Estimate.from_names([name]).entry) < 1
        assert Estimate.from_names([name]) in EXAMPLES and all(name in Estimate.parse(example).variants for example in one.examples)


def test_the_documentation_has_the_table():
    assert as_markdown() in (Path(__file__).parents[2] / "docs" / "kernels.md").read_text(encoding="utf-8")
