"""Defaults that depend on what else is given: one table says what acts and what the pages say."""

from __future__ import annotations

from typing import ClassVar

import pytest
from pydantic import Field, ValidationError

from sparsify.passes.xattention import XAttention
from sparsify.planning import defaults
from sparsify.planning.config import docs
from sparsify.planning.method import Computed, Defaults, Pass


class Sized(Pass):
    name: ClassVar[str] = "sized"
    defaults: ClassVar[tuple[Defaults, ...]] = (
        Defaults(
            "with a size", lambda options: "size" in options.model_fields_set, {"count": 3, "both": Computed("twice", lambda o: o.size)}
        ),
        Defaults("with a count of 3", lambda options: options.count == 3, {"size": 7, "both": Computed("twice", lambda o: 2 * o.size)}),
        Defaults("with a count of 3", lambda options: options.count == 3, {"count": 3}),
    )
    size: int = Field(1, description="of it")
    count: int = Field(2, le=5, description="of them")
    both: int = Field(0, description="of both")


def values(method: Sized) -> tuple[int, int, int]:
    return method.size, method.count, method.both


def test_entries_follow_one_another_and_what_is_given_stays():
    assert values(Sized()) == (1, 2, 0)
    assert values(Sized(size=4)) == (4, 3, 8)
    assert values(Sized(count=3)) == (7, 3, 2)
    assert values(Sized(size=4, count=2)) == (4, 2, 4)
    assert values(Sized(size=4, both=1)) == (4, 3, 1)
    assert values(Sized.model_validate(Sized(size=4).options())) == (4, 3, 8)
    with pytest.raises(ValidationError):
        Sized(size=4, count=6)


def test_pages_and_the_terminal_say_the_same():
    page = docs.markdown({"sized": Sized})
    assert "| `size` | integer | `1`; `7` with a count of 3 | Of it |" in page
    assert "| `count` | integer, ≤ 5 | `2`; `3` with a size, with a count of 3 | Of them |" in page
    assert "| `both` | integer | `0`; twice with a size, with a count of 3 | Of both |" in page
    assert "size = 1; 7 with a count of 3: integer; of it" in docs.option_lines(Sized)


# what each entry of the table waits for, by its words
GIVEN = {
    "with a density": {"density": 0.2},
    "with sum or max": {"pool": "sum"},
    "where a threshold is given": {"threshold": 0.97},
    "where a stride is given": {"stride": 8},
    "with patterns": {"patterns": [[8, 8], []]},
    "in two stages": {"threshold": 0.97},
    "in one stage": {"refine_stride": None},
    "in one stage under the row rule": {"refine_stride": None},
}


@pytest.mark.parametrize("entry", XAttention.defaults, ids=lambda entry: entry.when)
def test_every_entry_of_xattention_decides_something(entry):
    """Without it the same options would mean something else, and the page names it at each option that it sets."""
    given = GIVEN[entry.when]
    method = XAttention.model_validate(given)
    assert entry.holds(method)

    class Without(XAttention):
        defaults = tuple(one for one in XAttention.defaults if one is not entry)

    try:
        changed = Without.model_validate(given).model_dump() != method.model_dump()
    except ValidationError:  # options that the entry keeps from contradicting each other
        changed = True
    assert changed
    rows = {line.split("`")[1]: line for line in docs.markdown({"xattention": XAttention}).splitlines() if line.startswith("| `")}
    assert all(entry.when in rows[name].split(" | ")[2] for name in entry.values)


def test_a_value_is_named_once_for_all_that_brings_it():
    assert defaults.words(XAttention.defaults, "refine_stride", str) == ["None with sum or max, where a stride is given, with patterns"]
    assert defaults.words(XAttention.defaults, "block", str) == []
