"""What is compared: options of the compiler, or a cache that evicts, under a name."""

from __future__ import annotations

import json
import math
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsify.commands import arguments, loading
from sparsify.errors import ConfigError, PlanError
from sparsify.planning.plan import Plan

DENSE = "dense"
_ASKED = {"min_length": 0}  # who names a threshold or a density wants it at every length
_SHORT = {"tau": "threshold", "τ": "threshold", "density": "density"}


@dataclass(frozen=True)
class CacheSetting:
    """A SparseCache, and whether the question is part of the call that it compresses ("inside") or comes after it ("outside").

    budget: tokens, or a share of the prompt.
    """

    policy: str
    budget: int | float
    options: tuple[tuple[str, Any], ...] = ()
    question: str = "inside"

    def tokens(self, length: int) -> int:
        """The budget for a prompt of `length` tokens."""
        return self.budget if isinstance(self.budget, int) else max(1, math.ceil(self.budget * length))


@dataclass(frozen=True)
class Setting:
    """A name, and how the model runs under it. options: None leaves it uncompiled."""

    name: str
    options: Mapping[str, Any] | None
    cache: CacheSetting | None = None

    def data(self) -> dict[str, Any]:
        found: dict[str, Any] = {"name": self.name, "options": None if self.options is None else dict(self.options)}
        if self.cache is not None:
            found["cache"] = {**vars(self.cache), "options": dict(self.cache.options)}
        return found


def parse(text: str) -> Setting:
    """`dense`, `eager`, `default`, `tau=0.9`, `density=0.1`, `NAME=FILE` (options as JSON, a plan, or a TOML configuration) and
    `NAME:KEY=VALUE[,KEY=VALUE]`.

    Raises:
        ConfigError: anything else, and files that cannot be read.
    """
    whole = {DENSE: {"exact": True}, "eager": None, "default": {}}
    if text in whole:
        return Setting(text, whole[text])
    where = f"--setting {text}"
    named = re.fullmatch(r"([^=:]+):(.+=.*)", text, re.DOTALL)
    if named:
        return Setting(named[1].strip(), loading.options_of(_pieces(named[2])))
    name, equals, value = text.partition("=")
    name = name.strip()
    if not equals or not name or name in whole:
        hint = "dense, eager, default, tau=0.9, density=0.1, NAME=FILE or NAME:KEY=VALUE,KEY=VALUE"
        raise ConfigError("is no setting", where=where, hint=hint)
    if name in _SHORT:
        try:
            number = float(value)
        except ValueError:
            raise ConfigError(f"{value!r} is no number", where=where) from None
        return Setting(f"{name} {number:g}".replace("tau", "τ"), {**_ASKED, "xattention": {_SHORT[name]: number}})
    return Setting(name, _from_file(Path(value).expanduser(), where))


def _pieces(text: str) -> list[str]:
    """Cut at commas that stand outside of brackets and quotes."""
    found, depth, quoted, start = [], 0, "", 0
    for place, letter in enumerate(text):
        if quoted:
            quoted = "" if letter == quoted else quoted
        elif letter in "\"'":
            quoted = letter
        else:
            depth += (letter in "[{") - (letter in "]}")
            if letter == "," and depth == 0:
                found.append(text[start:place])
                start = place + 1
    return [*found, text[start:]]


def _from_file(path: Path, where: str) -> dict[str, Any]:
    if path.suffix == ".toml":
        return {"config": str(path)}
    try:
        text = path.read_text(encoding="utf-8")
        data = json.loads(text)
    except OSError as error:
        raise ConfigError(f"cannot be read: {error.strerror}", where=where) from None
    except ValueError as error:
        try:  # TOML by another name
            tomllib.loads(path.read_bytes().decode("utf-8", errors="replace"))
        except tomllib.TOMLDecodeError:
            raise ConfigError(f"is neither JSON nor TOML: {error}", where=where) from None
        return {"config": str(path)}
    if not isinstance(data, dict):
        raise ConfigError("must be a table of options, or a plan", where=where)
    if "decisions" in data:
        try:
            Plan.from_json(text, str(path))
        except PlanError as error:
            raise ConfigError(error.what, where=where, hint=error.hint) from None
        return {"plan": str(path)}
    return data


def parse_cache(text: str) -> list[Setting]:
    """`POLICY:BUDGET[:KEY=VALUE,...]` as two settings of exact attention: the question inside of what is compressed, and outside.

    Raises:
        ConfigError: anything else.
    """
    where = f"--cache {text}"
    policy, _, rest = text.partition(":")
    amount, _, pairs = rest.partition(":")
    tokens = arguments.count(amount)
    budget: int | float | None = tokens or None
    if re.fullmatch(r"0?\.\d+|1\.0*", amount) and float(amount) > 0:
        budget = float(amount)
    if not policy or budget is None:
        hint = "POLICY:BUDGET with tokens or a share, such as snapkv:512 or streaming_llm:0.25"
        raise ConfigError("is no cache", where=where, hint=hint)
    options = tuple(loading.options_of(_pieces(pairs)).items()) if pairs else ()
    named = f"{policy} {amount}" + (f" {pairs}" if pairs else "")
    return [
        Setting(f"{named}, question {side}", {"exact": True}, CacheSetting(policy, budget, options, side)) for side in ("inside", "outside")
    ]


def all_of(settings: list[str], caches: list[str]) -> list[Setting]:
    """Everything asked for, dense attention first.

    Raises:
        ConfigError: two of one name.
    """
    found = [parse(text) for text in settings] or [parse("default")]
    found = [*found, *(setting for text in caches for setting in parse_cache(text))]
    found = [next((one for one in found if one.name == DENSE), parse(DENSE)), *(one for one in found if one.name != DENSE)]
    names = [one.name for one in found]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"{name!r} is named twice", where="--setting")
    return found


def merged(common: Mapping[str, Any], setting: Setting) -> dict[str, Any]:
    """The setting's options over those that hold for all, table by table. Raises ConfigError where both name a file of options."""
    if "config" in common and "config" in (setting.options or {}):
        raise ConfigError("--config names a file for all settings, and this one has its own", where=f"--setting {setting.name}")
    found: dict[str, Any] = {"progress": False, **common}
    for key, value in (setting.options or {}).items():
        before = found.get(key)
        found[key] = {**before, **value} if isinstance(before, dict) and isinstance(value, Mapping) else value
    return found
