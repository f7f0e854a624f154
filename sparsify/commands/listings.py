"""`sparsify config` and `sparsify methods`: the configuration in effect, and the methods with their options."""

from __future__ import annotations

import argparse
import inspect
import json
import sys
from typing import TYPE_CHECKING, Any

from sparsify.commands import arguments, loading
from sparsify.commands.exit_codes import DONE

if TYPE_CHECKING:
    from sparsify.planning.method import Pass


def add(commands: Any) -> None:
    """Declares both commands. commands: argparse's subparsers."""
    config = commands.add_parser("config", parents=[arguments.common_options()], help="print the configuration in effect")
    config.add_argument("--show", action="store_true", help="print the configuration in effect (this is what happens anyway)")
    form = config.add_mutually_exclusive_group()
    form.add_argument("--markdown", action="store_true", help="print docs/configuration.md instead")
    form.add_argument("--json", action="store_true", help="print it as JSON instead of TOML")
    config.set_defaults(run=run_config)
    methods = commands.add_parser("methods", parents=[arguments.common_options()], help="list the methods and their options")
    methods.add_argument("--json", action="store_true", help="print them as JSON, with a JSON schema of each method's options")
    methods.set_defaults(run=run_methods)


def run_config(given: argparse.Namespace) -> int:
    from sparsify.planning import registry
    from sparsify.planning.config import docs

    if given.markdown:
        own = {name: model for name, model in registry.discover().items() if model.__module__.startswith("sparsify.")}
        print(docs.markdown(own), end="")
    else:
        found = loading.load_config(given)[0]
        print(json.dumps(found.as_options(), indent=1) if given.json else docs.toml(found), end="\n" if given.json else "")
    return DONE


def run_methods(given: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.table import Table

    from sparsify.planning import registry
    from sparsify.planning.config import docs

    loading.load_config(given)
    found = [
        (name, model, "lossy" if model.lossy else "exact", _first_words(name, model)) for name, model in sorted(registry.discover().items())
    ]
    if given.json:
        data = {name: {"result": result, "what": what, "options": model.model_json_schema()} for name, model, result, what in found}
        print(json.dumps(data, indent=1))
        return DONE
    grid = Table(show_lines=True)
    for heading in ("method", "result", "what it does", "options"):
        grid.add_column(heading, overflow="fold")
    for name, model, result, what in found:
        grid.add_row(name, result, what, docs.option_lines(model))
    Console(width=None if sys.stdout.isatty() else 140, highlight=False, markup=False).print(grid)
    return DONE


def _first_words(name: str, model: type[Pass]) -> str:
    """What a method does: the first paragraph about its module."""
    text = (inspect.getdoc(sys.modules[model.__module__]) or "").split("\n\n")[0].replace("\n", " ")
    return text.removeprefix(f"{name}: ")
