"""The lines and fields of kernel templates."""

from __future__ import annotations

import pytest

from sparsify.backends.codegen.template import render

TEMPLATE = """\
first
%if a
  a = ${size * 2}
  %if b
  both
  %end
%elif b
only b
%else
neither
%end
last"""


@pytest.mark.parametrize(
    ("a", "b", "middle"),
    [(True, False, "  a = 8\n"), (True, True, "  a = 8\n  both\n"), (False, True, "only b\n"), (False, False, "neither\n")],
)
def test_branches(a, b, middle):
    assert render(TEMPLATE, {"a": a, "b": b, "size": 4}) == f"first\n{middle}last\n"


def test_what_is_left_out_is_not_evaluated():
    assert render("%if False\n${missing}\n%end\nkept", {}) == "kept\n"


def test_signs_of_inserted_text_are_left_alone():
    assert render("${ptx} $1 %p", {"ptx": "${size} $0; %r1"}) == "${size} $0; %r1 $1 %p\n"


def test_lines_are_repeated_within_and_around_branches():
    text = """%for i in range(count)
%if i
then ${i}
%for j in range(i)
  ${i * 10 + j}
%end
%else
first
%end
%end
%if not count
%for i in missing
never
%end
%end
last"""
    assert render(text, {"count": 3}) == "first\nthen 1\n  10\nthen 2\n  20\n  21\nlast\n"


@pytest.mark.parametrize("template", ["%if missing\n%end", "${missing}"])
def test_an_unknown_value_is_an_error(template):
    with pytest.raises(NameError, match="missing"):
        render(template, {})


@pytest.mark.parametrize(
    "broken", ["%if True", "%end", "%else\nx", "%for i in range(2)", "%for i\n%end", "%for i in range(1)\n%if True\n%end"]
)
def test_directives_must_nest(broken):
    with pytest.raises(ValueError, match="%"):
        render(broken, {})
