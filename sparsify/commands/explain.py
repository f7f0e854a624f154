"""`sparsify explain`: what would be done with a model, and why."""

from __future__ import annotations

import argparse
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
    parser.set_defaults(run=run)


def run(given: argparse.Namespace) -> int:
    import sparsify

    _, options = loading.load_config(given)
    model, ids = loading.load_model_and_tokens(given)
    plan = sparsify.explain(model, options=options, input_ids=ids, use_cache=False)
    print(plan)
    if given.save:
        try:
            plan.save(given.save)
        except OSError as error:
            raise UnsupportedError(f"cannot write the plan: {error.strerror}", where=given.save) from None
    return DIFFERS if plan.fallback else DONE
