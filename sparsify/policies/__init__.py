"""Eviction policies, one file each. `policies.make("snapkv", window=16)`, `policies.parse(text)`, `policies.discover()`."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import pkgutil
from typing import Any

from pydantic import ValidationError

from sparsify.errors import ConfigError, nearest
from sparsify.policies.base import Candidates, LayerFacts, Layout, Policy, parse_options

__all__ = ["Candidates", "LayerFacts", "Layout", "Policy", "discover", "make", "parse"]

ENTRY_POINT_GROUP = "sparsify.policies"


@functools.cache
def discover() -> dict[str, type[Policy]]:
    """Every policy by name: modules of this package, then the entry-point group `sparsify.policies` of other packages.

    Raises:
        ConfigError: two policies share a name, or an entry point is not a Policy.
    """
    found: dict[str, type[Policy]] = {}
    for module in pkgutil.iter_modules(__path__):
        loaded = importlib.import_module(f"{__name__}.{module.name}")
        for value in vars(loaded).values():
            if isinstance(value, type) and issubclass(value, Policy) and value.__module__ == loaded.__name__ and "name" in vars(value):
                _add(found, value, loaded.__name__)
    for entry in importlib.metadata.entry_points(group=ENTRY_POINT_GROUP):
        value = entry.load()
        if not (isinstance(value, type) and issubclass(value, Policy)):
            raise ConfigError(f"entry point {entry.value} is not a sparsify Policy", where=f"{ENTRY_POINT_GROUP}:{entry.name}")
        _add(found, value, entry.value)
    return found


def _add(found: dict[str, type[Policy]], policy: type[Policy], where: str) -> None:
    if found.get(policy.name, policy) is not policy:
        raise ConfigError(f"two policies are named {policy.name!r}", where=where, hint="rename one of them")
    found[policy.name] = policy


def make(policy: str | Policy, **options: Any) -> Policy:
    """A policy from its name and options; an instance passes through.

    Raises:
        ConfigError: unknown name, unknown option or impossible value.
    """
    if isinstance(policy, Policy):
        if options:
            raise ConfigError("options are given beside a finished policy", where="policy", hint="put them into the policy")
        return policy
    if policy not in discover():
        raise ConfigError(f"there is no policy {policy!r}", where="policy", hint=nearest(str(policy), discover()))
    model = discover()[policy]
    try:
        return model(**options)
    except ValidationError as failure:
        error = failure.errors(include_url=False)[0]
        key = ".".join(map(str, error["loc"]))
        unknown = error["type"] == "extra_forbidden"
        what, hint = (f"{error['msg']}, not {error['input']!r}" if key else error["msg"]), ""
        if unknown:
            what, hint = "no such option", nearest(key, model.model_fields)
        raise ConfigError(what, where=f"policy {policy}" + (f": {key}" if key else ""), hint=hint) from None


@functools.cache
def parse(text: str) -> Policy:
    """The policy that `Policy.describe` wrote."""
    options = parse_options(text)
    return make(options.pop("name"), **options)
