"""Defaults of a method's options that depend on what else is given, as a table: what acts, and what docs/configuration.md says of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel


@dataclass(frozen=True)
class Computed:
    """A default that follows from other options.

    words: for people. of: from the options, those of earlier entries set.
    """

    words: str
    of: Callable[[Any], Any]


@dataclass(frozen=True)
class Defaults:
    """Defaults that stand in for others.

    when: in words that follow a value. holds: of the options, those of earlier entries set.
    values: by option, a value or what computes it.
    """

    when: str
    holds: Callable[[Any], bool]
    values: Mapping[str, Any]


def settle(options: BaseModel, table: Iterable[Defaults]) -> None:
    """Sets the options that were not given to what the table says, one entry after the other; later ones win."""
    for entry in table:
        if not entry.holds(options):
            continue
        free = {name: value for name, value in entry.values.items() if name not in options.model_fields_set}
        # computed before any is set: the order within an entry says nothing
        values = {name: value.of(options) if isinstance(value, Computed) else value for name, value in free.items()}
        for name, value in values.items():
            object.__setattr__(options, name, value)


def words(table: Iterable[Defaults], option: str, show: Callable[[Any], str]) -> list[str]:
    """What an option defaults to besides, and when: one text for each value, `0.95 with sum or max`.

    Args:
        show: a value as text.
    """
    found: dict[str, list[str]] = {}
    for entry in table:
        if option in entry.values:
            value = entry.values[option]
            found.setdefault(value.words if isinstance(value, Computed) else show(value), []).append(entry.when)
    return [f"{value} {', '.join(when)}" for value, when in found.items()]
