"""How methods are found: by name, so that a method is a file that nothing lists, here or in another package."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import pkgutil

from sparsify.errors import ConfigError
from sparsify.planning.method import Pass

PACKAGE = "sparsify.passes"
ENTRY_POINT_GROUP = "sparsify.methods"


@functools.cache
def discover() -> dict[str, type[Pass]]:
    """Every method by name: modules of `sparsify.passes`, then the entry-point group `sparsify.methods` of other packages.

    Raises:
        ConfigError: two methods share a name, or an entry point is not a Pass.
    """
    folder = importlib.import_module(PACKAGE)
    found: dict[str, type[Pass]] = {}
    for module in pkgutil.iter_modules(folder.__path__):
        loaded = importlib.import_module(f"{PACKAGE}.{module.name}")
        for value in vars(loaded).values():
            if isinstance(value, type) and issubclass(value, Pass) and value.__module__ == loaded.__name__ and "name" in vars(value):
                _add(found, value, f"{PACKAGE}.{module.name}")
    for entry in importlib.metadata.entry_points(group=ENTRY_POINT_GROUP):
        value = entry.load()
        if not (isinstance(value, type) and issubclass(value, Pass)):
            raise ConfigError(f"entry point {entry.value} is not a sparsify Pass", where=f"{ENTRY_POINT_GROUP}:{entry.name}")
        _add(found, value, entry.value)
    return found


def _add(found: dict[str, type[Pass]], method: type[Pass], where: str) -> None:
    if method.name in found and found[method.name] is not method:
        raise ConfigError(f"two methods are named {method.name!r}", where=where, hint="rename one of them")
    found[method.name] = method
