"""`sparsify config` and `sparsify methods`: the configuration in effect, and the methods with their options."""

from __future__ import annotations

import argparse
import inspect
import sys
from typing import Any

from sparsify.commands import arguments, loading
from sparsify.commands.exit_codes import DONE


def add(commands: Any) -> None:
    """Declares both commands. commands: argparse's subparsers."""
    config = commands.add_parser("config", parents=[arguments.common_options()], help="print the configuration in effect")
    config.add_argument("--show", action="store_true", help="print the configuration in effect (this is what happens anyway)")
    config.add_argument("--markdown", action="store_true", help="print docs/configuration.md instead")
    config.set_defaults(run=run_config)
    methods = commands.add_parser("methods", parents=[arguments.common_options()], help="list the methods and their options")
    methods.set_defaults(run=run_methods)


def run_config(given: argparse.Namespace) -> int:
    from sparsify.planning import registry
    from sparsify.planning.config import docs

    if given.markdown:
        own = {name: model for name, model in registry.discover().items() if model.__module__.startswith("sparsify.")}
        print(docs.markdown(own), end="")
    else:
        print(docs.toml(loading.load_config(given)[0]), end="")
    return DONE


def run_methods(given: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.table import Table

    from sparsify.planning import registry
    from sparsify.planning.config import docs

    loading.load_config(given)
    grid = Table(show_lines=True)
    for heading in ("method", "result", "what it does", "options"):
        grid.add_column(heading, overflow="fold")
    for name, model in sorted(registry.discover().items()):
        module = (inspect.getdoc(sys.modules[model.__module__]) or "").split("\n\n")[0].replace("\n", " ")
        grid.add_row(name, "lossy" if model.lossy else "exact", module.removeprefix(f"{name}: "), docs.option_lines(model))
    Console(width=None if sys.stdout.isatty() else 140, highlight=False, markup=False).print(grid)
    return DONE
