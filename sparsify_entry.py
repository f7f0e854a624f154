"""Where the `sparsify` command and the torch.compile backend begin: makes sure that `import sparsify` finds this project's package.

Another distribution on PyPI ships a package of the same name. Where that one is found first, the imports of this project would fail with a
message about a missing submodule; here they fail with one that names the package in the way.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import fx

DISTRIBUTION = "sparsify-compiler"


def check() -> None:
    """Raises ImportError where `sparsify` is another distribution's package."""
    import sparsify

    if getattr(sparsify, "__distribution__", None) == DISTRIBUTION:
        return
    where = getattr(sparsify, "__file__", None) or next(iter(getattr(sparsify, "__path__", ["an unknown place"])))
    owners = ", ".join(n for n in _owners() if n != DISTRIBUTION)
    raise ImportError(
        f"the package `sparsify` at {where} is not {DISTRIBUTION}'s" + (f" but {owners}'s" if owners else "") + ", and it is found first: "
        f"uninstall it and install {DISTRIBUTION} again (pip uninstall sparsify; pip install --force-reinstall --no-deps {DISTRIBUTION})"
    )


def _owners() -> list[str]:
    import importlib.metadata

    return list(dict.fromkeys(importlib.metadata.packages_distributions().get("sparsify", [])))


def backend(
    gm: fx.GraphModule, example_inputs: Sequence[Any], *, mode: str | None = None, options: Mapping[str, Any] | None = None, **unknown: Any
) -> Callable[..., Any]:
    """`sparsify.backend.sparsify`, the torch.compile backend."""
    check()
    from sparsify.backend import sparsify

    return sparsify(gm, example_inputs, mode=mode, options=options, **unknown)


def main() -> int:
    """The `sparsify` command."""
    check()
    from sparsify.commands.main import main

    return main()
