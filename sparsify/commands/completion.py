"""`sparsify --print-completion SHELL`: what a shell needs to complete the command's words."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from typing import Any

SHELLS = ("bash", "zsh", "tcsh")
_FILES = {"FILE"}  # what arguments are called that name files
_FOLDERS = {"FOLDER", "MODEL"}


def add(parser: argparse.ArgumentParser) -> None:
    """Declares the option."""
    parser.add_argument("--print-completion", action=_Completion, choices=SHELLS, help="print completions for a shell, to be sourced by it")


class _Completion(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: str | Sequence[Any] | None, *_: Any) -> None:
        try:
            import shtab  # pyright: ignore[reportMissingImports]  # an extra
        except ImportError:
            parser.error('shtab is not installed (pip install "sparsify-compiler[completion]")')
        for action in _actions(parser):
            names = {action.metavar}
            if names & (_FILES | _FOLDERS):
                setattr(action, "complete", shtab.FILE if names & _FILES else shtab.DIRECTORY)  # noqa: B010  (shtab's own attribute)
        print(shtab.complete(parser, shell=str(values)))
        parser.exit()


def _actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """All arguments of a parser and of its commands."""
    for action in parser._actions:
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from _actions(command)
