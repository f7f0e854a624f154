"""Inductor's own options and modes, checked before Inductor sees them: its messages for a wrong one come from deep inside torch."""

from __future__ import annotations

import difflib
import functools
from collections.abc import Mapping
from typing import Any, Literal, get_args, get_origin

from sparsify.errors import ConfigError, nearest
from sparsify.planning.config.values import is_table, is_union


@functools.cache
def known_options() -> dict[str, Any]:
    """The declared type of every option, by dotted name."""
    from torch._inductor import config  # imported here: it costs a second, and most configurations name none of its options

    module: Any = config  # torch installs these functions when it loads the module
    return {name: module.get_type(name) for name in module.get_config_copy()}


def flatten(table: Mapping[Any, Any], source: str) -> dict[str, Any]:
    """Options by dotted name. `[inductor.triton] cudagraphs = true` and `"triton.cudagraphs" = true` say the same.

    Raises:
        ConfigError: for a name that Inductor does not know, or a value of another type than it declares.
    """
    known = known_options()
    flat: dict[str, Any] = {}

    def walk(part: Mapping[Any, Any], prefix: str) -> None:
        for key, value in part.items():
            if not isinstance(key, str):
                raise ConfigError(f"keys are strings, not {key!r}", where=f"{source}: inductor")
            name = prefix + key.replace("-", "_")
            if name in known:
                if not _accepts(known[name], value):
                    raise ConfigError(f"must be {_type_name(known[name])}, not {value!r}", where=f"{source}: inductor.{name}")
                flat[name] = value
            elif is_table(value) and any(option.startswith(f"{name}.") for option in known):
                walk(value, f"{name}.")
            else:
                close = difflib.get_close_matches(name, known, n=1)
                hint = f"did you mean {close[0]!r}?" if close else "torch._inductor.list_options() names them all"
                raise ConfigError("Inductor has no such option", where=f"{source}: inductor.{name}", hint=hint)

    walk(table, "")
    return flat


def _accepts(kind: Any, value: Any) -> bool:
    origin = get_origin(kind)
    if origin is Literal:
        return value in get_args(kind)
    if is_union(kind):
        return any(_accepts(part, value) for part in get_args(kind))
    if isinstance(origin, type) and origin in (list, dict, tuple):
        return isinstance(value, origin)
    if not isinstance(kind, type) or origin is not None:
        return True  # callables and names of classes that Inductor imports late
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    return isinstance(value, kind) and (kind is not int or not isinstance(value, bool))


def _type_name(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return " or ".join(map(repr, get_args(kind)))
    return kind.__name__ if isinstance(kind, type) and get_origin(kind) is None else str(kind)


def mode_options(mode: str | None) -> dict[str, Any]:
    """What a mode of `torch.compile` sets, as Inductor's own backend reads it."""
    if mode is None:
        return {}
    from torch._inductor import list_mode_options

    return dict(list_mode_options(mode))


def check_mode(mode: str | None, inductor: Mapping[str, Any], source: str) -> None:
    """
    Raises:
        ConfigError: there is no such mode, or an explicit option contradicts what it sets.
    """
    if mode is None:
        return
    from torch._inductor import list_mode_options

    modes = list_mode_options()
    if mode not in modes:
        raise ConfigError(f"there is no mode {mode!r}", where=f"{source}: mode", hint=nearest(mode, modes))
    for key, value in modes[mode].items():
        if key in inductor and inductor[key] != value:
            raise ConfigError(
                f"mode {mode!r} sets it to {value!r}, not {inductor[key]!r}", where=f"{source}: inductor.{key}", hint="drop one of the two"
            )
