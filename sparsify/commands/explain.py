"""`sparsify explain`: what would be done with a model, and why."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from sparsify.commands import arguments, loading
from sparsify.commands.exit_codes import DIFFERS, DONE
from sparsify.errors import UnsupportedError


def add(commands: Any) -> None:
    """Declares the command. commands: argparse's subparsers."""
    parser = commands.add_parser(
        "explain", parents=[arguments.model_options(), arguments.common_options()], help="what sparsify would do with a model, and why"
    )
    parser.add_argument("--save", metavar="FILE", help="write the plan as JSON")
    parser.add_argument("--json", action="store_true", help="print the plan as JSON instead of a table")
    parser.add_argument("--html", metavar="FILE", help="write a page: reasons, costs, densities by head, maps of the chosen blocks")
    parser.set_defaults(run=run)


def run(given: argparse.Namespace) -> int:
    import sparsify

    _, options = loading.load_config(given)
    model, ids = loading.load_model_and_tokens(given)
    plan = sparsify.explain(model, options=options, input_ids=ids, use_cache=False)
    print(plan.to_json() if given.json else plan)
    if given.save:
        _write(plan.to_json() + "\n", given.save, "the plan")
    if given.html:
        _write(plan.to_html(given.model), given.html, "the page")
    return DIFFERS if plan.fallback else DONE


def _write(text: str, path: str, what: str) -> None:
    try:
        Path(path).write_text(text, encoding="utf-8")
    except OSError as error:
        raise UnsupportedError(f"cannot write {what}: {error.strerror}", where=path) from None
