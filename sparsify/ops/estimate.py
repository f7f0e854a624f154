"""The variants of the block estimate, by name, as the method's option and the op's `pool` suffixes have them."""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal, get_args

Variant = Literal["half", "group", "pair", "quad", "int8"]
VARIANTS: tuple[str, ...] = get_args(Variant)


def merged(variants: Collection[str]) -> int:
    """Neighbouring tokens whose mean stands for them all; 1: none are merged."""
    return 4 if "quad" in variants else 2 if "pair" in variants else 1
