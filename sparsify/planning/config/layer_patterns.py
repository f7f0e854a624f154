"""Patterns that say which layers a rule is for: `3`, `4-27`, `0,2,5-7`, or a glob on the site's path (`path#1`: the second site there)."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable
from typing import Any

from sparsify.errors import ConfigError
from sparsify.planning.config.values import is_list


def parse(layers: Any, where: str) -> list[str]:
    """The single patterns of a rule's `layers`: a pattern, several with commas, or a list of these.

    Raises:
        ConfigError: something that is no pattern, at `where`.
    """
    patterns = [piece.strip() for item in (layers if is_list(layers) else [layers]) for piece in _pieces(item, where)]
    for pattern in patterns:
        bounds = re.fullmatch(r"(\d+)\s*-\s*(\d+)", pattern)
        if bounds and int(bounds[1]) > int(bounds[2]):
            raise ConfigError(f"the range {pattern!r} is empty", where=where, hint=f"write '{bounds[2]}-{bounds[1]}'")
        if not bounds and not pattern.isdecimal() and not re.search(r"[A-Za-z_*?\[#]", pattern):
            raise ConfigError(
                f"{pattern!r} is not a layer pattern",
                where=where,
                hint="'3', '4-27', '0,2,5-7' or a glob such as 'model.layers.*.self_attn'",
            )
        if pattern.count("[") != pattern.count("]"):
            raise ConfigError(f"{pattern!r} has an unbalanced bracket", where=where)
    if not patterns:
        raise ConfigError("names no layer", where=where, hint="'*' matches every site")
    return patterns


def _pieces(item: Any, where: str) -> list[str]:
    if isinstance(item, bool) or not isinstance(item, str | int):
        raise ConfigError(f"must be a layer pattern or a list of them, not {item!r}", where=where)
    return str(item).split(",")


def numbers(patterns: Iterable[str], name: str, layer: int | None) -> set[int | None]:
    """Which sites of this path are meant, of those that share it: their ordinals, None among them for all."""
    found: set[int | None] = set()
    for pattern in patterns:
        path, numbered, number = pattern.rpartition("#")
        single = numbered and number.isdecimal()
        if matches(path if single else pattern, name, layer):
            found.add(int(number) if single else None)
    return found


def matches(pattern: str, name: str, layer: int | None, ordinal: int = 0) -> bool:
    """Whether a site with this path and this number in it is meant, the ordinal-th of its path."""
    if bounds := re.fullmatch(r"(\d+)(?:\s*-\s*(\d+))?", pattern):
        return layer is not None and int(bounds[1]) <= layer <= int(bounds[2] or bounds[1])
    path, numbered, number = pattern.rpartition("#")
    if numbered and number.isdecimal():
        return int(number) == ordinal and fnmatch.fnmatchcase(name, path)
    return fnmatch.fnmatchcase(name, pattern)
