"""In which order a graph's tensors hold the dimensions of attention. A layout is a letter a dimension: b(atch), h(eads), l(ength),
d (numbers of a head), or n for batch and heads as one dimension, batch outside.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

STANDARD = "bhld"
Size = TypeVar("Size")


@dataclass(frozen=True)
class Layouts:
    """Layouts of a site's query, key, value and output."""

    query: str = STANDARD
    key: str = STANDARD
    value: str = STANDARD
    output: str = STANDARD


IN_ORDER = Layouts()


def order(layout: str) -> tuple[int, ...]:
    """Place of each standard dimension in a tensor whose batch and heads are apart: what `permute` takes to get there."""
    return tuple(layout.replace("n", "bh").index(letter) for letter in STANDARD)


def back(layout: str) -> tuple[int, ...]:
    """What `permute` takes to get from the standard order to the layout with batch and heads apart."""
    return tuple(STANDARD.index(letter) for letter in layout.replace("n", "bh"))


def arranged(sizes: Sequence[Size], layout: str, heads: Sequence[Size] = ()) -> tuple[Size, ...]:
    """A tensor's sizes as [batch, heads, length, dim]. heads: (batch, heads) where the two are one dimension."""
    if layout == STANDARD:
        return tuple(sizes)
    if "n" in layout:
        place = layout.index("n")
        sizes = [*sizes[:place], *heads, *sizes[place + 1 :]]
    return tuple(sizes[place] for place in order(layout))


def length_dim(layout: str) -> int:
    """The dimension that counts tokens."""
    return layout.index("l")
